"""The language model: prefill into a KV cache, extension by a question, greedy decoding.

A video's tokens are prefilled once, without logits. A question extends the cache, and only its last token gets logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NumberError, first_line
from .attention import Attention
from .checkpoint import rope_type
from .kv_cache import Filled, KvCache
from .transformers_release import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("sfllava_fast")

_NAN = -1  # in place of a token id, so that checking for NaN needs no further synchronisation


class LanguageModel:
    """The language model inside a stock LLaVA model."""

    def __init__(self, model: PreTrainedModel, attention: Attention) -> None:
        self.attention = attention
        self.core, self.head, self.embed = model.model.language_model, model.lm_head, model.get_input_embeddings()
        self.config, self.dtype, self.device = self.core.config, model.dtype, model.device
        # Number of tokens after which a dynamic rotary embedding rescales every position; None if it never does.
        self.rescales_after = self.config.max_position_embeddings if rope_type(self.config) == "dynamic" else None

    def new_cache(self, rows: int, capacity: int, skipped: Sequence[int] | None = None) -> KvCache:
        """An empty KV cache; the arguments are those of `KvCache`."""
        return KvCache(self.config, rows, capacity, self.dtype, self.device, skipped)

    def cache_bytes(self, capacity: int, skipped: Sequence[int] | None = None) -> int:
        """Bytes of a KV cache of one row."""
        return self.meta_cache(capacity, skipped).nbytes

    def meta_cache(self, capacity: int, skipped: Sequence[int] | None = None) -> KvCache:
        """A KV cache of one row on the meta device: shapes without memory."""
        return KvCache(self.config, 1, capacity, self.dtype, torch.device("meta"), skipped)

    def embed_tokens(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [n, D] of token ids."""
        return self.embed(torch.tensor(ids, dtype=torch.long, device=self.device))

    def rescales(self, tokens: int) -> bool:
        """Whether the rotary embeddings of a sequence of `tokens` tokens differ from those of a shorter one."""
        return self.rescales_after is not None and tokens > self.rescales_after

    def forget_scale(self) -> None:
        """Reset a dynamic rotary embedding, which keeps the scale of its longest input until a short one."""
        if self.rescales_after is not None:
            first = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.core.rotary_emb(torch.empty(1, dtype=self.dtype, device=self.device), first)

    def prefill(self, cache: KvCache, embeds: Tensor, positions: Tensor | None = None) -> None:
        """Append the keys and values of tokens to a cache, without computing logits.

        The last layer stops after its keys and values are written, since nothing reads its output.

        Args:
            cache: The cache.
            embeds: [rows, n, D].
            positions: [rows, n], ascending, if some tokens between these were left out (see `KvCache.skipped`).
        """
        cache.positions, cache.fill_only = None, True
        try:
            with self.attention.for_prefill(), self._placed(positions):
                self._run(cache, embeds)
        except Filled:
            pass
        finally:
            cache.fill_only = False
        cache.advance(embeds.shape[1])

    def extend(self, cache: KvCache, embeds: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append embeds [1, n, D] to a cache of one row. Returns the last token's logits [1, V].

        The arguments are those of `prefill`.
        """
        cache.positions = None
        with self._placed(positions):
            hidden = self._run(cache, embeds)
        cache.advance(embeds.shape[1])
        return self.head(hidden[:, -1])

    def drop(self, cache: KvCache, start: int, count: int) -> None:
        """Remove tokens [start, start + count) from a cache of one row, in place. Later tokens move to lower positions.

        Values that deeper layers computed while they attended to the removed tokens are kept. After an interrupt the
        cache is inconsistent, since layers are changed one by one.
        """
        stop = cache.length
        cos, sin = self._turn(torch.arange(start + count, stop, device=self.device), count)
        for keys, values in cache.buffers:
            keys[..., start : stop - count, :] = _rotate(keys[..., start + count : stop, :], cos, sin)
            values[..., start : stop - count, :] = values[..., start + count : stop, :].clone()
        cache.length -= count

    def _turn(self, positions: Tensor, down: int) -> tuple[Tensor, Tensor]:
        """cos and sin [n, width] that rotate keys from `positions` to positions that are lower by `down`.

        They undo the rotation with the model's own rounded cos and sin, then apply that of the new position. The keys
        differ from those computed at the new position by one rounding.
        """
        anything = torch.empty(1, dtype=self.dtype, device=self.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        both = (self.core.rotary_emb(anything, at[None]) for at in (positions, positions - down))
        (cos, sin), (to_cos, to_sin) = ([part[0].to(wide) for part in parts] for parts in both)
        length = cos.square() + sin.square()
        return (to_cos * cos + to_sin * sin) / length, (to_sin * cos - to_cos * sin) / length

    @cached_property
    def moves_keys(self) -> bool:
        """Whether `drop` is valid for this model, tested on the first layer's keys."""
        embeds = torch.randn(1, 3, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        embeds = embeds.to(self.device, self.dtype)
        moved, there = self.new_cache(1, 3), self.new_cache(1, 3)
        try:
            with torch.inference_mode():
                self.prefill(moved, embeds)
                self.drop(moved, 0, 2)
                self.prefill(there, embeds[:, 2:])
        except (AttributeError, TypeError, RuntimeError):  # no rotary embedding, or another kind of one
            return False
        keys, expected = (cache.buffers[0][0, ..., 0, :].float() for cache in (moved, there))
        return bool((keys - expected).norm() <= 0.02 * expected.norm())

    def extend_rows(self, cache: KvCache, parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Append tokens to rows of different lengths in one forward pass.

        Parts are padded on the right. Padding writes past its row's length, where no query attends.

        Args:
            cache: The cache.
            parts: Embeddings [n_i, D] for each row.
            lengths: Number of tokens in each row of the cache.

        Returns:
            Logits [rows, V] of the last token of each part.
        """
        embeds = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        cache.positions = torch.tensor(lengths, device=self.device)
        cache.stop = max(lengths) + embeds.shape[1]
        hidden = self._run_masked(cache, embeds)
        last = torch.tensor([len(part) - 1 for part in parts], device=self.device)
        return self.head(hidden[torch.arange(len(parts), device=self.device), last])

    def tokens(self, cache: KvCache, logits: Tensor, lengths: Sequence[int], most: int) -> Iterator[list[int]]:
        """Greedy decoding.

        Args:
            cache: The cache.
            logits: [rows, V] of the last token of each row.
            lengths: Number of tokens in each row of the cache.
            most: Number of tokens to generate for each row.

        Yields:
            The next token id of each row.

        Raises:
            NumberError: If a logit is NaN.
        """
        ids, step = _greedy(logits), None
        if cache.rows > 1 or (self.device.type == "cuda" and not self.rescales(max(lengths) + most)):
            step = cache.step = cache.step or StaticStep(self, cache)
            step.start(ids, lengths)
        else:
            (cache.length,) = lengths
        for made in range(most):
            made_now = ids.tolist()
            if _NAN in made_now:
                raise NumberError(
                    "the model computed NaN: its weights or this session are damaged, or float16 overflows; load the "
                    "model and open the video again, or use bfloat16 or float32"
                )
            yield made_now
            if made < most - 1:
                ids = step() if step else _greedy(self.extend(cache, self.embed(ids[:, None])))

    def _run(self, cache: KvCache, embeds: Tensor, **arguments: Tensor) -> Tensor:
        if "position_ids" not in arguments:  # the model would count the tokens in its first layer
            arguments["position_ids"] = torch.arange(embeds.shape[1], device=self.device)[None] + cache.length
        arguments |= cache_argument(self.core, cache)
        return self.core(inputs_embeds=embeds, use_cache=True, **arguments).last_hidden_state

    @contextmanager
    def _placed(self, positions: Tensor | None) -> Iterator[None]:
        """Context in which the rotary embedding, and nothing else, uses `positions`, if given.

        Attention does not get them: FlashAttention would take a gap for the beginning of another sequence.
        """
        if positions is None:
            yield
            return
        place = self.core.rotary_emb.register_forward_pre_hook(
            lambda _, args, arguments: (args[:1], {"position_ids": positions}), with_kwargs=True
        )
        try:
            yield
        finally:
            place.remove()

    def _run_masked(self, cache: KvCache, embeds: Tensor) -> Tensor:
        """A forward pass in which each row attends to its own tokens up to `cache.positions`."""
        assert cache.positions is not None
        queries = cache.positions[:, None] + torch.arange(embeds.shape[1], device=self.device)
        columns = torch.arange(cache.skipped[0], cache.stop, device=self.device)  # all later tokens attend to the video
        seen = columns <= queries[..., None]
        if window := getattr(self.config, "sliding_window", None):
            seen &= columns > queries[..., None] - window
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None]
        with self._attention_that_takes_masks():
            return self._run(cache, embeds, attention_mask=mask, position_ids=queries)

    @contextmanager
    def _attention_that_takes_masks(self) -> Iterator[None]:
        chosen = self.config._attn_implementation
        if not chosen.startswith("flash"):
            yield
            return
        self.config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            self.config._attn_implementation = chosen

    @contextmanager
    def unscaled_rope(self) -> Iterator[None]:
        """Context with a plain rotary embedding, which a dynamic one equals up to its first rescaling.

        A dynamic one would read the positions on the host.
        """
        if self.rescales_after is None:
            yield
            return
        self.core.rotary_emb.rope_type = "default"
        try:
            yield
        finally:
            self.core.rotary_emb.rope_type = "dynamic"


class StaticStep:
    """A decoding step of all rows with its state in fixed tensors: a CUDA graph on a GPU.

    Launching the kernels one by one takes the host several times as long as the GPU takes to run them. The first call
    runs eagerly, which is the warm-up that a capture needs; the second call is captured.
    """

    def __init__(self, model: LanguageModel, cache: KvCache) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros(cache.rows, dtype=torch.long, device=model.device)
        self.positions = torch.zeros_like(self.ids)
        self.captures, self.warm = model.device.type == "cuda", False
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, ids: Tensor, lengths: Sequence[int]) -> None:
        """Set the token ids [rows] that follow `lengths` tokens in each row."""
        self.ids.copy_(ids)
        self.positions.copy_(torch.tensor(lengths))
        self.cache.positions, self.cache.stop = self.positions, self.cache.capacity

    def __call__(self) -> Tensor:
        """The next token ids [rows], in a tensor that the next call overwrites."""
        if self.captures and self.warm and self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()
            self.warm = True
        return self.ids

    def _run(self) -> None:
        with self.model.unscaled_rope():
            hidden = self.model._run_masked(self.cache, self.model.embed(self.ids[:, None]))
        self.ids.copy_(_greedy(self.model.head(hidden[:, -1])))
        self.positions += 1

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            log.warning(
                "the decode step cannot be captured in a CUDA graph (%s): running it eagerly", first_line(error)
            )
            self.captures = False
            return
        self.graph = graph


def _greedy(logits: Tensor) -> Tensor:
    """The ids [rows] of the maxima of logits [rows, V]; _NAN for a row with NaN, which is argmax's maximum."""
    ids = logits.argmax(-1, keepdim=True)
    return ids.masked_fill(logits.gather(-1, ids).isnan(), _NAN)[:, 0]


def _rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate keys [..., n, width]. As in Llama, channel i is paired with channel i + width / 2."""
    keys = keys.to(cos.dtype)
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin

"""Compressing a video into a few tokens (VoCo-LLaMA, arXiv 2406.12275): k learned tokens stand behind a video's own,
and what comes after sees the video through them alone, so that the video's keys and values can be dropped.

The paper's sequence is vision, compression tokens, text; its adjusted attention mask is causal, less text that attends
to vision. Where it says nothing, this holds: text before a video stays in sight of all that follows (the published code
hides it: let the span begin at 0 for that), and a later video sees an earlier one as text does (the published code has
one mask from the first to the last compression token: with several videos, text sees the later ones' own tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.config_sizes import head_width
from ..model.files import as_checkpoint_error
from ..model.transformers_release import cache_argument
from ..patching import Patch
from ..tensor_file import load_tensors, save_tensors
from .weights import weight_replacements

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

_UNLABELLED = -100  # what losses leave out


class Span(NamedTuple):
    """A video's own tokens [start, stop) in a sequence, and how many compression tokens stand right behind them."""

    start: int
    stop: int
    tokens: int

    @property
    def end(self) -> int:
        """The first token behind the compression tokens."""
        return self.stop + self.tokens


Spans = Sequence[Span] | Sequence[Sequence[Span]]  # the same in every row, or each row's own


def compression_mask(
    spans: Spans,
    length: int,
    queries: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bool,
    device: torch.device | str | None = None,
) -> Tensor:
    """Who may attend to whom, [B, 1, stop - start, stop]; B is 1 for spans that hold for every row.

    length: of the whole sequence. queries: (start, stop) of those in this forward pass, on a cache of all tokens before
        them; None: the whole sequence.
    dtype: bool for `scaled_dot_product_attention` and transformers' "sdpa", True where attention is allowed; a floating
        dtype for "eager", added to the scores: 0 or the dtype's minimum.
    Raises InputError for spans that overlap, lie outside, or have no or too many compression tokens.
    """
    start, stop = queries or (0, length)
    if not 0 <= start < stop <= length:
        raise InputError(f"queries must be within the sequence's {length} tokens, not [{start}, {stop})")
    at = torch.arange(stop, device=device)
    seen = _may_attend(at[start:, None], at, _hidden_from(spans, length, device)[:, None, None, :stop])
    if dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def compression_mask_mod(
    spans: Spans, length: int, start: int = 0, device: torch.device | str | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule for `torch.nn.attention.flex_attention.create_block_mask`; its first query is token `start`."""
    hidden_from = _hidden_from(spans, length, device)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _may_attend(start + query, key, hidden_from[row % len(hidden_from), key])  # one row serves all

    return mask_mod


def _may_attend(query: Tensor, key: Tensor, hidden_from: Tensor) -> Tensor:
    """The rule; `hidden_from` is the key's."""
    return (key <= query) & (query < hidden_from)


def _hidden_from(spans: Spans, length: int, device: torch.device | str | None) -> Tensor:
    """[rows, length]: from which token on this one is out of sight; `length` for all but the videos' own."""
    rows = [_checked(row, length) for row in _by_row(spans)]
    hidden_from = torch.full((len(rows), length), length, device=device)
    for row, of_row in zip(hidden_from, rows):
        for span in of_row:
            row[span.start : span.stop] = span.end
    return hidden_from


def _by_row(spans: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Spans that hold for every row, as the only row's."""
    return [spans] if all(isinstance(span, tuple) for span in spans) else spans


def _checked(triples: Sequence[tuple[int, int, int]], length: int) -> list[Span]:
    spans, free = [Span(*triple) for triple in triples], 0
    for span in spans:
        if not free <= span.start < span.stop or span.end > length:
            raise InputError(f"{span} is empty, or overlaps the one before, or is not within {length} tokens")
        if not 1 <= span.tokens <= span.stop - span.start:
            raise InputError(f"{span}: give at least 1 compression token, and at most as many as the video has")
        free = span.end
    return spans


def prefill_compressed(model: PreTrainedModel, embeds: Tensor, spans: Sequence[Span], **arguments: Any) -> ModelOutput:
    """The forward pass that `compression_mask` describes, without any mask: each video is dropped from the cache when
    its compression tokens are in (the paper's two-stage forward, figure 4). FlashAttention serves; gradients flow.

    embeds: [B, S, D], compression tokens included; the spans are those of every row.
    Returns the output for the tokens behind the last video, or for that video and its tokens where nothing follows. Its
    `cache` (`past_key_values` before transformers 5.24) is a DynamicCache that goes on at position S (see
    `dropping.drop_tokens`).
    """
    from transformers import DynamicCache

    from .drop_tokens import drop_tokens

    cache, done = DynamicCache(config=model.config), 0
    for span in [*_checked(spans, embeds.shape[1]), None]:
        part = embeds[:, done : span.end if span else None]
        if part.shape[1]:
            output = model(inputs_embeds=part, use_cache=True, **cache_argument(model, cache), **arguments)
        if span:
            drop_tokens(cache, span.start, span.stop)
            done = span.end
    return output


def cache_bytes(config: Any, tokens: int, dtype: torch.dtype = torch.float16) -> int:
    """Bytes of so many tokens' keys and values, by the shapes in a decoder's transformers config."""
    values = config.num_hidden_layers * config.num_key_value_heads * head_width(config)
    return 2 * values * tokens * dtype.itemsize


class Compression(nn.Module):
    """k learned compression tokens, and the weights of the decoder that was trained with them.

    tokens: embeddings [k, D], the parameter. weights: by name as in `get_decoder().named_parameters()`, and
        "lm_head.weight"; what is not among them stays the model's own.
    """

    def __init__(self, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        if tokens.dim() != 2 or not tokens.numel() or not tokens.is_floating_point() or not tokens.isfinite().all():
            raise InputError(f"compression tokens must be finite embeddings [k, D], not {list(tokens.shape)}")
        self.tokens = nn.Parameter(tokens.detach().clone())
        self.weights = dict(weights or {})

    @classmethod
    def load(cls, path: str | Path) -> Compression:
        """From a safetensors file: `tokens`, and the weights by their names. Raises CheckpointError for any other."""
        with as_checkpoint_error(f"{path} holds no compression tokens"):
            tensors, _ = load_tensors(path)
            return cls(tensors.pop("tokens"), tensors)

    def save(self, path: str | Path) -> Path:
        """Write the file that `load` reads, whole or not at all. Raises InputError where it cannot be written."""
        return save_tensors("the compression tokens", path, {"tokens": self.tokens} | self.weights, {})

    def install(self, model: PreTrainedModel) -> Patch:
        """Put the weights into a model, tied ones in every place; `undo` of what is returned puts back its own.

        Raises InputError, with the model as it was, where its embeddings have another width, or it lacks a weight of
        that name and shape.
        """
        embedding: Any = model.get_input_embeddings()
        if self.tokens.shape[1] != embedding.weight.shape[1]:
            wide = f"{self.tokens.shape[1]} wide, the model's embeddings {embedding.weight.shape[1]}"
            raise InputError(f"the compression tokens are {wide}: train them with this model")
        # Not on the decoder or the model, where other patches leave their handles.
        return Patch(embedding, weight_replacements(model, model.get_decoder(), self.weights))

    def insert(self, embeds: Tensor, videos: Sequence[Any]) -> tuple[Tensor, list[list[Span]]]:
        """embeds [B, S, D] with the tokens behind every video, [B, S + n * k, D], and each row's spans in it.

        videos: (start, stop) of each in embeds, the same in every row, or each row's own; as many in each.
        Raises InputError as `compression_mask` does.
        """
        rows = _videos_of_rows(videos, len(embeds))
        k = len(self.tokens)
        spans = [[Span(start + n * k, stop + n * k, k) for n, (start, stop) in enumerate(row)] for row in rows]
        for row in spans:
            _checked(row, embeds.shape[1] + len(row) * k)
        return _behind(embeds, rows, self.tokens.to(embeds)), spans

    def forward(
        self,
        model: PreTrainedModel,
        embeds: Tensor,
        videos: Sequence[Any],
        labels: Tensor | None = None,
        **arguments: Any,
    ) -> ModelOutput:
        """A model's output for embeds with the tokens put in, under the mask: what training runs.

        embeds, videos: as `insert` takes them. labels: int64 [B, S], of embeds before that.
        """
        put, spans = self.insert(embeds, videos)
        if labels is not None:
            unlabelled = labels.new_full((len(self.tokens),), _UNLABELLED)
            arguments["labels"] = _behind(labels, _videos_of_rows(videos, len(embeds)), unlabelled)
        return model(inputs_embeds=put, attention_mask=_mask_for(model, put, spans), **arguments)


def _videos_of_rows(videos: Sequence[Any], rows: int) -> list[Sequence[tuple[int, int]]]:
    by_row = list(_by_row(videos))
    by_row = by_row * rows if len(by_row) == 1 else by_row
    if len(by_row) != rows or len({len(row) for row in by_row}) != 1:
        raise InputError(f"give the videos of each of {rows} rows, as many in every row")
    return by_row


def _behind(rows: Tensor, videos: list[Sequence[tuple[int, int]]], piece: Tensor) -> Tensor:
    """rows [B, S, ...] with a piece put in behind every video of each."""
    put = []
    for row, of_row in zip(rows, videos):
        first, *others = row.tensor_split([stop for _, stop in of_row])
        put.append(torch.cat([first, *chain.from_iterable((piece, part) for part in others)]))
    return torch.stack(put)


def _mask_for(model: PreTrainedModel, embeds: Tensor, spans: list[list[Span]]) -> Tensor | BlockMask:
    """The mask in the form that the model's attention takes."""
    attention, (rows, length, _) = model.get_decoder().config._attn_implementation, embeds.shape
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rule = compression_mask_mod(spans, length, device=embeds.device)
        return create_block_mask(rule, rows, None, length, length, device=embeds.device)
    if attention not in ("sdpa", "eager"):
        raise InputError(f"{attention} takes no mask: set sdpa, eager or flex_attention, or use prefill_compressed")
    dtype = torch.bool if attention == "sdpa" else embeds.dtype
    return compression_mask(spans, length, dtype=dtype, device=embeds.device)

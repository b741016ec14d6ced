"""Compression of a video into a few tokens (VoCo-LLaMA, arXiv 2406.12275).

k learned tokens follow a video's tokens. Later tokens attend to these, not to the video, so that the video's keys and
values can be dropped.

The paper's sequence is vision, compression tokens, text, and its attention mask is causal, except that text does not
attend to vision. Cases that the paper does not define:

- All later tokens attend to text before a video. The published code hides it; begin the span at 0 for that.
- A later video attends to an earlier one only through its compression tokens. The published code has one mask from the
  first to the last compression token, so that with several videos text attends to tokens of the later ones.
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

_UNLABELLED = -100  # the label that losses ignore


class Span(NamedTuple):
    """A video's tokens [start, stop) in a sequence, and the number of compression tokens right after them."""

    start: int
    stop: int
    tokens: int

    @property
    def end(self) -> int:
        """The end of the compression tokens."""
        return self.stop + self.tokens


Spans = Sequence[Span] | Sequence[Sequence[Span]]  # of all rows, or of each row


def compression_mask(
    spans: Spans,
    length: int,
    queries: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bool,
    device: torch.device | str | None = None,
) -> Tensor:
    """The attention mask of compressed videos.

    Args:
        spans: The videos, the same in all rows or for each row.
        length: Length of the whole sequence.
        queries: (start, stop) of the tokens in this forward pass, if a cache has all tokens before them. None stands
            for the whole sequence.
        dtype: bool for `scaled_dot_product_attention` and transformers' "sdpa", True if attention is allowed. A
            floating dtype for "eager", added to the logits: 0 or the dtype's minimum.
        device: Of the mask.

    Returns:
        [B, 1, stop - start, stop]; B is 1 if the spans are the same in all rows.

    Raises:
        InputError: If spans overlap, are outside of the sequence, or have no or too many compression tokens.
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
    """`compression_mask` for flex_attention's `create_block_mask`; the first query is token `start`."""
    hidden_from = _hidden_from(spans, length, device)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _may_attend(start + query, key, hidden_from[row % len(hidden_from), key])  # one row may apply to all

    return mask_mod


def _may_attend(query: Tensor, key: Tensor, hidden_from: Tensor) -> Tensor:
    """Whether a query attends to a key, which `hidden_from` belongs to."""
    return (key <= query) & (query < hidden_from)


def _hidden_from(spans: Spans, length: int, device: torch.device | str | None) -> Tensor:
    """[rows, length]: the first token that does not attend to this one; `length` except for tokens of videos."""
    rows = [_checked(row, length) for row in _by_row(spans)]
    hidden_from = torch.full((len(rows), length), length, device=device)
    for row, of_row in zip(hidden_from, rows):
        for span in of_row:
            row[span.start : span.stop] = span.end
    return hidden_from


def _by_row(spans: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Spans of each row; of one row if they are the same in all rows."""
    return [spans] if all(isinstance(span, tuple) for span in spans) else spans


def _checked(given: Sequence[tuple[int, int, int]], length: int) -> list[Span]:
    spans, free = [Span(*span) for span in given], 0
    for span in spans:
        if not free <= span.start < span.stop or span.end > length:
            raise InputError(f"{span} is empty, overlaps the one before, or is not within {length} tokens")
        if not 1 <= span.tokens <= span.stop - span.start:
            raise InputError(f"{span} must have at least 1 compression token, and at most as many as the video has")
        free = span.end
    return spans


def prefill_compressed(model: PreTrainedModel, embeds: Tensor, spans: Sequence[Span], **arguments: Any) -> ModelOutput:
    """The forward pass of `compression_mask` without a mask: the paper's two-stage forward (figure 4).

    Each video is dropped from the cache after its compression tokens were computed. It runs with FlashAttention, and
    gradients flow.

    Args:
        model: The language model.
        embeds: [B, S, D], including compression tokens.
        spans: The videos, the same in all rows.
        arguments: Further arguments of the model.

    Returns:
        The output for the tokens after the last video; if there are none, for that video and its compression tokens.
        Its `cache` (`past_key_values` before transformers 5.24) is a DynamicCache whose next position is S (see
        `drop_tokens`).
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
    """Bytes of the keys and values of `tokens` tokens, from a decoder's transformers config."""
    values = config.num_hidden_layers * config.num_key_value_heads * head_width(config)
    return 2 * values * tokens * dtype.itemsize


class Compression(nn.Module):
    """k learned compression tokens, and the weights of the decoder that was trained with them.

    Attributes:
        tokens: Embeddings [k, D], the parameter.
        weights: By name as in `get_decoder().named_parameters()`, and "lm_head.weight". Other weights are the model's.
    """

    def __init__(self, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        if tokens.dim() != 2 or not tokens.numel() or not tokens.is_floating_point() or not tokens.isfinite().all():
            raise InputError(f"compression tokens must be finite embeddings [k, D], not {list(tokens.shape)}")
        self.tokens = nn.Parameter(tokens.detach().clone())
        self.weights = dict(weights or {})

    @classmethod
    def load(cls, path: str | Path) -> Compression:
        """Read a safetensors file with `tokens` and the weights by name. Raises CheckpointError for any other file."""
        with as_checkpoint_error(f"{path} holds no compression tokens"):
            tensors, _ = load_tensors(path)
            return cls(tensors.pop("tokens"), tensors)

    def save(self, path: str | Path) -> Path:
        """Write the file that `load` reads, atomically. Raises InputError if it cannot be written."""
        return save_tensors("the compression tokens", path, {"tokens": self.tokens} | self.weights, {})

    def install(self, model: PreTrainedModel) -> Patch:
        """Put the weights into a model, tied weights in all modules.

        Returns:
            The patch, whose `undo` restores the model's weights.

        Raises:
            InputError: If the embeddings have another width, or the model has no weight with a name and shape. The
                model is unchanged.
        """
        embedding: Any = model.get_input_embeddings()
        if self.tokens.shape[1] != embedding.weight.shape[1]:
            widths = f"{self.tokens.shape[1]} wide, the model's embeddings {embedding.weight.shape[1]}"
            raise InputError(f"the compression tokens are {widths}: train them with this model")
        # Not on the decoder or the model, which other patches have as target.
        return Patch(embedding, weight_replacements(model, model.get_decoder(), self.weights))

    def insert(self, embeds: Tensor, videos: Sequence[Any]) -> tuple[Tensor, list[list[Span]]]:
        """Insert the compression tokens after every video.

        Args:
            embeds: [B, S, D].
            videos: (start, stop) of each video in `embeds`, the same in all rows or for each row, equally many in each.

        Returns:
            Embeddings [B, S + n * k, D] for n videos, and the spans of each row.

        Raises:
            InputError: As in `compression_mask`.
        """
        rows = _videos_of_rows(videos, len(embeds))
        k = len(self.tokens)
        spans = [[Span(start + n * k, stop + n * k, k) for n, (start, stop) in enumerate(row)] for row in rows]
        for row in spans:
            _checked(row, embeds.shape[1] + len(row) * k)
        return _insert_after(embeds, rows, self.tokens.to(embeds)), spans

    def forward(
        self,
        model: PreTrainedModel,
        embeds: Tensor,
        videos: Sequence[Any],
        labels: Tensor | None = None,
        **arguments: Any,
    ) -> ModelOutput:
        """A model's output for embeddings with the tokens inserted, with the mask, for training.

        Args:
            model: The language model.
            embeds: As in `insert`.
            videos: As in `insert`.
            labels: int64 [B, S], of `embeds`.
            arguments: Further arguments of the model.
        """
        inserted, spans = self.insert(embeds, videos)
        if labels is not None:
            unlabelled = labels.new_full((len(self.tokens),), _UNLABELLED)
            arguments["labels"] = _insert_after(labels, _videos_of_rows(videos, len(embeds)), unlabelled)
        return model(inputs_embeds=inserted, attention_mask=_mask_for(model, inserted, spans), **arguments)


def _videos_of_rows(videos: Sequence[Any], rows: int) -> list[Sequence[tuple[int, int]]]:
    by_row = list(_by_row(videos))
    by_row = by_row * rows if len(by_row) == 1 else by_row
    if len(by_row) != rows or len({len(row) for row in by_row}) != 1:
        raise InputError(f"videos must have {rows} rows with equally many videos")
    return by_row


def _insert_after(rows: Tensor, videos: list[Sequence[tuple[int, int]]], piece: Tensor) -> Tensor:
    """rows [B, S, ...] with a piece inserted after every video."""
    inserted = []
    for row, of_row in zip(rows, videos):
        first, *others = row.tensor_split([stop for _, stop in of_row])
        inserted.append(torch.cat([first, *chain.from_iterable((piece, part) for part in others)]))
    return torch.stack(inserted)


def _mask_for(model: PreTrainedModel, embeds: Tensor, spans: list[list[Span]]) -> Tensor | BlockMask:
    """The mask in the form of the model's attention."""
    attention, (rows, length, _) = model.get_decoder().config._attn_implementation, embeds.shape
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rule = compression_mask_mod(spans, length, device=embeds.device)
        return create_block_mask(rule, rows, None, length, length, device=embeds.device)
    if attention not in ("sdpa", "eager"):
        raise InputError(f"{attention} has no mask: set sdpa, eager or flex_attention, or use prefill_compressed")
    dtype = torch.bool if attention == "sdpa" else embeds.dtype
    return compression_mask(spans, length, dtype=dtype, device=embeds.device)

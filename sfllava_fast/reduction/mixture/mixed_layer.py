"""A decoder layer that computes on a part of its tokens: the selection, and the arguments, cache and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError, PatchError
from ...model.transformers_release import cache_in, release
from ...ops.rows import gather_rows_of, scatter_rows, top_per_frame
from ..scorers import LayerInput
from .cache_spans import KeptSpan, columns, cut_mask, spans_of


class Selection(NamedTuple):
    """The selected vision tokens.

    Attributes:
        kept: int64 [B, K], ascending, counted from the first token of the pass.
        scores: [B, K].
    """

    kept: Tensor
    scores: Tensor


@dataclass
class Pass:
    """One forward pass of the decoder.

    Attributes:
        past: Number of tokens before those of this pass.
        token_offsets: Offsets of the frames among the tokens of this pass; empty if it has no vision tokens.
        selection: The most recent selection of a layer.
    """

    past: int
    token_offsets: tuple[int, ...]
    selection: Selection | None = None

    def forget_graph(self) -> None:
        """Detach the scores.

        The autograd graph refers to the pass, through the rotary embeddings: scores with a graph would be a cycle.
        """
        if self.selection is not None:
            self.selection = Selection(self.selection.kept, self.selection.scores.detach())


def select(scorer: nn.Module, at: LayerInput, token_offsets: Sequence[int], ratio: float) -> Selection:
    """Select the tokens of each frame with the highest scores. Raises InputError for a wrong shape, or NaN."""
    scores = scorer(at)
    expected = at.vision.shape[:2]
    if not isinstance(scores, Tensor) or scores.shape != expected:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"the scorer must return {list(expected)}, one score a vision token, not {found}")
    kept = top_per_frame(scores.detach(), token_offsets, ratio)
    return Selection(kept, scores.gather(1, kept - token_offsets[0]))


def run_on_all(
    plain: Callable[..., Tensor], hidden: Tensor, arguments: dict[str, Any], number: int, now: Pass
) -> Tensor:
    """Run a layer on all tokens of a pass, with a cache that may lack earlier tokens."""
    spans = spans_of(cache_in(arguments), number, now.past)
    if spans:
        arguments["attention_mask"] = _cut(arguments, number, now.past + hidden.shape[1], hidden, spans)
    return plain(hidden, **arguments)


def run_on_selection(
    plain: Callable[..., Tensor],
    hidden: Tensor,
    arguments: dict[str, Any],
    number: int,
    now: Pass,
    weighted: bool,
) -> Tensor:
    """Run a layer on the text and the selected tokens of a pass. Other tokens are unchanged.

    Args:
        plain: The layer's own forward.
        hidden: [B, S, D].
        arguments: Its other arguments, which are modified.
        number: The number of the layer.
        now: The pass, which has a selection.
        weighted: As in `MixtureOfDepths`.

    Returns:
        [B, S, D].
    """
    selection = now.selection
    assert selection is not None
    start, stop, total = now.token_offsets[0], now.token_offsets[-1], hidden.shape[1]
    before, after = (torch.arange(*ends, device=hidden.device) for ends in ((0, start), (stop, total)))
    rows = len(hidden)
    index = torch.cat([before.expand(rows, -1), selection.kept, after.expand(rows, -1)], dim=1)
    taken, *rotary = gather_rows_of([hidden, *arguments["position_embeddings"]], index)
    spans = spans_of(cache_in(arguments), number, now.past)
    spans.append(KeptSpan(now.past + start, now.past + stop, now.past + selection.kept))
    arguments |= {
        "attention_mask": _cut(arguments, number, now.past + total, hidden, spans, index),
        "position_embeddings": rotary,
        "position_ids": None,  # flash attention would take gaps for packed sequences
    }
    out = plain(taken, **arguments)
    if not isinstance(out, Tensor):
        found = f"{type(out).__name__}, not hidden states ({release()})"
        raise PatchError(f"the model's layers return a {found}: they cannot be mixed")
    weights, sides = None, (start, total - stop)
    if weighted:
        weights = F.pad(selection.scores, sides, value=1.0).to(out.dtype)
    elif selection.scores.requires_grad:  # straight-through: the value is unchanged, the scores get a gradient
        gate = F.pad(selection.scores.sigmoid(), sides).to(out.dtype)
        out = out + (gate - gate.detach())[..., None] * (out - taken)
    return scatter_rows(hidden, index, out.to(hidden.dtype), weights)


def _cut(
    arguments: dict[str, Any],
    number: int,
    total: int,
    hidden: Tensor,
    spans: list[KeptSpan],
    index: Tensor | None = None,
) -> Tensor | None:
    """The attention mask for the keys in the layer's cache and the queries `index` [B, m]."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    total = max(total, mask.shape[-1])  # a mask of a fixed buffer may be longer than the sequence
    held = columns(spans, total, len(hidden), hidden.device)
    layers = getattr(cache_in(arguments), "layers", ())
    if window := getattr(layers[number], "sliding_window", None) if number < len(layers) else None:
        held = held[:, -(window - 1 + (hidden if index is None else index).shape[1]) :]
    return cut_mask(mask, held, index, total)

"""Rows of hidden states: the best of each frame, taken out and put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .frames import kept_of


def top_per_frame(scores: Tensor, frames: Sequence[int], ratio: float) -> Tensor:
    """The tokens that score highest in each frame, int64 [B, K], ascending; of equal scores the first.

    scores: [B, V], of the tokens from frames[0] on. frames: offsets [F + 1]. ratio: in (0, 1]; of n tokens
        ceil(ratio * n) are kept.
    Returns positions as `frames` counts them.
    """
    if scores.isnan().any():
        raise InputError("a score is NaN: the scorer, or the hidden states that it reads, are not finite")
    kept = []
    for start, stop in zip(frames, frames[1:]):
        of_frame = scores[:, start - frames[0] : stop - frames[0]]
        order = of_frame.argsort(dim=1, descending=True, stable=True)
        kept.append(start + order[:, : kept_of(ratio, stop - start)].sort(dim=1).values)
    return torch.cat(kept, dim=1)


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] (int64) of hidden [B, S, D]: [B, K, D]."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def gather_many(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """The same rows of several tensors, each [B or 1, S, D]."""
    return tuple(gather_rows(tensor.expand(len(index), -1, -1), index) for tensor in tensors)


def scatter_rows(hidden: Tensor, index: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """hidden [B, S, D] with its rows `index` [B, K] replaced by rows [B, K, D]; with weights [B, K] moved towards them:
    hidden + weights * (rows - hidden)."""
    wide = index[..., None].expand_as(rows)
    if weights is not None:
        before = hidden.gather(1, wide)
        rows = before + weights[..., None] * (rows - before)
    return hidden.scatter(1, wide, rows)


def attention_received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """How much attention each key gets from the last queries, causal softmax, the mean over queries and heads.

    queries: [B, H, M, d], those of the last M of the N tokens. keys: [B, G, N, d], H a multiple of G.
    Returns float32 [B, N]. No [N, N] matrix is ever formed.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (queries.float() @ keys.float().transpose(2, 3)) * scale
    count, total = logits.shape[2:]
    later = torch.ones(count, total, dtype=torch.bool, device=logits.device).triu(total - count + 1)
    return logits.masked_fill(later, float("-inf")).softmax(-1).mean((1, 2))

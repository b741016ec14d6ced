"""The row ops in plain PyTorch: the oracle of the kernels, and the backend without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..token_offsets import kept_of


def top_per_frame(scores: Tensor, token_offsets: Sequence[int], ratio: float) -> Tensor:
    kept = []
    for start, stop in zip(token_offsets, token_offsets[1:]):
        of_frame = scores[:, start - token_offsets[0] : stop - token_offsets[0]]
        order = of_frame.argsort(dim=1, descending=True, stable=True)
        kept.append(start + order[:, : kept_of(ratio, stop - start)].sort(dim=1).values)
    return torch.cat(kept, dim=1)


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def scatter_rows(hidden: Tensor, index: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    if weights is not None:
        before = wide(gather_rows(hidden, index))
        rows = (before + wide(weights)[..., None] * (wide(rows) - before)).to(hidden.dtype)
    return hidden.scatter(1, index[..., None].expand_as(rows), rows)


def attention_received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (wide(queries) @ wide(keys).transpose(2, 3)) * scale
    count, total = logits.shape[2:]
    later = torch.ones(count, total, dtype=torch.bool, device=logits.device).triu(total - count + 1)
    return logits.masked_fill(later, float("-inf")).softmax(-1).mean((1, 2)).float()


def wide(x: Tensor) -> Tensor:
    """16 bits as float32."""
    return x if x.dtype == torch.float64 else x.float()

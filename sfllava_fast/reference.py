"""The layout in plain PyTorch: the oracle of every kernel, and the backend where none can run.

Works on any device and floating dtype. 16-bit input is accumulated in float32 and rounded once; a mean adds
its box in (frame, row, column) order from zero and divides by frames, rows and columns in turn, as
PyTorch's adaptive pooling does, so kernels that keep that order are equal to it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import PathwayTables, Plan, Range


def aggregate(features: Tensor, plan: Plan) -> Tensor:
    """Tokens [S, D] of packed patches [sum(plan.lengths), N, D], video by video, pathway by pathway."""
    pooled = [_pool(features, path) for path in plan.pathways]
    parts = [tokens.split(_rows_by_video(path)) for path, tokens in zip(plan.pathways, pooled)]
    return torch.cat([part for video in zip(*parts) for part in video])


def aggregate_backward(grad: Tensor, features: Tensor, plan: Plan) -> Tensor:
    """Gradient [T, N, D] of `aggregate` for the tokens' gradient [S, D].

    A mean spreads its gradient over its box; a max hands it to the element that `aggregate` kept.
    """
    wide = torch.zeros(features.shape, dtype=_accumulator(features.dtype), device=features.device)
    flat = wide.view(-1, features.shape[-1])
    parts = grad.split([rows for video in zip(*map(_rows_by_video, plan.pathways)) for rows in video])
    for index, path in enumerate(plan.pathways):
        _pool_backward(torch.cat(parts[index :: len(plan.pathways)]).to(wide.dtype), features, path, flat)
    return wide.to(features.dtype)


def _pool(features: Tensor, path: PathwayTables) -> Tensor:
    acc = None
    for offset in _offsets(path, features.device):
        x = _gather(features, offset.patch)
        if path.pathway.reduce == "mean":
            acc = torch.zeros_like(x) if acc is None else acc
            acc += torch.where(offset.inside, x, 0)
        else:
            acc = x if acc is None else torch.where(offset.inside & ((x > acc) | x.isnan()), x, acc)
    if path.pathway.reduce == "mean":
        for size in _box_sizes(path, features.device):
            acc /= size
    return acc.to(features.dtype)


def _pool_backward(grad: Tensor, features: Tensor, path: PathwayTables, into: Tensor) -> None:
    if path.pathway.reduce == "mean":
        for size in _box_sizes(path, grad.device):
            grad = grad / size
        token, patch = _pairs(path, grad.device)
        into.index_add_(0, patch, grad[token])
        return
    best = winner = None
    for offset in _offsets(path, grad.device):
        x, patch = _gather(features, offset.patch), offset.patch[:, None].expand_as(grad)
        if best is None:
            best, winner = x, patch
            continue
        better = offset.inside & ((x > best) | x.isnan())
        best, winner = torch.where(better, x, best), torch.where(better, patch, winner)
    into.scatter_add_(0, winner, grad)


def _pairs(path: PathwayTables, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every (token, patch of its box), token by token: in this order a patch adds up what its tokens hand it."""
    patch, inside = zip(*((offset.patch, offset.inside[:, 0]) for offset in _offsets(path, device)))
    patch, inside = torch.stack(patch, 1), torch.stack(inside, 1)
    return inside.nonzero()[:, 0], patch[inside]


class _Offset:
    """One element of every box at once: `patch` [tokens] in the packed patches, `inside` [tokens, 1]."""

    def __init__(self, path: PathwayTables, steps: tuple[int, int, int], device: torch.device) -> None:
        frames, rows, cols = (_step(bins, step) for bins, step in zip(_axes(path), steps))
        height, width = path.shape
        patch = (frames[0][:, None, None] * height + rows[0][:, None]) * width + cols[0]
        inside = frames[1][:, None, None] & rows[1][:, None] & cols[1]
        self.patch = patch.flatten().to(device)
        self.inside = inside.flatten()[:, None].to(device)


def _offsets(path: PathwayTables, device: torch.device) -> Iterator[_Offset]:
    """The elements of the boxes in (frame, row, column) order."""
    longest = [max(stop - start for start, stop in bins) for bins in _axes(path)]
    for steps in torch.cartesian_prod(*map(torch.arange, longest)).tolist():
        yield _Offset(path, steps, device)


def _axes(path: PathwayTables) -> tuple[tuple[Range, ...], ...]:
    return tuple(bins for video in path.frames for bins in video), path.rows, path.cols


def _step(bins: tuple[Range, ...], step: int) -> tuple[Tensor, Tensor]:
    """Element `step` of each bin (held at the last one) and whether the bin is that long."""
    start, stop = torch.tensor(bins).unbind(1)
    return torch.minimum(start + step, stop - 1), start + step < stop


def _box_sizes(path: PathwayTables, device: torch.device) -> tuple[Tensor, ...]:
    """Frames, rows and columns of every token's box: three of [tokens, 1]."""
    sizes = [torch.tensor(bins).diff(dim=1).flatten() for bins in _axes(path)]
    return tuple(axis.flatten()[:, None].to(device) for axis in torch.meshgrid(*sizes, indexing="ij"))


def _gather(features: Tensor, patch: Tensor) -> Tensor:
    patches = features.shape[1]
    x = features[patch.div(patches, rounding_mode="floor"), patch % patches]
    return x.to(_accumulator(features.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_by_video(path: PathwayTables) -> list[int]:
    return [len(bins) * path.tokens_per_frame for bins in path.frames]

"""The aggregator in plain PyTorch: the oracle of its kernels, and the backend if none of them can run.

Works on any device and floating dtype. 16-bit input is accumulated in float32 and rounded once; a mean adds
its box in (frame, row, column) order from zero and divides by frames, rows and columns in turn, as
PyTorch's adaptive pooling does, so kernels that keep that order are equal to it bit for bit. Between linear bins it
adds elements times weights, and divides by frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...layouts.pathways import Range, linear_rests
from ...layouts.plan import PathwayTables, Plan


def aggregate(features: Tensor, plan: Plan) -> Tensor:
    """Tokens [S, D] of packed patches [sum(plan.lengths), N, D]; zeros in rows without a pathway's token."""
    out = features.new_zeros(plan.offsets[-1], features.shape[2])
    for path, rows in zip(plan.pathways, token_rows(plan, out.device)):
        if len(rows):
            out[rows] = _pool(features, path)
    return out


def aggregate_backward(grad: Tensor, features: Tensor, plan: Plan) -> Tensor:
    """Gradient [T, N, D] of `aggregate` for the tokens' gradient [S, D].

    A mean spreads its gradient over its box; a max gives it to the element that `aggregate` kept.
    """
    wide = torch.zeros(features.shape, dtype=_accumulator(features.dtype), device=features.device)
    flat = wide.view(-1, features.shape[-1])
    for path, rows in zip(plan.pathways, token_rows(plan, grad.device)):
        if len(rows):
            _pool_backward(grad[rows].to(wide.dtype), features, path, flat)
    return wide.to(features.dtype)


def aggregate_tangent(tangent: Tensor, features: Tensor, plan: Plan) -> Tensor:
    """Derivative [S, D] of `aggregate` in the direction `tangent` [T, N, D]: a mean is linear, and a maximum passes on
    the tangent of the element that it kept."""
    out = features.new_zeros(plan.offsets[-1], features.shape[2])
    for path, rows in zip(plan.pathways, token_rows(plan, out.device)):
        if len(rows) and path.reduce == "max":
            flat = tangent.reshape(-1, tangent.shape[2])
            out[rows] = flat.gather(0, _winners(features, path)).to(out.dtype)
        elif len(rows):
            out[rows] = _pool(tangent, path)
    return out


def token_rows(plan: Plan, device: torch.device) -> list[Tensor]:
    """Which rows of the output the tokens of each pathway are, in the order of its boxes."""
    rows = []
    for index, path in enumerate(plan.pathways):
        firsts = torch.tensor([item.first_token for item in plan.items if item.pathway == index], dtype=torch.long)
        inside = torch.arange(len(path.rows))[:, None] * path.pitch + torch.arange(len(path.cols))
        rows.append((firsts[:, None] + inside.flatten()).flatten().to(device))
    return rows


def _pool(features: Tensor, path: PathwayTables) -> Tensor:
    acc: Tensor | None = None
    for offset in _offsets(path, features):
        x, inside = _gather(features, offset.patch), offset.inside[:, None]
        if path.reduce == "max":
            acc = x if acc is None else torch.where(inside & ((x > acc) | x.isnan()), x, acc)
            continue
        acc = torch.zeros_like(x) if acc is None else acc
        acc += torch.where(inside, x if path.reduce == "mean" else x * offset.weight[:, None], 0)
    assert acc is not None  # no box is empty
    for size in _divisors(path, features.device):
        acc /= size
    return acc.to(features.dtype)


def _pool_backward(grad: Tensor, features: Tensor, path: PathwayTables, into: Tensor) -> None:
    if path.reduce != "max":
        for size in _divisors(path, grad.device):
            grad = grad / size
        token, patch, weight = _pairs(path, features)
        share = grad[token] if path.reduce == "mean" else grad[token] * weight
        into.index_add_(0, patch, share)
        return
    into.scatter_add_(0, _winners(features, path), grad)


def _winners(features: Tensor, path: PathwayTables) -> Tensor:
    """Which of the packed patches a maximum keeps, [tokens, D]."""
    best: Tensor | None = None
    for offset in _offsets(path, features):
        x = _gather(features, offset.patch)
        patch = offset.patch[:, None].expand_as(x)
        if best is None:
            best, winner = x, patch
            continue
        better = offset.inside[:, None] & ((x > best) | x.isnan())
        best, winner = torch.where(better, x, best), torch.where(better, patch, winner)
    assert best is not None  # no box is empty
    return winner


def _pairs(path: PathwayTables, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every (token, patch of its box, weight), by token: a patch adds up the shares of its tokens in this order."""
    patch, inside, weight = (torch.stack(part, 1) for part in zip(*_offsets(path, features)))
    return inside.nonzero()[:, 0], patch[inside], weight[inside][:, None]


class _Offset(NamedTuple):
    """One element of every box at once."""

    patch: Tensor  # [tokens] in the packed patches
    inside: Tensor  # [tokens]: whether the box has such an element
    weight: Tensor  # [tokens] of the accumulator's dtype: the element's between linear bins


def _offsets(path: PathwayTables, features: Tensor) -> Iterator[_Offset]:
    """The elements of the boxes in (frame, row, column) order."""
    axes = tuple(bin for video in path.frames for bin in video), path.rows, path.cols
    row_weights, col_weights = (_weights(path, axis, _accumulator(features.dtype)) for axis in (0, 1))
    longest = [max(stop - start for start, stop in bins) for bins in axes]
    for steps in torch.cartesian_prod(*map(torch.arange, longest)).tolist():
        (frame, in_frame), (row, in_row), (col, in_col) = (_step(bins, step) for bins, step in zip(axes, steps))
        inside = in_frame[:, None, None] & in_row[:, None] & in_col
        patch = frame[:, None, None] * features.shape[1] + path.first_patch + row[:, None] * path.shape[1] + col
        weight = (row_weights[min(steps[1], 1)][:, None] * col_weights[min(steps[2], 1)]).expand(inside.shape)
        yield _Offset(*(part.flatten().to(features.device) for part in (patch, inside, weight)))


def _weights(path: PathwayTables, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [bins] of the first and of the second element of linear bins; ones for others."""
    count, n = len((path.rows, path.cols)[axis]), path.shape[axis]
    if path.reduce != "linear":
        return (torch.ones(count, dtype=dtype),) * 2
    second = torch.tensor(linear_rests(n, count)).to(dtype) / (2 * count)
    return 1 - second, second


def _step(bins: tuple[Range, ...], step: int) -> tuple[Tensor, Tensor]:
    """Element `step` of each bin (held at the last one) and whether the bin is that long."""
    start, stop = torch.tensor(bins).unbind(1)
    return torch.minimum(start + step, stop - 1), start + step < stop


def _divisors(path: PathwayTables, device: torch.device) -> list[Tensor]:
    """What a token's sum is divided by, in turn: [tokens, 1] each."""
    axes = [tuple(bin for video in path.frames for bin in video), path.rows, path.cols]
    sizes = [torch.tensor(bins).diff(dim=1).flatten() for bins in axes]
    divisors = [axis.flatten()[:, None].to(device) for axis in torch.meshgrid(*sizes, indexing="ij")]
    return {"max": [], "mean": divisors, "linear": divisors[:1]}[path.reduce]


def _gather(features: Tensor, patch: Tensor) -> Tensor:
    patches = features.shape[1]
    x = features[patch.div(patches, rounding_mode="floor"), patch % patches]
    return x.to(_accumulator(features.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

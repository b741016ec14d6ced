"""Launches of the projector's kernels (project.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

from sfllava_fast.layouts.plan import Plan
from sfllava_fast.ops.backends.plan_table import on_device

from .launch import device_of, is_aligned, launch, vector_of
from .project import add_parts, project_rows, project_tiles
from .project_order import project_order

_PART_BLOCK = 1024


class Tile(NamedTuple):
    """The part of a program, and how it is compiled; rows of `project_tiles` are gathered patches."""

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int


# By compute capability's major number, to be tuned on a device. The first is taken, the second for means of single
# patches, which are stored from as many registers as they are added up in. Tiles of 256 x 128 read least; two programs
# of 128 x 128 x 64 share a multiprocessor, so that one's epilogue runs beside the other's product.
POOL_TILES = {
    8: (Tile(128, 128, 32, 4, 4), Tile(256, 128, 32, 8, 3)),
    9: (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    10: (Tile(128, 128, 64, 4, 3), Tile(128, 128, 32, 4, 4)),
}
ROWS_TILES = {
    8: (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 4)),
    9: (Tile(128, 128, 32, 8, 4), Tile(64, 128, 64, 4, 3)),
    10: (Tile(128, 128, 32, 4, 4), Tile(64, 128, 64, 4, 3)),
}


def project_pool(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Linear1, exact GELU in float32, and mean pooling.

    Args:
        hidden: [T, N, C] bfloat16 or float16 on a CUDA device (on the CPU under TRITON_INTERPRET=1), unit stride over
            C.
        weight: [I, C] of hidden's dtype, unit stride over C.
        bias: [I] of hidden's dtype, or None.
        plan: of T frames of N patches, of a layout that `is_plain`; every bin of frames is one frame.
        tile: None for that of the device.

    Returns:
        pooled: [M, I] float32, never rounded to 16 bits: the tokens of the mean pathways in the plan's order.
        kept: [F, N, I] of hidden's dtype: all patches of the frames that max pathways read, ascending; F may be 0.

    Raises:
        ValueError: a bin spans several frames.
    """
    with device_of(hidden):
        tile = tile or _pool_tile(hidden, plan)
        order = project_order(plan, tile.rows)
        table = on_device(order.table, hidden.device)
        width, inner = hidden.shape[2], weight.shape[0]
        buffer = torch.empty(order.tokens + order.parts, inner, dtype=torch.float32, device=hidden.device)
        kept = hidden.new_empty(len(order.kept_frames), hidden.shape[1], inner)
        vector = vector_of(is_aligned((hidden, weight)), 2, (*hidden.stride()[:2], weight.stride(0), width, inner))
        chunks = -(-inner // tile.channels)
        launch(
            project_tiles, order.tiles * chunks, (hidden, weight, bias, table, buffer, kept),
            (*[stride // vector for stride in (*hidden.stride()[:2], weight.stride(0))], width, chunks),
            (width % tile.depth == 0, inner, bias is not None, bool(order.kept_frames), order.has_small, order.padded,
             order.unit, tile.rows, tile.channels, tile.depth, vector),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if order.sums:
            chunks = -(-inner // _PART_BLOCK)
            tensors = buffer, table[order.sums_at :]
            launch(add_parts, order.sums * chunks, tensors, (chunks,), (inner, _PART_BLOCK), num_warps=4, num_stages=1)
    return buffer[: order.tokens], kept


def project_pooled(pooled: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile | None = None) -> None:
    """out[:] = pooled @ weight.T + bias as if in float32, rounded once to out's dtype.

    Args:
        pooled: [M, I] float32, contiguous, on out's device.
        weight: [D, I] of out's dtype, unit stride over I.
        bias: [D] of out's dtype, or None.
        out: [M, D] bfloat16 or float16, unit stride over D, such as rows of a language model's embeddings.
        tile: None for that of the device.
    """
    rows, inner = pooled.shape
    if not rows:
        return
    with device_of(out):
        tile = tile or _tiles(ROWS_TILES, out)[0]
        outer = out.shape[1]
        vector = vector_of(is_aligned((pooled, weight, out)), 2, (weight.stride(0), out.stride(0), inner, outer))
        programs = -(-rows // tile.rows) * -(-outer // tile.channels)
        launch(
            project_rows, programs, (pooled, weight, bias, out),
            (weight.stride(0) // vector, out.stride(0) // vector, rows, inner // vector),
            (inner % tile.depth == 0, outer, bias is not None, torch.finfo(out.dtype).max,
             tile.rows, tile.channels, tile.depth, vector),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _tiles(tiles: dict[int, tuple[Tile, Tile]], tensor: Tensor) -> tuple[Tile, Tile]:
    major = torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9
    return tiles.get(major, tiles[8])


def _pool_tile(hidden: Tensor, plan: Plan) -> Tile:
    first, second = _tiles(POOL_TILES, hidden)
    return first if project_order(plan, first.rows).unit > 1 else second

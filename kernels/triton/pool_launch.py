"""Launches of the aggregator's kernels (forward.py, backward.py).

What depends on the plan is computed once per plan, what the compiler needs once per kind of call; a call is one launch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfllava_fast.layouts.plan import Plan, kept_with_plan
from sfllava_fast.ops.backends.plan_table import find_sections

from .backward import spread_boxes, spread_tiles
from .forward import pool_boxes, pool_tiles
from .launch import prepare, run, vector_of
from .tiling import Tiling, find_tiling
from .tuning import TUNING, Tuning

_BOXES = Tuning(warps=1, vectors=1)
_LANES = 32  # of a warp
_LEAST_A_LANE = 4  # elements if addresses forbid 16 bytes: few registers, yet loads of whole sectors
_MOST_SPLITS = 64
_MOST_PROGRAMS = 2**31 - 1


class Work(NamedTuple):
    """The kernel for a plan, its programs, and its arguments between the strides and (block, vector)."""

    kernel: Any
    programs: int
    numbers: tuple[int, ...]
    constants: tuple


def pool(features: Tensor, plan: Plan, host_table: Tensor, table: Tensor, out: Tensor) -> None:
    """Fills out with the plan's tokens of features; rows of separators and zeros stay as they are.

    Uploads and allocates nothing, and does not wait for the device.

    Args:
        features: [T, N, D] float32, bfloat16 or float16 on a CUDA device, unit stride over D; on the CPU under
            TRITON_INTERPRET=1.
        plan: the plan of these features.
        host_table, table: the plan's int32 table on the CPU and on the features' device.
        out: [S, D] of the features' dtype and device, unit stride over D.
    """
    _call(forward_work, "forward", features, out, (features, table, out), plan, host_table)


def pool_backward(grad: Tensor, features: Tensor, plan: Plan, host_table: Tensor, table: Tensor, out: Tensor) -> None:
    """out[:] = the features' gradient for the tokens' gradient.

    Args:
        grad: [S, D] of the features' dtype and device, unit stride over D.
        features, plan, host_table, table: as in `pool`.
        out: [T, N, D] of the features' dtype and device, contiguous.
    """
    _call(backward_work, "backward", features, grad, (grad, features, table, out), plan, host_table)


def _call(
    find_work: Callable[[Plan, Tensor, int], Work],
    direction: str,
    features: Tensor,
    tokens: Tensor,
    tensors: Sequence[Tensor],
    plan: Plan,
    host_table: Tensor,
) -> None:
    """Launches a kernel on `tensors`; `tokens` are the tokens or their gradient."""
    device = features.device.index
    # Not torch.cuda.current_device(), which would initialise CUDA first.
    if device is not None and torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            _call(find_work, direction, features, tokens, tensors, plan, host_table)
        return
    channels = tokens.shape[1]
    if channels == 0:
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    low_bits = 0
    for address in addresses:
        low_bits |= address
    start, numbers = _prepare(
        plan, find_work, TUNING[direction], host_table, features.dtype, device,
        low_bits % 16 == 0, channels, features.stride(), tokens.stride(),
    )  # fmt: skip
    run(start, device, (*(tensors if device is None else addresses), *numbers))


@kept_with_plan
def _prepare(
    plan: Plan,
    find_work: Callable[[Plan, Tensor, int], Work],
    tuning: Tuning,
    host_table: Tensor,
    dtype: torch.dtype,
    device: int | None,
    aligned: bool,
    channels: int,
    features_stride: tuple[int, ...],
    tokens_stride: tuple[int, ...],
) -> tuple[Callable, tuple]:
    """What `run` starts, and its arguments after the tensors. `device` must be the current one. tuning: of tiles."""
    steps = (*features_stride[:2], tokens_stride[0], channels)
    vector = vector_of(aligned, dtype.itemsize, steps)
    tuning = tuning if find_tiling(plan) else _BOXES
    block = _LANES * tuning.warps * tuning.vectors * max(vector, _LEAST_A_LANE)
    kernel, programs, numbers, constants = find_work(plan, host_table, -(-channels // block))
    constants = (*constants, block, vector)
    # A fused half + sum would not round a denormal half.
    options = {"num_warps": tuning.warps, "enable_fp_fusion": False}
    start = prepare(kernel, programs, dtypes_of(kernel, dtype), constants, device, **options)
    return start, (*[step // vector for step in steps], *numbers, *constants)


def dtypes_of(kernel: Any, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the kernel's tensors: the plan's table, and others of one dtype."""
    names = kernel.arg_names[: kernel.arg_names.index("frame_stride")]
    return tuple(torch.int32 if name == "table" else dtype for name in names)


def forward_work(plan: Plan, host_table: Tensor, chunks: int) -> Work:
    at = find_sections(host_table)
    if tiling := find_tiling(plan):
        tiles, numbers, constants = _tile_arguments(plan, tiling)
        return Work(pool_tiles, at.groups * tiles * chunks, (chunks, at.groups_at, at.items_at, *numbers), constants)
    splits = _splits(max(path.tokens_per_frame for path in plan.pathways), at.groups * chunks)
    numbers = chunks, at.groups_at, at.items_at, at.bins_at, splits
    return Work(pool_boxes, at.groups * splits * chunks, numbers, ())


def backward_work(plan: Plan, host_table: Tensor, chunks: int) -> Work:
    at, tiling, frames, patches = find_sections(host_table), find_tiling(plan), sum(plan.lengths), plan.patches
    if tiling and tiling.whole:
        tiles, numbers, constants = _tile_arguments(plan, tiling)
        numbers = chunks, at.groups_at, at.items_at, patches, *numbers
        return Work(spread_tiles, at.groups * tiles * chunks, numbers, constants)
    splits = _splits(patches, frames * chunks)
    numbers = chunks, at.items_at, at.frames_at, at.readers_at, at.bins_at, patches, splits
    return Work(spread_boxes, frames * splits * chunks, numbers, ())


def _splits(parts: int, units: int) -> int:
    """How many programs share the parts (boxes, patches) of each of the units (groups, frames)."""
    return max(1, min(parts, _MOST_SPLITS, _MOST_PROGRAMS // units))


def _tile_arguments(plan: Plan, tiling: Tiling) -> tuple[int, tuple[int, ...], tuple]:
    tiles = tiling.tile_rows * tiling.tile_cols
    numbers = (plan.grid[1], tiles, tiling.tile_cols, tiling.strips, len(plan.pathways[0].cols))
    kind = tiling.width, tiling.fine_rows, tiling.fine_cols, tiling.fine_mean, tiling.repeats, tiling.every_frame
    return tiles, numbers, kind

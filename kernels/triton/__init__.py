"""The aggregator in Triton, installed as `sfllava_fast._triton`: launches of the kernels beside this file.

What a plan decides is worked out once per plan, what the compiler needs once per kind of call; a call adds a launch.
"""

from functools import lru_cache
from itertools import accumulate

import torch

from sfllava_fast.layouts.plan import kept_with_plan

from .backward import spread_boxes, spread_tiles
from .forward import pool_boxes, pool_tiles
from .launch import refuse_to_compile_in_a_capture
from .project_launch import project_pool as project_pool
from .project_launch import project_pooled as project_pooled
from .rows_launch import (
    blend_rows as blend_rows,
)  # fmt: skip
from .rows_launch import (
    copy_rows as copy_rows,
)
from .rows_launch import (
    receive_attention as receive_attention,
)
from .rows_launch import (
    replace_rows as replace_rows,
)
from .rows_launch import (
    select_rows as select_rows,
)
from .tiling import find_tiling
from .tuning import TUNING, Tuning

_BOXES = Tuning(warps=1, vectors=1)
_LANES = 32  # of a warp
_LEAST_A_LANE = 4  # elements where addresses forbid 16 bytes: few registers, yet loads of whole sectors
_MOST_SPLITS = 64
_MOST_PROGRAMS = 2**31 - 1


def pool(features, plan, host_table, table, out):
    """Fills out with the plan's tokens of features; rows of separators and zeros stay as they are.

    Uploads and allocates nothing, and does not wait for the device.
    features: [T, N, D] float32, bfloat16 or float16 on a CUDA device, unit stride over D; on the CPU under
        TRITON_INTERPRET=1.
    plan: sfllava_fast.layouts.plan.Plan. host_table, table: its int32 table on the host and on the features' device.
    out: [S, D] of the features' dtype and device, unit stride over D.
    """
    _call(_work, "forward", features, out, (features, table, out), plan, host_table)


def pool_backward(grad, features, plan, host_table, table, out):
    """out[:] = the features' gradient for the tokens' gradient; otherwise as `pool`.

    grad: [S, D] of the features' dtype and device, unit stride over D. out: [T, N, D], contiguous.
    """
    _call(_backward_work, "backward", features, grad, (grad, features, table, out), plan, host_table)


def _call(find_work, direction, features, tokens, tensors, plan, host_table):
    """Launches a kernel on `tensors`; `tokens` are the tokens or their gradient."""
    device = features.device.index
    # Not torch.cuda.current_device(), which would see to it that CUDA is up.
    if device is not None and torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _call(find_work, direction, features, tokens, tensors, plan, host_table)
    channels = tokens.shape[1]
    if channels == 0:
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    low_bits = 0
    for address in addresses:
        low_bits |= address
    launch, numbers = _prepare(
        plan, find_work, TUNING[direction], host_table, features.dtype, device,
        low_bits % 16 == 0, channels, features.stride(), tokens.stride(),
    )  # fmt: skip
    if device is None:  # the interpreter
        launch(*tensors, *numbers)
    else:
        launch(*addresses, *numbers, stream=torch._C._cuda_getCurrentRawStream(device))


@kept_with_plan
def _prepare(plan, find_work, tuning, host_table, dtype, device, aligned, channels, features_stride, tokens_stride):
    """What to call with the tensors and these numbers; `device` must be the current one. tuning: of tiles."""
    steps = (*features_stride[:2], tokens_stride[0], channels)
    vector = _vector(aligned, steps, dtype.itemsize)
    tuning = tuning if find_tiling(plan) else _BOXES
    block = _LANES * tuning.warps * tuning.vectors * max(vector, _LEAST_A_LANE)
    kernel, programs, numbers, constants = find_work(plan, host_table, -(-channels // block))
    constants = (*constants, block, vector)
    numbers = (*[step // vector for step in steps], *numbers, *constants)
    if device is None:
        return kernel[(programs,)], numbers
    # Not kernel[...], which would examine every argument of every call again.
    return _compile(kernel, dtype, constants, device, tuning.warps)[(programs, 1, 1)], numbers


def _vector(aligned, steps, item_size):
    """Elements in 16 bytes where every vector of channels that a kernel forms begins at a multiple of that; else 1."""
    vector = 16 // item_size
    return vector if aligned and not any(step % vector for step in steps) else 1


def _work(plan, host_table, chunks):
    """Which kernel serves a plan, in how many programs, and its arguments between the steps and the block."""
    groups, groups_at, items_at, _, _, bins_at = _sections(host_table)
    tiling = find_tiling(plan)
    if tiling:
        tiles, numbers, constants = _tile_arguments(plan, tiling)
        return pool_tiles, groups * tiles * chunks, (chunks, groups_at, items_at, *numbers), constants
    boxes = max(path.tokens_per_frame for path in plan.pathways)
    splits = _splits(boxes, groups * chunks)
    return pool_boxes, groups * splits * chunks, (chunks, groups_at, items_at, bins_at, splits), ()


def _backward_work(plan, host_table, chunks):
    groups, groups_at, items_at, frames_at, readers_at, bins_at = _sections(host_table)
    tiling, frames, patches = find_tiling(plan), sum(plan.lengths), plan.patches
    if tiling and tiling.whole:
        tiles, numbers, constants = _tile_arguments(plan, tiling)
        return spread_tiles, groups * tiles * chunks, (chunks, groups_at, items_at, patches, *numbers), constants
    splits = _splits(patches, frames * chunks)
    numbers = (chunks, items_at, frames_at, readers_at, bins_at, patches, splits)
    return spread_boxes, frames * splits * chunks, numbers, ()


def _splits(parts, units):
    """How many programs share the parts (boxes, patches) of each of the units (groups, frames)."""
    return max(1, min(parts, _MOST_SPLITS, _MOST_PROGRAMS // units))


def _sections(host_table):
    """How many groups; where groups, items, frames, readers and bins begin: csrc/include/sfllava/plan.h."""
    _, _, frames, _, pathways, groups, items, readers = host_table[:8].tolist()
    return groups, *accumulate((groups + 1, 4 * items, frames + 1, readers), initial=8 + 11 * pathways)


def _tile_arguments(plan, tiling):
    tiles = tiling.tile_rows * tiling.tile_cols
    numbers = (plan.grid[1], tiles, tiling.tile_cols, tiling.strips, len(plan.pathways[0].cols))
    kind = tiling.width, tiling.fine_rows, tiling.fine_cols, tiling.fine_mean, tiling.repeats, tiling.every_frame
    return tiles, numbers, kind


@lru_cache(maxsize=256)
def _compile(kernel, dtype, constants, device, warps=1):
    """The kernel for tensors of `dtype` and a table, on a device, which must be the current one."""
    refuse_to_compile_in_a_capture(device)
    tensors = kernel.arg_names[: kernel.arg_names.index("frame_stride")]
    types = [torch.int32 if name == "table" else dtype for name in tensors]
    numbers = len(kernel.arg_names) - len(types) - len(constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}  # a fused half + sum would not round a denormal half
    return kernel.warmup(*types, *[0] * numbers, *constants, grid=(1,), **options)

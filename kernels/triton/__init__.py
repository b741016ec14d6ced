"""The aggregator in Triton, installed as `sfllava_fast._triton`: launches of the kernels beside this file.

What a plan decides is worked out once per plan, what the compiler needs once per kind of call; a call adds a launch.
"""

from functools import lru_cache

import torch

from .forward import pool_boxes, pool_tiles
from .tiling import find_tiling

_WARPS = 1
_BLOCK_BYTES = 512  # a program's channels: 16 bytes a lane
_MOST_SPLITS = 64
_MOST_PROGRAMS = 2**31 - 1


def pool(features, plan, host_table, table, out):
    """out[:] = the plan's tokens of features. Uploads and allocates nothing, and does not wait for the device.

    features: [T, N, D] float32, bfloat16 or float16 on a CUDA device, unit stride over D; on the CPU under
        TRITON_INTERPRET=1.
    plan: sfllava_fast.config.Plan. host_table, table: its int32 table on the host and on the features' device.
    out: [S, D] of the features' dtype and device, unit stride over D.
    """
    device = features.device.index
    if device is not None and torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return pool(features, plan, host_table, table, out)
    channels = features.shape[2]
    if channels == 0:
        return
    steps = (features.stride(0), features.stride(1), out.stride(0), channels)
    vector = _vector(features.data_ptr() | out.data_ptr(), steps, features.element_size())
    launch, numbers = _prepare(plan, host_table, channels, features.dtype, vector, device)
    numbers = (*[step // vector for step in steps], *numbers)
    if device is None:  # the interpreter
        launch(features, table, out, *numbers)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch(features.data_ptr(), table.data_ptr(), out.data_ptr(), *numbers, stream=stream)


def _vector(addresses, steps, item_size):
    """Elements in 16 bytes where every vector of channels that a kernel forms begins at a multiple of that; else 1."""
    for step in steps:
        addresses |= step * item_size
    return 1 if addresses % 16 else 16 // item_size


@lru_cache(maxsize=256)
def _prepare(plan, host_table, channels, dtype, vector, device):
    """What to call with three addresses or tensors, the steps and these numbers; `device` must be the current one."""
    block = _BLOCK_BYTES // dtype.itemsize
    kernel, programs, numbers, constants = _work(plan, host_table, -(-channels // block))
    constants = (*constants, block, vector)
    if device is None:
        return kernel[(programs,)], (*numbers, *constants)
    # Not kernel[...], which would examine every argument of every call again.
    return _compile(kernel, dtype, constants, device)[(programs, 1, 1)], (*numbers, *constants)


def _work(plan, host_table, chunks):
    """Which kernel serves a plan, in how many programs, and its arguments between the steps and the block."""
    _, _, _, _, pathways, groups, items = host_table[:7].tolist()  # csrc/include/sfllava/plan.h
    groups_at = 7 + 6 * pathways
    items_at = groups_at + groups + 1
    tiling = find_tiling(plan)
    if tiling:
        tiles = tiling.tile_rows * tiling.tile_cols
        fine_cols = len(plan.pathways[0].cols)
        numbers = (chunks, groups_at, items_at, plan.grid[1], tiles, tiling.tile_cols, tiling.strips, fine_cols)
        constants = (tiling.width, tiling.fine_rows, tiling.fine_cols, tiling.fine_mean, tiling.repeats)
        return pool_tiles, groups * tiles * chunks, numbers, constants
    boxes = max(path.tokens_per_frame for path in plan.pathways)
    splits = max(1, min(boxes, _MOST_SPLITS, _MOST_PROGRAMS // (groups * chunks)))
    numbers = (chunks, groups_at, items_at, items_at + 4 * items, splits)
    return pool_boxes, groups * splits * chunks, numbers, ()


@lru_cache(maxsize=256)
def _compile(kernel, dtype, constants, device):
    """The kernel for features and out of `dtype` and a table, on a device, which must be the current one."""
    numbers = len(kernel.params) - 3 - len(constants)
    return kernel.warmup(dtype, torch.int32, dtype, *[0] * numbers, *constants, grid=(1,), num_warps=_WARPS)

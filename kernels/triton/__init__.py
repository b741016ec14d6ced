"""The aggregator in Triton, installed as `sfllava_fast._triton`: launches of the kernels beside this file.

What a plan decides is worked out once per plan, what the compiler needs once per kind of call; a call adds a launch.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

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
    if features.is_cuda and torch.cuda.current_device() != features.device.index:
        with torch.cuda.device(features.device):
            return pool(features, plan, host_table, table, out)
    channels, item_size = features.shape[2], features.element_size()
    if channels == 0:
        return
    steps = (features.stride(0), features.stride(1), out.stride(0), channels)
    vector = _vector(features.data_ptr() | out.data_ptr(), steps, item_size)
    block = _BLOCK_BYTES // item_size
    work = _work(plan, host_table, -(-channels // block))
    numbers = (*[step // vector for step in steps], *work.numbers)
    _launch(work.kernel, work.programs, (features, table, out), numbers, (*work.constants, block, vector))


def _vector(addresses, steps, item_size):
    """Elements in 16 bytes where every vector of channels that a kernel forms begins at a multiple of that; else 1."""
    for step in steps:
        addresses |= step * item_size
    return 1 if addresses % 16 else 16 // item_size


@dataclass(frozen=True)
class _Work:
    kernel: object
    programs: int
    numbers: tuple
    constants: tuple


@lru_cache(maxsize=256)
def _work(plan, host_table, chunks):
    """Which kernel serves a plan, and its arguments between the strides and the block."""
    _, _, _, _, pathways, groups, items = host_table[:7].tolist()  # csrc/include/sfllava/plan.h
    groups_at = 7 + 6 * pathways
    items_at = groups_at + groups + 1
    tiling = find_tiling(plan)
    if tiling:
        tiles = tiling.tile_rows * tiling.tile_cols
        fine_cols = len(plan.pathways[0].cols)
        numbers = (chunks, groups_at, items_at, plan.grid[1], tiles, tiling.tile_cols, tiling.strips, fine_cols)
        constants = (tiling.width, tiling.fine_rows, tiling.fine_cols, tiling.fine_mean, tiling.repeats)
        return _Work(pool_tiles, groups * tiles * chunks, numbers, constants)
    boxes = max(path.tokens_per_frame for path in plan.pathways)
    splits = max(1, min(boxes, _MOST_SPLITS, _MOST_PROGRAMS // (groups * chunks)))
    numbers = (chunks, groups_at, items_at, items_at + 4 * items, splits)
    return _Work(pool_boxes, groups * splits * chunks, numbers, ())


def _launch(kernel, programs, tensors, numbers, constants):
    if not isinstance(kernel, triton.JITFunction):  # the interpreter's, which compiles nothing
        kernel[(programs,)](*tensors, *numbers, *constants)
        return
    device = tensors[0].device.index
    compiled = _compile(kernel, tensors[0].dtype, constants, device)
    # Not through kernel[...], which would examine every argument again: a third of the time of a call.
    launch = compiled[(programs, 1, 1)]
    addresses = (tensor.data_ptr() for tensor in tensors)
    launch(*addresses, *numbers, *constants, stream=torch._C._cuda_getCurrentRawStream(device))


@lru_cache(maxsize=256)
def _compile(kernel, dtype, constants, device):
    """The kernel for features and out of `dtype` and a table, on a device, which must be the current one."""
    numbers = len(kernel.params) - 3 - len(constants)
    return kernel.warmup(dtype, torch.int32, dtype, *[0] * numbers, *constants, grid=(1,), num_warps=_WARPS)

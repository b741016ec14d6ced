"""The aggregator in Triton, installed as `sfllava_fast._triton`: launches of the kernels beside this file.

What a plan decides is worked out once per plan, what the compiler needs once per kind of call; a call adds a launch.
"""

from functools import lru_cache

import torch

from .backward import spread_tiles
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
    _call(_work, features, out, (features, table, out), plan, host_table)


def pool_backward(grad, features, plan, host_table, table, out):
    """out[:] = the features' gradient for the tokens' gradient, for a plan that `has_backward`; otherwise as `pool`.

    grad: [S, D] of the features' dtype and device, unit stride over D. out: [T, N, D], contiguous.
    """
    _call(_backward_work, features, grad, (grad, features, table, out), plan, host_table)


@lru_cache(maxsize=256)
def has_backward(plan):
    """Whether the plan is tiled, repeats no frame, and its tiles cover every patch."""
    tiling = find_tiling(plan)
    if tiling is None or tiling.repeats:
        return False
    coarse = plan.pathways[-1]
    return (sum(map(len, coarse.frames)), coarse.rows[-1][1], coarse.cols[-1][1]) == (sum(plan.lengths), *plan.grid)


def _call(find_work, features, tokens, tensors, plan, host_table):
    """Launches a kernel on `tensors`; `tokens` are the tokens or their gradient."""
    device = features.device.index
    if device is not None and torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _call(find_work, features, tokens, tensors, plan, host_table)
    channels = features.shape[2]
    if channels == 0:
        return
    steps = (features.stride(0), features.stride(1), tokens.stride(0), channels)
    addresses = [tensor.data_ptr() for tensor in tensors]
    vector = _vector(addresses, steps, features.element_size())
    launch, numbers = _prepare(find_work, plan, host_table, channels, features.dtype, vector, device)
    numbers = (*[step // vector for step in steps], *numbers)
    if device is None:  # the interpreter
        launch(*tensors, *numbers)
    else:
        launch(*addresses, *numbers, stream=torch._C._cuda_getCurrentRawStream(device))


def _vector(addresses, steps, item_size):
    """Elements in 16 bytes where every vector of channels that a kernel forms begins at a multiple of that; else 1."""
    lowest = 0  # no bit of it is lower than the lowest of any address or step, in bytes
    for address in addresses:
        lowest |= address
    for step in steps:
        lowest |= step * item_size
    return 1 if lowest % 16 else 16 // item_size


@lru_cache(maxsize=256)
def _prepare(find_work, plan, host_table, channels, dtype, vector, device):
    """What to call with the tensors, the steps and these numbers; `device` must be the current one."""
    block = _BLOCK_BYTES // dtype.itemsize
    kernel, programs, numbers, constants = find_work(plan, host_table, -(-channels // block))
    constants = (*constants, block, vector)
    if device is None:
        return kernel[(programs,)], (*numbers, *constants)
    # Not kernel[...], which would examine every argument of every call again.
    return _compile(kernel, dtype, constants, device)[(programs, 1, 1)], (*numbers, *constants)


def _work(plan, host_table, chunks):
    """Which kernel serves a plan, in how many programs, and its arguments between the steps and the block."""
    groups, groups_at, items_at, bins_at = _sections(host_table)
    tiling = find_tiling(plan)
    if tiling:
        tiles, numbers, constants = _tile_arguments(plan, tiling)
        constants = (*constants, tiling.repeats)
        return pool_tiles, groups * tiles * chunks, (chunks, groups_at, items_at, *numbers), constants
    boxes = max(path.tokens_per_frame for path in plan.pathways)
    splits = max(1, min(boxes, _MOST_SPLITS, _MOST_PROGRAMS // (groups * chunks)))
    return pool_boxes, groups * splits * chunks, (chunks, groups_at, items_at, bins_at, splits), ()


def _backward_work(plan, host_table, chunks):
    groups, groups_at, items_at, _ = _sections(host_table)
    tiles, numbers, constants = _tile_arguments(plan, find_tiling(plan))
    patches = plan.grid[0] * plan.grid[1]
    return spread_tiles, groups * tiles * chunks, (chunks, groups_at, items_at, patches, *numbers), constants


def _sections(host_table):
    """How many groups there are, and where groups, items and bins begin: csrc/include/sfllava/plan.h."""
    _, _, frames, _, pathways, groups, items, readers = host_table[:8].tolist()
    groups_at = 8 + 8 * pathways
    items_at = groups_at + groups + 1
    return groups, groups_at, items_at, items_at + 4 * items + frames + 1 + readers


def _tile_arguments(plan, tiling):
    tiles = tiling.tile_rows * tiling.tile_cols
    numbers = (plan.grid[1], tiles, tiling.tile_cols, tiling.strips, len(plan.pathways[0].cols))
    return tiles, numbers, (tiling.width, tiling.fine_rows, tiling.fine_cols, tiling.fine_mean)


@lru_cache(maxsize=256)
def _compile(kernel, dtype, constants, device):
    """The kernel for tensors of `dtype` and a table, on a device, which must be the current one."""
    tensors = kernel.arg_names[: kernel.arg_names.index("frame_stride")]
    types = [torch.int32 if name == "table" else dtype for name in tensors]
    numbers = len(kernel.arg_names) - len(types) - len(constants)
    return kernel.warmup(*types, *[0] * numbers, *constants, grid=(1,), num_warps=_WARPS)

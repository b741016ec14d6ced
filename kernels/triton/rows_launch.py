"""Launches of the kernels for rows and attention (rows.py, attention.py), in the style of the aggregator's beside them.

Functions have the names and arguments of the ops that the C++ kernels implement on the CPU; they fill what they are
given.
"""

import torch

from sfllava_fast.ops.backends.plan_table import on_device

from . import attention_received as attention
from . import rows as kernels
from .launch import device_of, is_aligned, launch, vector_of

_TOGETHER = 3  # tensors that a launch copies
_BLOCK_BYTES = 8192  # of a row, at a time
_MERGED_ROWS = 4  # of a program, which have less of a row at a time
_EXACT = {"num_warps": 4, "enable_fp_fusion": False}  # a fused product and sum would be rounded once, not twice
_QUERIES, _KEYS = 16, 64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def select_rows(scores, table, kept, nan):
    """kept[:] = positions of each frame's highest scores; nan[0] = 1 where one is NaN.

    scores: [B, V] float32, bfloat16 or float16. table: int32 [F, 4] on the host: start, tokens, kept and place of each
        frame; cached on the device. kept: int64 [B, K], contiguous. nan: int32 [1].
    """
    block = max(16, _power_of_two(int(table[:, 1].max())))
    with device_of(scores):
        launch(
            kernels.select_rows, len(scores) * len(table), (scores, on_device(table, scores.device), kept, nan),
            (*scores.stride(), len(table), kept.shape[1]), (block,), num_warps=min(32, max(4, block // 512)),
        )  # fmt: skip


def copy_rows(tensors, index, out):
    """out[i][:] = rows of tensors[i], [B, S, D] with unit stride over D; up to three of one element size in a launch.

    index: int64 [B, K]. out: each [B, K, D] of the tensor's dtype, contiguous.
    """
    with device_of(index):
        for size, dtype in _INTEGERS.items():
            of_size = [pair for pair in zip(tensors, out) if pair[1].numel() and pair[1].element_size() == size]
            pairs = [(x.view(dtype), y.view(dtype)) for x, y in of_size]
            for start in range(0, len(pairs), _TOGETHER):
                _copy_together(pairs[start : start + _TOGETHER], index)


def _copy_together(pairs, index):
    steps = [(*x.stride()[:2], x.shape[2]) for x, _ in pairs]
    tensors = [tensor for pair in pairs for tensor in pair]
    vector = vector_of(is_aligned(tensors), tensors[0].element_size(), [number for step in steps for number in step])
    numbers = [number // vector for step in steps for number in step]
    missing = _TOGETHER - len(pairs)
    launch(
        kernels.copy_rows, index.numel(), (index, *tensors, *pairs[0] * missing),
        (*index.stride(), index.shape[1], pairs[0][0].shape[1], *numbers, *(0, 0, 0) * missing),
        (len(pairs), _block(max(x.shape[2] for x, _ in pairs), tensors[0]), vector), num_warps=4,
    )  # fmt: skip


def replace_rows(hidden, index, rows, out):
    """out[:] = hidden with its rows `index` replaced: [B, S, D] and [B, K, D] of one dtype with unit stride over D.

    index: int64 [B, K], ascending. out: hidden itself, of which only those rows are touched, or memory of its own.
    """
    bits = _INTEGERS[hidden.element_size()]
    _merge(hidden.view(bits), index, rows.view(bits), None, out.view(bits))


def blend_rows(hidden, index, rows, weights, out):
    """`replace_rows` by hidden + weights * (rows - hidden); weights: float32 [B, K], contiguous."""
    _merge(hidden, index, rows, weights, out)


def _merge(hidden, index, rows, weights, out):
    batch, tokens, channels = hidden.shape
    steps = (*hidden.stride()[:2], *rows.stride()[:2], *out.stride()[:2], channels)
    vector = vector_of(is_aligned((hidden, rows, out)), hidden.element_size(), steps)
    numbers = (*index.stride(), index.shape[1], tokens, *[step // vector for step in steps])
    tensors = (index, hidden, rows, weights, out)
    blend, block = weights is not None, _block(channels, hidden)
    with device_of(hidden):
        if out.data_ptr() == hidden.data_ptr():
            launch(kernels.put_rows, index.numel(), tensors, numbers, (blend, block, vector), **_EXACT)
            return
        half = _power_of_two(index.shape[1] + 1) // 2
        constants = (blend, _MERGED_ROWS, max(16, block // _MERGED_ROWS), vector)
        launch(
            kernels.merge_rows, batch * -(-tokens // _MERGED_ROWS), tensors, (*numbers, half), constants, **_EXACT
        )  # fmt: skip


def receive_attention(queries, keys, scale, out):
    """out[:] = the mean over queries and heads of the causal softmax, of queries [B, H, M, d], the last M of N.

    keys: [B, G, N, d] of the queries' dtype, float32, bfloat16 or float16, both with unit stride over d. out: float32
    [B, N], contiguous.
    """
    batch, groups, tokens, channels = keys.shape
    heads, count = queries.shape[1:3]
    rows, blocks = heads // groups * count, -(-tokens // _KEYS)
    steps = (*queries.stride()[:3], *keys.stride()[:3])
    vector = vector_of(is_aligned((queries, keys)), keys.element_size(), (*steps, channels))
    numbers = (*[step // vector for step in steps], groups, count, rows, tokens, channels // vector, scale)
    constants = (_QUERIES, _KEYS, max(16, _power_of_two(channels)), vector)
    with device_of(keys):
        sums = out.new_empty(batch * groups, rows, blocks)
        tensors, options = (queries, keys, sums), sum_options(keys.dtype)
        launch(attention.sum_blocks, batch * groups * blocks, tensors, numbers, constants, **options)
        sums = sums.logsumexp(2)
        parts = out.new_empty(batch, groups, tokens)
        tensors = (queries, keys, sums, parts)
        launch(attention.add_probabilities, batch * groups * blocks, tensors, numbers, constants, num_warps=4)
        torch.sum(parts, 1, out=out).div_(heads * count)


def sum_options(dtype):
    """How `sum_blocks` is compiled: three stages of float32 make Triton 3.8 and 3.9 run out of registers on sm_80."""
    return {"num_warps": 4, "num_stages": 2 if dtype == torch.float32 else 3}


def _block(channels, tensor):
    return max(16, min(_power_of_two(channels), _BLOCK_BYTES // tensor.element_size()))


def _power_of_two(number):
    """The least that is no less than the number."""
    return 1 << (number - 1).bit_length()

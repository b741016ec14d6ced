"""Launches of the row and attention kernels (rows.py, attention_received.py).

The functions have the names and arguments of the ops that the C++ kernels implement on a CPU; they fill what they are
given.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfllava_fast.ops.backends.plan_table import on_device

from . import attention_received as attention
from . import rows as kernels
from .launch import device_of, is_aligned, launch, vector_of

_TOGETHER = 3  # tensors in a launch of `gather_rows`
_BLOCK_BYTES = 8192  # of a row, at a time
ROWS_OF_A_PROGRAM = 4  # of `scatter_rows`, with less of a row at a time
EXACT = {"num_warps": 4, "enable_fp_fusion": False}  # a fused product and sum would be rounded once, not twice
QUERIES, KEYS = 16, 64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def top_per_frame_out(scores: Tensor, table: Tensor, kept: Tensor, nan: Tensor) -> None:
    """kept[:] = positions of each frame's highest scores; nan[0] = 1 if a score is NaN.

    Args:
        scores: [B, V] float32, bfloat16 or float16.
        table: int32 [F, 4] on the CPU: start, tokens, kept tokens and first place of each frame; cached on the device.
        kept: int64 [B, K], contiguous.
        nan: int32 [1].
    """
    block = max(16, _power_of_two(int(table[:, 1].max())))
    with device_of(scores):
        launch(
            kernels.top_per_frame, len(scores) * len(table), (scores, on_device(table, scores.device), kept, nan),
            (*scores.stride(), len(table), kept.shape[1]), (block,), num_warps=min(32, max(4, block // 512)),
        )  # fmt: skip


def gather_rows_out(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor]) -> None:
    """out[i][:] = rows `index` of tensors[i]; up to three tensors of one element size share a launch.

    Args:
        tensors: each [B, S, D] with unit stride over D.
        index: int64 [B, K].
        out: each [B, K, D] of the tensor's dtype, contiguous.
    """
    with device_of(index):
        for size, dtype in _INTEGERS.items():
            of_size = [pair for pair in zip(tensors, out) if pair[1].numel() and pair[1].element_size() == size]
            pairs = [(x.view(dtype), y.view(dtype)) for x, y in of_size]
            for start in range(0, len(pairs), _TOGETHER):
                _gather_together(pairs[start : start + _TOGETHER], index)


def _gather_together(pairs: Sequence[tuple[Tensor, Tensor]], index: Tensor) -> None:
    steps = [step for x, _ in pairs for step in (*x.stride()[:2], x.shape[2])]
    tensors = [tensor for pair in pairs for tensor in pair]
    vector = vector_of(is_aligned(tensors), tensors[0].element_size(), steps)
    missing = _TOGETHER - len(pairs)
    launch(
        kernels.gather_rows, index.numel(), (index, *tensors, *pairs[0] * missing),
        (*index.stride(), index.shape[1], pairs[0][0].shape[1], *[step // vector for step in steps],
         *(0, 0, 0) * missing),
        (len(pairs), _block(max(x.shape[2] for x, _ in pairs), tensors[0]), vector), num_warps=4,
    )  # fmt: skip


def scatter_rows_out(hidden: Tensor, index: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[:] = hidden with its rows `index` replaced.

    Args:
        hidden: [B, S, D] with unit stride over D.
        index: int64 [B, K], ascending.
        rows: [B, K, D] of hidden's dtype with unit stride over D.
        out: hidden itself, of which only those rows are touched, or other memory, [B, S, D] with unit stride over D.
    """
    bits = _INTEGERS[hidden.element_size()]
    _scatter(hidden.view(bits), index, rows.view(bits), None, out.view(bits))


def scatter_rows_weighted_out(hidden: Tensor, index: Tensor, rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """`scatter_rows_out` of hidden + weights * (rows - hidden); weights: float32 [B, K], contiguous."""
    _scatter(hidden, index, rows, weights, out)


def _scatter(hidden: Tensor, index: Tensor, rows: Tensor, weights: Tensor | None, out: Tensor) -> None:
    batch, tokens, channels = hidden.shape
    steps = (*hidden.stride()[:2], *rows.stride()[:2], *out.stride()[:2], channels)
    vector = vector_of(is_aligned((hidden, rows, out)), hidden.element_size(), steps)
    numbers = (*index.stride(), index.shape[1], tokens, *[step // vector for step in steps])
    tensors = (index, hidden, rows, weights, out)
    weighted, block = weights is not None, _block(channels, hidden)
    with device_of(hidden):
        if out.data_ptr() == hidden.data_ptr():
            kernel = kernels.scatter_rows_in_place
            launch(kernel, index.numel(), tensors, numbers, (weighted, block, vector), **EXACT)
            return
        half = _power_of_two(index.shape[1] + 1) // 2
        constants = (weighted, ROWS_OF_A_PROGRAM, max(16, block // ROWS_OF_A_PROGRAM), vector)
        programs = batch * -(-tokens // ROWS_OF_A_PROGRAM)
        launch(kernels.scatter_rows, programs, tensors, (*numbers, half), constants, **EXACT)


def attention_received_out(queries: Tensor, keys: Tensor, scale: float, out: Tensor) -> None:
    """out[:] = the mean over queries and heads of the causal softmax.

    Args:
        queries: [B, H, M, d], float32, bfloat16 or float16, of the last M of N tokens.
        keys: [B, G, N, d] of the queries' dtype; both with unit stride over d.
        scale: factor of the logits.
        out: float32 [B, N], contiguous.
    """
    batch, groups, tokens, channels = keys.shape
    heads, count = queries.shape[1:3]
    rows, blocks = heads // groups * count, -(-tokens // KEYS)
    steps = (*queries.stride()[:3], *keys.stride()[:3])
    vector = vector_of(is_aligned((queries, keys)), keys.element_size(), (*steps, channels))
    numbers = (*[step // vector for step in steps], groups, count, rows, tokens, channels // vector, scale)
    constants = (QUERIES, KEYS, max(16, _power_of_two(channels)), vector)
    with device_of(keys):
        sums = out.new_empty(batch * groups, rows, blocks)
        options = sum_options(keys.dtype)
        launch(attention.sum_blocks, batch * groups * blocks, (queries, keys, sums), numbers, constants, **options)
        parts = out.new_empty(batch, groups, tokens)
        tensors = (queries, keys, sums.logsumexp(2), parts)
        launch(attention.add_probabilities, batch * groups * blocks, tensors, numbers, constants, num_warps=4)
        torch.sum(parts, 1, out=out).div_(heads * count)


def sum_options(dtype: torch.dtype) -> dict[str, Any]:
    """How `sum_blocks` is compiled: three stages of float32 make Triton 3.8 and 3.9 run out of registers on sm_80."""
    return {"num_warps": 4, "num_stages": 2 if dtype == torch.float32 else 3}


def _block(channels: int, tensor: Tensor) -> int:
    return max(16, min(_power_of_two(channels), _BLOCK_BYTES // tensor.element_size()))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less than the number."""
    return 1 << (number - 1).bit_length()

"""The Triton kernels for rows and attention, unmodified, through Triton's interpreter against plain loops.

Run by test_triton_rows.py, as triton_interpreted.py is by test_triton.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import DTYPES, GuardedRows, assert_same, normal
from rows_cases import best_tokens, check_received, choices, merged, merges, taken
from triton_repairs import repaired_interpreter as repaired_interpreter

from sfllava_fast.ops.backends import registry
from sfllava_fast.ops.backends.rows import frame_table

kernels = registry.triton_kernels()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@settings(max_examples=15)
@given(choices(most=20))
def test_the_best_of_each_frame(call):
    scores, frames, ratio = call
    expected = torch.tensor([best_tokens(row, frames, ratio) for row in scores.float().tolist()])
    kept, nan = torch.full_like(expected, -1), torch.zeros(1, dtype=torch.int32)
    kernels.top_per_frame_out(scores, frame_table(frames, ratio), kept, nan)
    assert torch.equal(kept, expected) and nan.item() == scores.isnan().any()


@settings(max_examples=20)
@given(merges((1, 8, 33, 130), tokens=6))
def test_gathering_and_putting_back(call):
    hidden, index, rows, weights = call
    got = torch.full_like(rows, 7, memory_format=torch.contiguous_format)
    kernels.gather_rows_out([hidden], index, [got])
    assert_same(got, taken(hidden, index))
    out = GuardedRows(hidden.shape[1] * len(hidden), hidden.shape[2], hidden.dtype)
    view = out.rows.unflatten(0, hidden.shape[:2])
    kernels.scatter_rows_out(hidden, index, rows, view)
    assert_same(view, merged(hidden, index, rows))
    kernels.scatter_rows_weighted_out(hidden, index, rows, weights, view)
    assert_same(view, merged(hidden, index, rows, weights))
    for blend in (False, True):
        view.copy_(hidden)
        if blend:
            kernels.scatter_rows_weighted_out(view, index, rows, weights, view)
        else:
            kernels.scatter_rows_out(view, index, rows, view)
        assert_same(view, merged(hidden, index, rows, weights if blend else None))
    out.check()


def test_several_tensors_of_several_sizes():
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    shapes = (2, 6, 9), (2, 6, 4), (2, 6, 1), (2, 6, 40), (2, 6, 3)
    tensors = [normal(shape, torch.float32) for shape in shapes]
    tensors[1], tensors[4] = tensors[1].bfloat16(), tensors[4][:1].double().expand(2, -1, -1)
    out = [torch.empty(2, 3, tensor.shape[2], dtype=tensor.dtype) for tensor in tensors]
    kernels.gather_rows_out(tensors, index, out)
    assert all(torch.equal(got, taken(tensor, index)) for got, tensor in zip(out, tensors))


@dtypes
@pytest.mark.parametrize("offset", [0, 1], ids=["16 bytes a lane", "an element a lane"])
def test_rows_longer_than_a_block(monkeypatch, dtype, offset):
    monkeypatch.setattr(kernels.rows_launch, "_BLOCK_BYTES", 256)
    hidden, index = normal((1, 5, 328), dtype)[..., offset : offset + 320], torch.tensor([[1, 4]])
    rows, weights = torch.empty(1, 2, 320, dtype=dtype), torch.rand(1, 2)
    kernels.gather_rows_out([hidden], index, [rows])
    assert torch.equal(rows, taken(hidden, index))
    out = torch.empty(1, 5, 320, dtype=dtype)
    kernels.scatter_rows_weighted_out(hidden, index, -rows, weights, out)
    assert torch.equal(out, merged(hidden, index, -rows, weights))


def test_kernels_stay_inside_of_tensors_whatever_the_index_says():
    hidden, index, rows = normal((1, 6, 8), torch.float32), torch.tensor([[-1, 2, 6]]), normal((1, 3, 8), torch.float32)
    got = torch.zeros(1, 3, 8)
    kernels.gather_rows_out([hidden], index, [got])
    assert torch.equal(got[:, 1], hidden[:, 2]) and not got[:, ::2].any()
    expected = merged(hidden, index[:, 1:2], rows[:, 1:2])
    kernels.scatter_rows_out(hidden, index, rows, hidden)
    assert torch.equal(hidden, expected)


def test_rows_past_2_to_the_31():
    """In memory that the system hands out page by page, as it is touched."""
    hidden = torch.empty(2 * 2**30 + 4, dtype=torch.bfloat16).as_strided((1, 3, 4), (4, 2**30, 1))
    hidden.copy_(normal((1, 3, 4), torch.bfloat16))
    index, got = torch.tensor([[0, 2]]), torch.empty(1, 2, 4, dtype=torch.bfloat16)
    kernels.gather_rows_out([hidden], index, [got])
    assert torch.equal(got, taken(hidden, index))
    kernels.scatter_rows_out(hidden, index, -got, hidden)
    assert torch.equal(hidden[:, ::2], -got)


@dtypes
@pytest.mark.parametrize(
    "heads, groups, count, tokens, channels", [(4, 2, 1, 70, 32), (2, 1, 9, 9, 20), (6, 2, 7, 130, 33)]
)
def test_attention_received(dtype, heads, groups, count, tokens, channels):
    queries = normal((2, count, heads, channels), dtype).transpose(1, 2)
    keys = normal((2, groups, tokens, channels), dtype)
    got = torch.full((2, tokens), torch.nan)
    kernels.attention_received_out(queries, keys, channels**-0.5, got)
    check_received(got, queries, keys, channels**-0.5)

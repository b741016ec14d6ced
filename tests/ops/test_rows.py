"""Rows chosen, gathered, put back and attended to: C++ kernels and reference against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from kernel_cases import DTYPES, GuardedRows, assert_same, normal
from rows_cases import best_tokens, check_received, choices, merged, merges, received, taken

from sfllava_fast.errors import BackendError, InputError
from sfllava_fast.ops.backends import registry, rows_reference
from sfllava_fast.ops.backends import rows as rows_backends
from sfllava_fast.ops.rows import attention_received, gather_rows, gather_rows_of, scatter_rows, top_per_frame

NEEDS_LIBRARY = pytest.mark.skipif(bool(registry.load_library()), reason="installed without compiled kernels")
both = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=NEEDS_LIBRARY), "torch"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INDEX = torch.tensor([[0, 2, 5]])


# --- chosen


@both
@given(choices())
def test_the_best_of_each_frame(backend, call):
    scores, frames, ratio = call
    nan = torch.zeros(1, dtype=torch.int32)
    kept = top_per_frame(scores, frames, ratio, nan=nan, backend=backend)
    assert kept.tolist() == [best_tokens(row, frames, ratio) for row in scores.float().tolist()]
    assert nan.item() == scores.isnan().any()


@both
def test_a_score_that_is_nan(backend):
    scores = torch.zeros(1, 6)
    scores[0, 4] = torch.nan
    with pytest.raises(InputError, match="a score is NaN"):
        top_per_frame(scores, (2, 5, 8), 0.3, backend=backend)
    nan = torch.zeros(1, dtype=torch.int32)
    assert top_per_frame(scores, (2, 5, 8), 0.3, nan=nan, backend=backend).tolist() == [[2, 6]] and nan.item() == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: top_per_frame(s[0], (0, 8), 0.5), "scores must be floating"),
        (lambda s: top_per_frame(s, (0, 7), 0.5), r"scores must be floating \[batch, 7\]"),
        (lambda s: top_per_frame(s.long(), (0, 8), 0.5), "scores must be floating"),
        (lambda s: top_per_frame(s, (0, 8), 0.0), "ratio must be above 0"),
        (lambda s: top_per_frame(s, (0, 8), 1.5), "ratio must be above 0"),
        (lambda s: top_per_frame(s, (0, 4, 4, 8), 0.5), "ascending"),
        (lambda s: top_per_frame(s, (0, 8), 0.5, nan=torch.zeros(1)), "nan= must be int32"),
    ],
)
def test_choices_that_cannot_be_made(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.zeros(2, 8))


# --- gathered and put back


@both
@given(merges())
def test_gathering_and_putting_back(backend, call):
    hidden, index, rows, weights = call
    assert_same(gather_rows(hidden, index, backend=backend), taken(hidden, index))
    assert_same(scatter_rows(hidden, index, rows, backend=backend), merged(hidden, index, rows))
    blended = merged(hidden, index, rows, weights)
    assert_same(scatter_rows(hidden, index, rows, weights, backend=backend), blended)
    out = GuardedRows(hidden.shape[1] * len(hidden), hidden.shape[2], hidden.dtype)
    view = out.rows.unflatten(0, hidden.shape[:2])
    assert scatter_rows(hidden, index, rows, out=view, backend=backend) is view
    assert_same(view, merged(hidden, index, rows))
    scatter_rows(hidden, index, rows, weights, out=view, backend=backend)
    assert_same(view, blended)
    view.copy_(hidden)
    scatter_rows(view, index, rows, weights, out=view, backend=backend)
    assert_same(view, blended)
    out.check()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16], ids=str)
def test_copies_of_any_dtype(backend, dtype):
    hidden = torch.randint(0, 2, (2, 6, 5)).to(dtype)
    index = INDEX.expand(2, -1)
    assert torch.equal(gather_rows(hidden, index, backend=backend), taken(hidden, index))
    rows = hidden[:, 3:]
    assert torch.equal(scatter_rows(hidden, index, rows, backend=backend), merged(hidden, index, rows))


@both
def test_several_tensors_at_once(backend):
    """Of other widths and dtypes, and one for all of the batch."""
    tensors = normal((2, 6, 9), torch.bfloat16), normal((1, 6, 4), torch.float32), torch.arange(12).view(2, 6, 1)
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    for got, tensor in zip(gather_rows_of(tensors, index, backend=backend), tensors, strict=True):
        assert torch.equal(got, taken(tensor, index))


@both
@pytest.mark.parametrize("channels", [4096, 4095], ids=["around the cache", "rows that are no lines"])
def test_a_result_that_outgrows_the_cache(backend, channels, torch_threads):
    hidden, index = normal((1, 1100, channels), torch.float32), torch.arange(0, 1100, 5)[None]
    rows, weights = -gather_rows(hidden, index), torch.rand(index.shape)
    expected = merged(hidden, index, rows), merged(hidden, index, rows, weights)
    for threads in (1, 3):
        torch_threads(threads)
        assert torch.equal(scatter_rows(hidden, index, rows, backend=backend), expected[0])
        assert torch.equal(scatter_rows(hidden, index, rows, weights, backend=backend), expected[1])


@NEEDS_LIBRARY
def test_kernels_stay_inside_of_tensors_whatever_the_index_says():
    hidden, index, rows = normal((1, 6, 8), torch.float32), torch.tensor([[-1, 2, 6]]), normal((1, 3, 8), torch.float32)
    got = torch.zeros(1, 3, 8)
    torch.ops.sfllava_fast.gather_rows_out([hidden], index, [got])
    assert torch.equal(got[:, 1], hidden[:, 2]) and not got[:, ::2].any()
    expected = merged(hidden, index[:, 1:2], rows[:, 1:2])
    torch.ops.sfllava_fast.scatter_rows_out(hidden, index, rows, hidden)
    assert torch.equal(hidden, expected)


def shrunk(tensor):
    """Its memory is gone, as that of a parameter that FSDP has freed."""
    tensor.untyped_storage().resize_(0)
    return tensor


FRAMES = torch.tensor([[0, 3, 2, 0], [3, 3, 2, 2]], dtype=torch.int32)
KEPT, FLAG = torch.empty(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
BAD_KERNEL_CALLS = {
    "an empty flag": lambda s, x, r: ("top_per_frame_out", s, FRAMES, KEPT, FLAG[:0]),
    "a flag of no dimension": lambda s, x, r: ("top_per_frame_out", s, FRAMES, KEPT, FLAG[0]),
    "a flag of another dtype": lambda s, x, r: ("top_per_frame_out", s, FRAMES, KEPT, FLAG.long()),
    "a flag without memory": lambda s, x, r: ("top_per_frame_out", s, FRAMES, KEPT, shrunk(FLAG.clone())),
    "a result that is too small": lambda s, x, r: ("top_per_frame_out", s, FRAMES, KEPT[:, :3], FLAG),
    "a result of more videos": lambda s, x, r: ("top_per_frame_out", s, FRAMES, KEPT.expand(2, -1), FLAG),
    "a frame behind the scores": lambda s, x, r: ("top_per_frame_out", s[:, :5], FRAMES, KEPT, FLAG),
    "a frame that keeps more than it has": lambda s, x, r: ("top_per_frame_out", s, FRAMES + 2, KEPT, FLAG),
    "a table of int64": lambda s, x, r: ("top_per_frame_out", s, FRAMES.long(), KEPT, FLAG),
    "scores of float64": lambda s, x, r: ("top_per_frame_out", s.double(), FRAMES, KEPT, FLAG),
    "fewer results than tensors": lambda s, x, r: ("gather_rows_out", [x, x], INDEX, [r]),
    "a copy into fewer rows": lambda s, x, r: ("gather_rows_out", [x], INDEX, [r[:, 1:]]),
    "a copy into fewer channels": lambda s, x, r: ("gather_rows_out", [x], INDEX, [r[..., 1:]]),
    "a copy into a smaller dtype": lambda s, x, r: ("gather_rows_out", [x], INDEX, [r.half()]),
    "a copy of another batch": lambda s, x, r: ("gather_rows_out", [x.expand(2, -1, -1)], INDEX, [r]),
    "a copy into no memory": lambda s, x, r: ("gather_rows_out", [x], INDEX, [shrunk(r.clone())]),
    "a copy out of no memory": lambda s, x, r: ("gather_rows_out", [shrunk(x.clone())], INDEX, [r]),
    "rows into a smaller result": lambda s, x, r: ("scatter_rows_out", x, INDEX, r, x[:, 1:].clone()),
    "fewer rows than the index": lambda s, x, r: ("scatter_rows_out", x, INDEX, r[:, 1:], x.clone()),
    "in place, by other strides": lambda s, x, r: (
        "scatter_rows_out",
        x,
        INDEX,
        r,
        x.as_strided((1, 6, 8), (48, 4, 1)),
    ),
    "fewer weights than the index": lambda s, x, r: (
        "scatter_rows_weighted_out",
        x,
        INDEX,
        r,
        torch.ones(1, 2),
        x.clone(),
    ),
    "weights of float64": lambda s, x, r: (
        "scatter_rows_weighted_out",
        x,
        INDEX,
        r,
        torch.ones(1, 3).double(),
        x.clone(),
    ),
    "a blend of integers": lambda s, x, r: (
        "scatter_rows_weighted_out",
        x.int(),
        INDEX,
        r.int(),
        torch.ones(1, 3),
        x.int(),
    ),
    "more queries than tokens": lambda s, x, r: ("attention_received_out", x[None], r[None], 1.0, torch.zeros(1, 3)),
    "attention of fewer tokens": lambda s, x, r: ("attention_received_out", r[None], x[None], 1.0, torch.zeros(1, 5)),
    "attention of float64": lambda s, x, r: (
        "attention_received_out",
        r[None],
        x[None],
        1.0,
        torch.zeros(1, 6).double(),
    ),
    "other channels": lambda s, x, r: ("attention_received_out", r[None, ..., 1:], x[None], 1.0, torch.zeros(1, 6)),
    "no heads of keys": lambda s, x, r: ("attention_received_out", r[None], x[None][:, :0], 1.0, torch.zeros(1, 6)),
}


@NEEDS_LIBRARY
@pytest.mark.parametrize("call", BAD_KERNEL_CALLS)
def test_a_kernel_alone_refuses_what_it_cannot_write(call):
    scores, hidden, rows = torch.full((1, 6), torch.nan), torch.zeros(1, 6, 8), torch.ones(1, 3, 8)
    name, *arguments = BAD_KERNEL_CALLS[call](scores, hidden, rows)
    with pytest.raises(RuntimeError, match="sfllava_fast: "):
        getattr(torch.ops.sfllava_fast, name)(*arguments)
    assert not hidden.any() and (rows == 1).all() and not FLAG.any()


@NEEDS_LIBRARY
def test_kernels_of_nothing():
    nothing, index = torch.zeros(1, 0, 8), torch.zeros(1, 0, dtype=torch.int64)
    torch.ops.sfllava_fast.scatter_rows_out(nothing, index, nothing, nothing.clone())
    flat, turned = torch.zeros(2, 3, 0), torch.zeros(3, 2, 0).transpose(0, 1)
    torch.ops.sfllava_fast.scatter_rows_out(flat, INDEX.expand(2, -1), flat.clone(), turned)
    torch.ops.sfllava_fast.gather_rows_out([torch.zeros(1, 6, 8)], index, [nothing])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, r: gather_rows(x, INDEX.int()), "index must be int64"),
        (lambda x, r: gather_rows(x, INDEX + 1), r"must be in \[0, 6\), not in \[1, 6\]"),
        (lambda x, r: gather_rows(x, INDEX - 1), r"not in \[-1, 4\]"),
        (lambda x, r: gather_rows(x, INDEX.flip(1)), "must ascend"),
        (lambda x, r: scatter_rows(x, INDEX * 0, r), "without repeats"),
        (lambda x, r: gather_rows(x[0], INDEX), "tensors must be"),
        (lambda x, r: gather_rows_of((x, x[:, 1:]), INDEX), "tensors must be"),
        (lambda x, r: gather_rows(x.expand(3, -1, -1), INDEX.expand(2, -1)), "tensors must be"),
        (lambda x, r: gather_rows(x.to("meta"), INDEX), "the index is on cpu"),
        (lambda x, r: scatter_rows(x, INDEX, r[:, 1:]), r"rows must be torch.float32 \[1, 3, 8\]"),
        (lambda x, r: scatter_rows(x, INDEX, r.half()), "rows must be torch.float32"),
        (lambda x, r: scatter_rows(x, INDEX, r, torch.ones(3)), r"weights must be \[1, 3\]"),
        (lambda x, r: scatter_rows(x, INDEX, r, out=x[:, 1:]), "out must be"),
        (lambda x, r: scatter_rows(x[:, :6], INDEX, x[:, 3:], out=x), "out overlaps rows"),
        (lambda x, r: scatter_rows(x, INDEX, r, out=torch.zeros(1, 6, 8, requires_grad=True)), "not differentiable"),
    ],
)
def test_rows_that_cannot_be_moved(call, message):
    x, rows = torch.zeros(1, 6, 8), torch.ones(1, 3, 8)
    with pytest.raises(InputError, match=message):
        call(x, rows)
    assert not x.any()


# --- gradients


def test_gradients_of_the_reference():
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    shapes = (2, 6, 4), (2, 3, 4), (1, 6, 4)
    hidden, rows, one = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: gather_rows_of((a, b), index), (hidden, one), check_batched_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: scatter_rows(a, index, b), (hidden, rows), check_batched_grad=True)
    moved = lambda a, b, w: scatter_rows(a, index, b, w)  # noqa: E731
    assert torch.autograd.gradcheck(moved, (hidden, rows, weights), check_batched_grad=True)


@NEEDS_LIBRARY
@dtypes
def test_gradients_of_the_kernels(dtype):
    """Those that autograd finds through the reference's operators."""
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    leaves = [normal((2, 6, 33), dtype), normal((2, 3, 33), dtype), torch.rand(2, 3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    upstream = normal((2, 6, 33), dtype), normal((2, 3, 33), dtype)
    found = []
    for scatter, gather in ((scatter_rows, gather_rows), (rows_reference.scatter_rows, rows_reference.gather_rows)):
        hidden, rows, weights = leaves
        outputs = scatter(hidden, index, rows, weights), gather(hidden, index)
        found.append(torch.autograd.grad(outputs, leaves, upstream))
    near = 4 * torch.finfo(dtype).eps
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=near, atol=8 * near)


def test_what_needs_no_gradient_gets_none():
    hidden, cos = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 6, 2)
    rows, of_cos = gather_rows_of((hidden, cos), INDEX)
    assert rows.requires_grad and not of_cos.requires_grad


# --- attended to


@both
@dtypes
@pytest.mark.parametrize(
    "heads, groups, count, tokens, channels",
    [(4, 4, 1, 70, 128), (6, 2, 3, 37, 80), (2, 1, 19, 19, 33), (1, 1, 1, 1, 1)],
)
def test_attention_received(backend, dtype, heads, groups, count, tokens, channels):
    queries = normal((2, count, heads, channels), dtype).transpose(1, 2)
    keys = normal((2, groups, tokens, channels), dtype)
    got = attention_received(queries, keys, channels**-0.5, backend=backend)
    check_received(got, queries, keys, channels**-0.5)


@NEEDS_LIBRARY
def test_attention_received_is_the_same_with_any_number_of_threads(torch_threads):
    queries, keys = normal((1, 4, 70, 16), torch.float32), normal((1, 2, 300, 16), torch.float32)
    found = []
    for threads in (1, 3):
        torch_threads(threads)
        found.append(attention_received(queries, keys, 0.3, backend="cpu"))
    assert torch.equal(*found)


@NEEDS_LIBRARY
def test_attention_of_large_logits():
    """Probabilities of one and of next to nothing; what is not finite is seen to be so."""
    queries, keys = torch.full((1, 1, 1, 8), 10.0), torch.zeros(1, 1, 40, 8)
    keys[0, 0, 7] = 100
    got = attention_received(queries, keys, 1.0, backend="cpu")
    assert got[0, 7] == 1 and got.sum() == 1
    keys[0, 0, 9] = torch.nan
    assert attention_received(queries, keys, 1.0, backend="cpu").isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k: (q[0], k), "queries must be"),
        (lambda q, k: (q[..., 1:], k), "queries must be"),
        (lambda q, k: (q[:, 1:], k), "multiple"),
        (lambda q, k: (q, k[:, :, :2]), "cannot be those of the last of 2 tokens"),
        (lambda q, k: (q[:, :, :0], k), "0 queries"),
        (lambda q, k: (q, k.half()), "of one floating dtype"),
    ],
)
def test_attention_that_cannot_be_received(change, message):
    with pytest.raises(InputError, match=message):
        attention_received(*change(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 9, 8)), 1.0)


# --- ops


def test_one_graph_without_breaks():
    frames, x = (1, 9, 17), torch.randn(1, 20, 8)

    def step(x):
        index = top_per_frame(x[:, 1:17, 0], frames, 0.25)
        rows, cos = gather_rows_of((x, x[..., :2]), index)
        received = attention_received(x[:, None, 18:], x[:, None], 0.5)
        return scatter_rows(x, index, rows * 2, cos[..., 0]), received

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x), step(x)):
        assert torch.equal(got, expected)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    compiled(leaf)[0].square().sum().backward()
    step(other)[0].square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_ops_on_shapes_alone():
    x, index = torch.empty(2, 9, 8, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    rows = torch.ops.sfllava_fast.gather_rows([x], index, "auto")[0]
    assert rows.shape == (2, 3, 8)
    assert torch.ops.sfllava_fast.scatter_rows(x, index, rows, None, "auto").shape == x.shape
    assert torch.ops.sfllava_fast.attention_received(x[:, None], x[:, None], 1.0, "auto").shape == (2, 9)
    assert torch.ops.sfllava_fast.top_per_frame(x[..., 0], (0, 4, 9), 0.5, None, "auto").shape == (2, 5)


# --- backends


def test_backends_by_name():
    x = torch.zeros(1, 6, 8)
    with pytest.raises(BackendError, match="unknown backend 'cuda' for rows"):
        gather_rows(x, INDEX, backend="cuda")
    with pytest.raises(BackendError, match="backend triton cannot run this call: tensors are on cpu"):
        gather_rows(x, INDEX, backend="triton")
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(BackendError, match="rows need unit stride over channels"):
        gather_rows(apart, INDEX, backend="cpu")
    with pytest.raises(BackendError, match="float64 is not float32"):
        scatter_rows(x.double(), INDEX, x[:, :3].double(), torch.ones(1, 3), backend="cpu")
    assert torch.equal(gather_rows(apart, INDEX), taken(apart, INDEX))


def test_without_the_library_auto_falls_back_with_a_warning(monkeypatch, caplog):
    registry.warn_once.cache_clear()
    monkeypatch.setattr(registry, "load_library", lambda: "_C.so was not found")
    x = torch.randn(1, 6, 8)
    assert torch.equal(gather_rows(x, INDEX), taken(x, INDEX))
    assert "_C.so was not found; falling back" in caplog.text
    with pytest.raises(BackendError, match="_C.so was not found"):
        gather_rows(x, INDEX, backend="cpu")
    registry.warn_once.cache_clear()


@NEEDS_LIBRARY
def test_the_first_call_on_a_device_is_compared_with_the_reference():
    names = ("top_per_frame_out", "gather_rows_out", "scatter_rows_weighted_out", "attention_received_out")
    right = {name: getattr(torch.ops.sfllava_fast, name) for name in names}
    device = torch.device("cpu")
    assert rows_backends._compare(SimpleNamespace(**right), device) is None
    for name, wrong in zip(names, ("top_per_frame", "gather_rows", "scatter_rows", "attention_received")):

        def run(*arguments, name=name):
            right[name](*arguments)
            results = arguments[2] if name in ("top_per_frame_out", "gather_rows_out") else arguments[-1]
            (results[0] if isinstance(results, list) else results).zero_()

        assert wrong in rows_backends._compare(SimpleNamespace(**right | {name: run}), device)


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", [b"generic", b"avx2", b"avx512"])
def test_every_instruction_set(isa):
    library = registry.cpu_library()
    if not library.sfllava_force_isa(isa):
        pytest.skip("this processor lacks it")
    try:
        hidden, index = normal((1, 6, 100), torch.bfloat16), INDEX
        rows, weights = normal((1, 3, 100), torch.bfloat16), torch.rand(1, 3)
        got = scatter_rows(hidden, index, rows, weights, backend="cpu")
        assert_same(got, merged(hidden, index, rows, weights))
        queries, keys = normal((1, 2, 5, 40), torch.float16), normal((1, 1, 50, 40), torch.float16)
        check_received(attention_received(queries, keys, 0.2, backend="cpu"), queries, keys, 0.2)
    finally:
        library.sfllava_force_isa(None)


def test_the_loop_for_attention_is_a_mean_of_softmaxes():
    queries, keys = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(received(queries, keys, 1.0).sum(1), torch.ones(1, dtype=torch.float64))

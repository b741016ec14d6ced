"""The op as PyTorch sees it: gradients, compile, export, views, buffers, errors."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sfllava_fast import SlowFastAggregator, SlowFastLayout, slowfast_aggregate
from sfllava_fast.errors import BackendError, InputError, LayoutError, SfllavaError
from sfllava_fast.layouts.slowfast import SLOW_POOLS
from sfllava_fast.ops import aggregate as ops
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import reference, registry

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
CONFIG = SlowFastLayout.parse(LAYOUT)
pools = pytest.mark.parametrize("pool", SLOW_POOLS)


def plain(x: torch.Tensor, config=CONFIG, grid=(4, 4)) -> torch.Tensor:
    return reference.aggregate(x, config.plan(len(x), grid))


def layout(pool: str, fast: str = "3x2") -> str:
    return f"slowfast-slow_5frms_{pool}-fast_{fast}"


# --- the op's registration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offsets", [None, [0, 1, 4]])
def test_opcheck(dtype, offsets):
    x = torch.randn(4, 17, 6).to(dtype)[:, 1:]
    offsets = None if offsets is None else torch.tensor(offsets)
    tokens = 3 * 8 * (1 if offsets is None else 2) + 4 * 4
    call = (x, LAYOUT, 4, 4, offsets)
    opcheck(torch.ops.sfllava_fast.aggregate.default, (*call, "auto"))
    opcheck(torch.ops.sfllava_fast.aggregate_out.default, (*call, "auto", torch.empty(tokens, 6, dtype=dtype)))
    opcheck(torch.ops.sfllava_fast.aggregate_backward.default, (torch.randn(tokens, 6).to(dtype), *call, "auto"))


def test_opcheck_of_the_kernels_own_op():
    if reason := registry.load_library():
        pytest.skip(reason)
    from sfllava_fast.ops.backends.plan_table import plan_table

    plan = CONFIG.plan(4, (4, 4))
    args = (torch.randn(4, 16, 6), plan_table(plan), torch.empty(plan.tokens["total"], 6))
    opcheck(torch.ops.sfllava_fast.pool.default, args)
    x, table, tokens = args
    opcheck(torch.ops.sfllava_fast.pool_backward.default, (tokens.normal_(), x, table, torch.empty_like(x)))


# --- gradients


@pools
@pytest.mark.parametrize("grid", [(2, 4), (3, 5)], ids=["whole bins", "overlapping bins"])
def test_gradcheck(pool, grid):
    # 2 frames and 5 slow ones: frames repeat.
    x = torch.randn(2, grid[0] * grid[1], 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: slowfast_aggregate(x, layout(pool, "2x2"), grid=grid), x)


@pools
def test_gradcheck_of_packed_videos(pool):
    x = torch.randn(3, 4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: slowfast_aggregate(x, layout(pool), frame_offsets=[0, 2, 3])[0], x)


def test_gradcheck_of_a_view():
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: slowfast_aggregate(h[:, 1:, 1:], LAYOUT), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_patches_hand_the_gradient_to_the_element_that_max_pool1d_picks(dtype):
    x = torch.randint(-1, 2, (1, 576, 8)).to(dtype).requires_grad_()
    F.max_pool1d(x.transpose(1, 2), 2, 2).sum().backward()
    y = x.detach().clone().requires_grad_()
    slowfast_aggregate(y, "slowfast-slow_1frms_spatial_1d_max_pool").sum().backward()
    assert y.grad.dtype == dtype and torch.equal(y.grad, x.grad)


def test_gradients_in_16_bits_are_accumulated_in_float32():
    # One frame, taken by 300 slow frames: a 16-bit sum of ones would stop at 256.
    x = torch.zeros(1, 4, 1, dtype=torch.bfloat16, requires_grad=True)
    slowfast_aggregate(x, "slowfast-slow_300frms_concat").sum().backward()
    assert x.grad.flatten().tolist() == [300.0] * 4


def test_no_gradient_is_kept_unless_needed():
    x = torch.randn(4, 16, 3, requires_grad=True)
    assert slowfast_aggregate(x, LAYOUT).grad_fn is not None
    assert slowfast_aggregate(x.detach(), LAYOUT).grad_fn is None
    with torch.no_grad():
        assert slowfast_aggregate(x, LAYOUT).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(slowfast_aggregate(x, LAYOUT), plain(x.detach()))


def test_a_backend_asked_for_by_name_computes_the_gradient_too(monkeypatch):
    asked = []

    def run_backward(grad, features, plan, out):
        assert grad.stride(1) == 1  # a sum's is one number, expanded
        asked.append(plan)
        out.fill_(3)

    named = dataclasses.replace(backends.BACKENDS["torch"], run_backward=run_backward)
    monkeypatch.setitem(backends.BACKENDS, "torch", named)
    x = torch.randn(4, 16, 3, requires_grad=True)
    slowfast_aggregate(x, LAYOUT, backend="torch").sum().backward()
    assert len(asked) == 1 and (x.grad == 3).all()


# --- who sees a call


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("out", [False, True])
def test_only_a_call_that_nothing_watches_is_not_dispatched(monkeypatch, out):
    def fail(*_):
        raise AssertionError("called at once")

    name = "_aggregate_out" if out else "_aggregate"
    x = torch.randn(4, 16, 3)
    expected = plain(x)
    call = {"out": torch.empty_like(expected)} if out else {}
    monkeypatch.setattr(ops, "_checked", {})
    monkeypatch.setattr(ops, name, fail)  # what the op runs was registered before
    with pytest.raises(AssertionError, match="called at once"):
        slowfast_aggregate(x, LAYOUT, **call)
    with Watch() as watch:
        assert torch.equal(slowfast_aggregate(x, LAYOUT, **call), expected)
    assert watch.seen[0] == f"sfllava_fast.{name[1:]}.default"
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in call.items()}
        assert slowfast_aggregate(mode.from_tensor(x), LAYOUT, **fake).shape == expected.shape


def test_transforms_see_the_op():
    batch = torch.randn(2, 4, 16, 3)
    tokens = torch.func.vmap(lambda x: slowfast_aggregate(x, LAYOUT))(batch)
    assert torch.equal(tokens, torch.stack([*map(plain, batch)]))


# --- compile and export


@pytest.fixture
def graphs():
    """A compiler backend that counts graphs and runs them through AOTAutograd."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [LAYOUT, CONFIG], ids=["string", "config"])
def test_compile_once_for_every_number_of_frames(config, graphs):
    fn = torch.compile(lambda x: slowfast_aggregate(x, config) * 2, fullgraph=True, dynamic=True, backend=graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)
        for frames in (5, 2, 9, 16, 50):
            x = torch.randn(frames, 16, 8)
            assert torch.equal(fn(x), plain(x) * 2)
    assert graphs.frame_count == 1


def test_compile_with_inductor(recwarn):
    torch._dynamo.reset()
    fn = torch.compile(lambda x: slowfast_aggregate(x.relu(), LAYOUT) + 1, fullgraph=True, dynamic=True)
    for frames in (5, 9):
        x = torch.randn(frames, 17, 8)[:, 1:]
        assert torch.equal(fn(x), plain(x.relu()) + 1)


def test_compile_into_a_buffer(graphs):
    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def fill(x, rows):
        slowfast_aggregate(x, CONFIG, out=rows)

    for frames in (3, 7):
        x, buffer = torch.randn(frames, 16, 8), torch.full((24 + frames * 4 + 2, 8), float("nan"))
        fill(x, buffer[1:-1])
        assert torch.equal(buffer[1:-1], plain(x)) and buffer[[0, -1]].isnan().all()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("pool", ["spatial_1d_max_pool", "spatial_2d_avg_pool"])
def test_compiled_gradient(pool, graphs):
    fn = torch.compile(
        lambda x: slowfast_aggregate(x, layout(pool)).square().sum(),
        fullgraph=True,
        dynamic=True,
        backend=graphs,
    )
    for frames in (3, 6):
        x = torch.randn(frames, 16, 4, requires_grad=True)
        eager = torch.autograd.grad(slowfast_aggregate(x, layout(pool)).square().sum(), x)
        assert torch.equal(*torch.autograd.grad(fn(x), x), *eager)
    assert graphs.frame_count == 1


def test_compiled_packed_videos(graphs):
    fn = torch.compile(
        lambda x, ends: slowfast_aggregate(x, LAYOUT, frame_offsets=ends),
        fullgraph=True,
        dynamic=True,
        backend=graphs,
    )
    for ends in ([0, 2, 5], [0, 1, 4, 9], [0, 3, 4, 7]):
        x, ends = torch.randn(ends[-1], 16, 4), torch.tensor(ends)
        tokens, offsets = fn(x, ends)
        expected, expected_offsets = slowfast_aggregate(x, LAYOUT, frame_offsets=ends)
        assert torch.equal(tokens, expected) and torch.equal(offsets, expected_offsets)


def test_any_pathways_are_a_layout_of_the_op(graphs):
    text = "pool:adaptive3,adaptive2,stride2,mean+rest:each,each,adaptive1,max"
    fn = torch.compile(lambda x: slowfast_aggregate(x, text), fullgraph=True, dynamic=True, backend=graphs)
    for frames in (5, 2, 9):
        x = torch.randn(frames, 16, 8, dtype=torch.float64)
        grid = x.view(frames, 4, 4, 8).permute(3, 0, 1, 2)
        pooled = F.adaptive_avg_pool3d(grid[None], (3, 2, 2))[0].permute(1, 2, 3, 0).reshape(-1, 8)
        rest = grid.amax(3).permute(1, 2, 0).reshape(-1, 8)
        torch.testing.assert_close(fn(x), torch.cat([pooled, rest]))
    assert graphs.frame_count == 1


def test_export_with_dynamic_frames():
    frames = torch.export.Dim("frames", min=1, max=512)
    program = torch.export.export(
        SlowFastAggregator(LAYOUT), (torch.randn(6, 16, 8),), dynamic_shapes={"features": {0: frames}}
    )
    names = [str(node.target) for node in program.graph.nodes]
    assert any("sfllava_fast.aggregate" in name for name in names), names
    for frames in (1, 4, 31):
        x = torch.randn(frames, 16, 8)
        assert torch.equal(program.module()(x), plain(x))


def test_meta_tensors_have_the_right_shape():
    x = torch.empty(50, 576, 4096, device="meta", dtype=torch.bfloat16)
    tokens = slowfast_aggregate(x)
    assert tokens.shape == (3680, 4096) and tokens.dtype == torch.bfloat16 and tokens.is_meta


def test_autocast_leaves_the_dtype_alone():
    x = torch.randn(4, 16, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = slowfast_aggregate(x, LAYOUT)
        hidden = slowfast_aggregate(F.linear(x, torch.randn(8, 8)), LAYOUT)
    assert tokens.dtype == torch.float32 and torch.equal(tokens, plain(x))
    assert hidden.dtype == torch.bfloat16
    hidden.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


def test_the_module():
    x = torch.randn(6, 12, 4)
    module = SlowFastAggregator(LAYOUT, backend="torch", grid=(3, 4))
    assert torch.equal(module(x), plain(x, grid=(3, 4)))
    out = torch.empty(3 * 6 + 6 * 4, 4)
    assert module(x, out=out) is out
    tokens, _ = module(x, frame_offsets=[0, 2, 6])
    assert torch.equal(tokens, slowfast_aggregate(x, LAYOUT, grid=(3, 4), frame_offsets=[0, 2, 6])[0])
    assert not module.state_dict() and LAYOUT in repr(module)


# --- views, buffers, packed videos


def test_out_may_be_rows_of_a_larger_buffer():
    x = torch.randn(5, 16, 8)
    buffer = torch.full((60, 24), float("nan"))
    rows = buffer[7:51, 8:16]
    assert slowfast_aggregate(x, LAYOUT, out=rows) is rows
    assert torch.equal(rows, plain(x))
    rows.fill_(float("nan"))
    assert buffer.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x[::2, 1:],
        lambda x: x[:, 1:, 3:11],
        lambda x: x[2:3, 1:].expand(6, 16, 12),
        lambda x: x[:, 1:2].expand(7, 16, 12),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:],
        lambda x: x[:, 1:, :1],
    ],
    ids=[
        "cls",
        "every other frame",
        "channels",
        "one frame expanded",
        "one patch expanded",
        "patch-major",
        "one channel",
    ],
)
def test_views_are_read_where_they_lie(view, dtype):
    x = view(torch.randn(7, 17, 12).to(dtype))
    assert torch.equal(slowfast_aggregate(x, LAYOUT), plain(x.contiguous()))


def test_no_hidden_copies():
    if reason := registry.load_library():
        pytest.skip(reason)
    # Two numbers' worth of memory behind 8 GB of view: a copy of the input would show, or fail.
    hidden = torch.randn(1, 577, 256)[:, 1:].expand(14000, 576, 256)
    out = torch.empty(3 * 288 + 14000, 256)
    config = SlowFastLayout(3, "spatial_1d_max_pool", (1, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        slowfast_aggregate(hidden[:40], config, out=out[: 3 * 288 + 40])
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert taken < 1 << 16


def test_packed_videos_equal_calls_one_by_one():
    x = torch.randn(10, 17, 8)[:, 1:]
    tokens, offsets = slowfast_aggregate(x, LAYOUT, frame_offsets=torch.tensor([0, 1, 5, 10], dtype=torch.int32))
    apart = [slowfast_aggregate(part, LAYOUT) for part in (x[:1], x[1:5], x[5:])]
    assert torch.equal(tokens, torch.cat(apart))
    assert offsets.dtype == torch.int64 and offsets.tolist() == [0, 28, 68, 112]
    out = torch.empty_like(tokens)
    again, _ = slowfast_aggregate(x, LAYOUT, frame_offsets=[0, 1, 5, 10], out=out)
    assert again is out and torch.equal(out, tokens)


def test_gradient_of_packed_videos_equals_calls_one_by_one():
    x = torch.randn(6, 16, 4, requires_grad=True)
    together = torch.autograd.grad(slowfast_aggregate(x, LAYOUT, frame_offsets=[0, 2, 6])[0].square().sum(), x)
    apart = torch.cat([slowfast_aggregate(part, LAYOUT) for part in (x[:2], x[2:])])
    assert torch.equal(*together, *torch.autograd.grad(apart.square().sum(), x))


def test_no_channels():
    assert slowfast_aggregate(torch.empty(4, 16, 0), LAYOUT).shape == (40, 0)


# --- backends


def test_backends_by_name():
    x = torch.randn(5, 16, 8)
    assert torch.equal(slowfast_aggregate(x, LAYOUT, backend="torch"), plain(x))
    if registry.load_library() is None:
        assert torch.equal(slowfast_aggregate(x, LAYOUT, backend="cpu"), plain(x))
        assert backends.choose("auto", x).name == "cpu"
    assert backends.choose("auto", x.double()).name == "torch"
    assert backends.choose("auto", x.to("meta")).name == "torch"


def test_without_the_library_auto_falls_back_and_says_so_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(registry, "LIBRARY", tmp_path / "_C.so")
    registry.load_library.cache_clear()
    registry.warn_once.cache_clear()
    try:
        x = torch.randn(5, 16, 8)
        with caplog.at_level(logging.WARNING, "sfllava_fast"):
            assert torch.equal(slowfast_aggregate(x, LAYOUT), plain(x))
            slowfast_aggregate(x, LAYOUT)
            slowfast_aggregate(x.double(), LAYOUT)
        assert [record.name for record in caplog.records] == ["sfllava_fast"]
        assert "without _C.so" in caplog.text and "\n" not in caplog.records[0].getMessage()
        with pytest.raises(BackendError, match="without _C.so"):
            slowfast_aggregate(x, LAYOUT, backend="cpu")
    finally:
        monkeypatch.undo()
        registry.load_library.cache_clear()
        registry.warn_once.cache_clear()


def test_a_broken_library_is_a_reason_and_not_a_crash(tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(registry, "LIBRARY", broken)
    registry.load_library.cache_clear()
    try:
        with pytest.raises(BackendError, match="could not be loaded") as error:
            slowfast_aggregate(torch.randn(5, 16, 8), LAYOUT, backend="cpu")
        assert "\n" not in str(error.value)
    finally:
        monkeypatch.undo()
        registry.load_library.cache_clear()


def test_importing_the_package_is_light():
    code = "import sys, sfllava_fast; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sfllava_fast" in loaded
    assert not {"torch", "transformers", "av", "decord", "matplotlib"} & set(loaded)


# --- errors: the right class, one line


X = torch.zeros(4, 16, 8)
OUT = torch.zeros(40, 8)
BAD_CALLS = {
    "2-D": (InputError, lambda: slowfast_aggregate(X[0], LAYOUT)),
    "5-D": (InputError, lambda: slowfast_aggregate(X[None, None], LAYOUT)),
    "a batch with offsets": (InputError, lambda: slowfast_aggregate(X[None], LAYOUT, frame_offsets=[0, 4])),
    "integers": (InputError, lambda: slowfast_aggregate(X.int(), LAYOUT)),
    "booleans": (InputError, lambda: slowfast_aggregate(X.bool(), LAYOUT)),
    "complex": (InputError, lambda: slowfast_aggregate(X.to(torch.complex64), LAYOUT)),
    "no unit stride": (InputError, lambda: slowfast_aggregate(X.transpose(1, 2), LAYOUT, grid=(2, 4))),
    "expanded channels": (InputError, lambda: slowfast_aggregate(X[:, :, :1].expand(4, 16, 8), LAYOUT)),
    "not square": (InputError, lambda: slowfast_aggregate(X[:, 1:], LAYOUT)),
    "the wrong grid": (InputError, lambda: slowfast_aggregate(X, LAYOUT, grid=(3, 5))),
    "a negative grid": (InputError, lambda: slowfast_aggregate(X, LAYOUT, grid=(-4, -4))),
    "no frames": (InputError, lambda: slowfast_aggregate(X[:0], LAYOUT)),
    "no patches": (InputError, lambda: slowfast_aggregate(X[:, :0], LAYOUT)),
    "a small out": (InputError, lambda: slowfast_aggregate(X, LAYOUT, out=OUT[1:])),
    "a large out": (InputError, lambda: slowfast_aggregate(X, LAYOUT, out=torch.zeros(41, 8))),
    "out of 3-D": (InputError, lambda: slowfast_aggregate(X, LAYOUT, out=OUT[None])),
    "out of other channels": (InputError, lambda: slowfast_aggregate(X, LAYOUT, out=OUT[:, 1:])),
    "out of another dtype": (InputError, lambda: slowfast_aggregate(X, LAYOUT, out=OUT.half())),
    "out without unit stride": (InputError, lambda: slowfast_aggregate(X, LAYOUT, out=torch.zeros(8, 40).T)),
    "out with overlapping rows": (
        InputError,
        lambda: slowfast_aggregate(X, LAYOUT, out=OUT[:1].expand(40, 8)),
    ),
    "out over the features": (
        InputError,
        lambda: slowfast_aggregate(X, LAYOUT, out=X.view(-1)[: 40 * 8].view(40, 8)),
    ),
    "out inside the features": (
        InputError,
        lambda: slowfast_aggregate(X[:, :, :4], LAYOUT, out=X.view(64, 8)[:40, :4]),
    ),
    "out that requires grad": (
        InputError,
        lambda: slowfast_aggregate(X, LAYOUT, out=OUT.clone().requires_grad_()),
    ),
    "features that require grad, with out": (
        InputError,
        lambda: slowfast_aggregate(X.clone().requires_grad_(), LAYOUT, out=OUT),
    ),
    "offsets that fall": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[0, 3, 2, 4])),
    "offsets that repeat": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[0, 2, 2, 4])),
    "offsets that start late": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[1, 4])),
    "offsets that end early": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[0, 3])),
    "offsets that end late": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[0, 5])),
    "one offset": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[0])),
    "no offsets": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[])),
    "offsets of floats": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[0.0, 4.0])),
    "offsets of 2-D": (InputError, lambda: slowfast_aggregate(X, LAYOUT, frame_offsets=[[0, 4]])),
    "an unknown layout": (LayoutError, lambda: slowfast_aggregate(X, "slowfast-10")),
    "no layout": (LayoutError, lambda: slowfast_aggregate(X, None)),
    "an unknown backend": (BackendError, lambda: slowfast_aggregate(X, LAYOUT, backend="gpu")),
    "float64 on the cpu backend": (
        BackendError,
        lambda: slowfast_aggregate(X.double(), LAYOUT, backend="cpu"),
    ),
    "meta tensors on the cpu backend": (BackendError, lambda: backends.choose("cpu", X.to("meta"))),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_one_line_of_the_right_class(call):
    expected, run = BAD_CALLS[call]
    with pytest.raises(SfllavaError) as error:
        run()
    assert isinstance(error.value, expected)
    assert str(error.value) and "\n" not in str(error.value)


def test_the_cpu_library_needs_the_library(monkeypatch):
    monkeypatch.setattr(registry, "load_library", lambda: "not built")
    with pytest.raises(BackendError, match="not built"):
        registry.cpu_library()


def test_other_array_types_are_refused():
    with pytest.raises(InputError, match=r"features must be a torch\.Tensor, not list"):
        slowfast_aggregate([[0.0]])


def test_an_out_of_another_device_is_refused():
    features = torch.randn(4, 16, 8)
    with pytest.raises(InputError, match="out must be torch.float32 on cpu, not torch.float32 on meta"):
        slowfast_aggregate(features, CONFIG, out=torch.empty(1, 8, device="meta"))


def test_offsets_on_a_gpu_in_a_capture_are_one_line(monkeypatch):
    offsets = SimpleNamespace(is_cuda=True, tolist=lambda: [0, 4])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ops._ends(offsets) == [0, 4]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="pass a list, or a tensor on the CPU"):
        ops._ends(offsets)


def test_a_backward_notices_that_out_was_written():
    features, config = torch.randn(4, 16, 8), SlowFastLayout(2)
    out = slowfast_aggregate(features, config)
    for _ in range(2):  # the second call is a known one
        leaf = torch.ones_like(out, requires_grad=True)
        product = leaf * out
        slowfast_aggregate(features, config, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    with torch.inference_mode():
        slowfast_aggregate(features, config, out=torch.empty_like(out))


def test_a_grid_that_equals_a_known_one_is_refused():
    features = torch.randn(4, 16, 8)
    for _ in range(2):
        slowfast_aggregate(features, SlowFastLayout(2), grid=(4, 4))
    with pytest.raises(InputError, match="grid must be two integers"):
        slowfast_aggregate(features, SlowFastLayout(2), grid=(4.0, 4.0))


@pytest.mark.parametrize(
    "first, second, shared",
    [
        (slice(0, 4), slice(4, 8), False),
        (slice(0, 5), slice(4, 8), True),
        (slice(0, 8, 2), slice(7, 8), False),
        (slice(0, 8, 2), slice(5, 6), True),  # between two elements: what they reach, not what they touch
        (slice(3, 3), slice(0, 8), False),
        (slice(0, 8), slice(0, 8), True),
    ],
)
def test_what_overlaps(first, second, shared):
    memory = torch.zeros(8, 3)
    assert ops.overlap(memory[first], memory[second]) is ops.overlap(memory[second], memory[first]) is shared


ZEROS = "a:every2,each,stride2,mean,pad9+b:each,adaptive4,adaptive4,mean"


def test_a_call_that_is_known_is_still_checked_for_where_the_tensors_lie():
    memory = torch.zeros(400, 8)
    features, config = memory[:64].view(4, 16, 8), SlowFastLayout(2)
    tokens = slowfast_aggregate(features, config)
    count = len(tokens)
    for _ in range(2):
        assert torch.equal(slowfast_aggregate(features, config, out=memory[64 : 64 + count]), tokens)
        with pytest.raises(InputError, match="out overlaps the features"):
            slowfast_aggregate(features, config, out=memory[63 : 63 + count])
        with pytest.raises(InputError, match="out= requires grad"):
            slowfast_aggregate(features, config, out=torch.zeros(count, 8, requires_grad=True))
        with pytest.raises(InputError, match="grid 2x4 does not fit"):
            slowfast_aggregate(features, config, grid=[2, 4])
    assert slowfast_aggregate(features.clone().requires_grad_(), config).requires_grad
    with torch.no_grad():
        assert torch.equal(slowfast_aggregate(features.clone().requires_grad_(), config), tokens)


@pytest.mark.parametrize("given", [False, True])
def test_a_call_that_is_known_gives_the_same_tokens(given):
    features = torch.randn(9, 64, 8)
    plan = ops.resolve_plan(features, ZEROS)
    for _ in range(3):
        out = torch.full((plan.offsets[-1], 8), 7.0) if given else None
        assert torch.equal(slowfast_aggregate(features, ZEROS, out=out), slowfast_aggregate(features[None], ZEROS)[0])
    assert ops._checked


def test_known_calls_are_bounded_and_hold_no_plan(monkeypatch):
    monkeypatch.setattr(ops, "_MOST_CHECKED", 4)
    monkeypatch.setattr(ops, "_checked", {})
    for frames in range(1, 12):
        slowfast_aggregate(torch.zeros(frames, 16, 8), SlowFastLayout(2))
        assert len(ops._checked) <= 4
    assert all(isinstance(plan, weakref.ref) for plan in ops._checked.values())


@pytest.mark.skipif(bool(registry.load_library()), reason="installed without compiled kernels")
def test_a_table_that_is_changed_where_it_lies_is_checked_again():
    x, plan = torch.randn(3, 16, 8), SlowFastLayout(2).plan(3, (4, 4))
    table, out = backends.plan_table(plan).clone(), torch.zeros(plan.offsets[-1], 8)
    for _ in range(2):
        torch.ops.sfllava_fast.pool(x, table, out)
    assert torch.equal(out, reference.aggregate(x, plan))
    table[-1] += 1000
    with pytest.raises(RuntimeError, match="sfllava_fast: "):
        torch.ops.sfllava_fast.pool(x, table, out)
    with pytest.raises(RuntimeError, match="sfllava_fast: "):
        torch.ops.sfllava_fast.pool(x[:2], backends.plan_table(plan), out)

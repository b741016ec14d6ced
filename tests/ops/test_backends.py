"""Who serves a call on a GPU, and what is said where a backend cannot: without a GPU."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfllava_fast import slowfast_aggregate
from sfllava_fast.errors import BackendError
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import plan_table as table
from sfllava_fast.ops.backends import registry
from sfllava_fast.ops.backends.plan_table import device_table, plan_table

CONFIG = SlowFastLayout(2)
X = torch.zeros(4, 16, 8)
ON_GPU = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def fresh():
    """Reasons are found out once a process: forget them before the test and after it."""
    caches = (
        registry.load_cuda_library,
        registry.load_triton,
        registry.try_on,
        backends._fastest_first,
        registry.warn_once,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backends_refuse_what_they_cannot_read(name):
    with pytest.raises(BackendError, match=f"backend {name} cannot run.*features are on cpu, not on a CUDA device"):
        slowfast_aggregate(X, CONFIG, backend=name)
    with pytest.raises(BackendError, match=r"torch\.float64 is not float32, bfloat16 or float16"):
        backends.choose(name, SimpleNamespace(**vars(ON_GPU) | {"dtype": torch.float64}))


@pytest.mark.parametrize(
    "failing, serves", [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "torch"), (("triton",), "cuda")]
)
def test_auto_on_a_gpu_falls_back_and_says_so_once(fresh, monkeypatch, caplog, failing, serves):
    monkeypatch.setattr(registry, "load_cuda_library", lambda: None)
    monkeypatch.setattr(registry, "load_triton", lambda: None)
    monkeypatch.setattr(
        registry, "try_on", lambda _, name, device: f"it failed on {device}" if name in failing else None
    )
    monkeypatch.setattr(backends, "_time", lambda backend, call: {"cuda": 1.0, "triton": 2.0}[backend.name])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.WARNING, "sfllava_fast"):
        assert [backends.choose("auto", ON_GPU).name for _ in range(3)] == [serves] * 3
    before = [name for name in failing if list(backends.BACKENDS).index(name) < list(backends.BACKENDS).index(serves)]
    messages = [f"backend {name} is not available: it failed on cuda:0; falling back" for name in before]
    assert [record.getMessage() for record in caplog.records] == messages
    for name in failing:
        with pytest.raises(BackendError, match=f"backend {name} cannot run this call: it failed on cuda:0"):
            backends.choose(name, ON_GPU)


PAPER, THREE, FIVE = (SlowFastLayout(fast_grid=(n, n)).plan(50, (24, 24)) for n in (4, 3, 5))


@pytest.fixture
def timed(fresh, monkeypatch):
    """Two GPU backends and the calls that were timed; times by (name, field of the call): a field's value."""
    times, calls = {}, []

    def time(backend, call):
        calls.append((backend.name, call))
        found = [t for (name, what), t in times.items() if name == backend.name and what in vars(call).values()]
        return found[0] if found else math.inf

    for load in ("load_cuda_library", "load_triton"):
        monkeypatch.setattr(registry, load, lambda: None)
    monkeypatch.setattr(registry, "try_on", lambda *_: None)
    monkeypatch.setattr(backends, "_time", time)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return times, calls


def test_auto_takes_the_backend_that_was_faster_on_the_device(timed):
    times, calls = timed
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    times |= {("cuda", first): 1.0, ("triton", first): 2.0, ("cuda", second): 3.0, ("triton", second): 2.0}
    for index, name in enumerate(("cuda", "triton", "cuda")):
        features = SimpleNamespace(**vars(ON_GPU) | {"device": torch.device("cuda", index)})
        assert [backends.choose("auto", features).name for _ in range(3)] == [name] * 3
    assert len(calls) == 6  # once
    on_cpu = SimpleNamespace(is_cpu=True, is_cuda=False, device=torch.device("cpu"), dtype=torch.float32)
    assert backends.choose("auto", on_cpu).name == ("torch" if registry.load_library() else "cpu")


@pytest.mark.skipif(not registry.CUDA_LIBRARY.exists(), reason="installed without CUDA kernels")
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_auto_measures_each_kind_of_layout_dtype_and_direction(timed):
    times, calls = timed
    times |= {
        ("cuda", backends._TILED): 1.0,
        ("triton", backends._TILED): 2.0,
        ("triton", backends._TILED_BY_TRITON): 1.0,
    }
    times |= {("triton", backends._UNTILED): 2.0, ("cuda", backends._UNTILED): 1.0}
    assert backends.choose("auto", ON_GPU, PAPER).name == "cuda"
    assert backends.choose("auto", ON_GPU, THREE).name == "triton"
    assert backends.choose("auto", ON_GPU, FIVE).name == "cuda"
    assert len(calls) == 6
    others = [SlowFastLayout(fast_grid=(n, n)).plan(9, (24, 24)) for n in (2, 12)]  # tiles 12 and 2 patches wide
    assert [backends.choose("auto", ON_GPU, plan).name for plan in others] == ["triton"] * 2
    assert len(calls) == 6  # they are like the 3x3 one
    half = SimpleNamespace(**vars(ON_GPU) | {"dtype": torch.float16})
    backends.choose("auto", half, PAPER), backends.choose("auto", half, PAPER, backward=True)
    assert [(call.dtype, call.backward) for _, call in calls[6:]] == [(torch.float16, False)] * 2 + [
        (torch.float16, True)
    ] * 2


@pytest.mark.skipif(not registry.CUDA_LIBRARY.exists(), reason="installed without CUDA kernels")
@pytest.mark.parametrize("backward", [False, True])
def test_layouts_that_are_measured_are_what_they_stand_for(backward):
    for plan, like in ((PAPER, backends._TILED), (THREE, backends._TILED_BY_TRITON), (FIVE, backends._UNTILED)):
        assert backends._layout_like(plan, backward) is like
    # The self-check's frames: one with fine tokens and one without.
    small = dataclasses.replace(backends._TILED, slow_frames=1).plan(2, (24, 24))
    assert backends._layout_like(small, backward) is backends._TILED


def test_what_cannot_be_timed_comes_last(monkeypatch):
    def fail(features, plan, out):
        raise RuntimeError("it does not compile")

    backend = backends.Backend("x", None, None, fail, fail)
    assert backends._time(backend, backends._Call(torch.device("cpu"), torch.float32)) == math.inf


def test_the_first_call_on_a_device_is_compared_with_the_reference(fresh, monkeypatch):
    def fail(features, plan, out):
        raise RuntimeError("no kernel image is available\nand more lines")

    def run_wrongly(features, plan, out):
        out.fill_(1)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def spread_wrongly(grad, features, plan, out):
        out.fill_(1)

    forward, backward = backends._run_reference, backends._run_reference_backward
    reasons = {
        (fail, backward): "its first call failed on cpu: no kernel image is available",
        (run_wrongly, backward): "self-test failed on cpu: tokens differ from the PyTorch reference",
        (forward, spread_wrongly): "self-test failed on cpu: gradients differ from the PyTorch reference",
        (forward, backward): None,
    }
    for number, (runs, reason) in enumerate(reasons.items()):
        backend = backends.Backend(str(number), lambda device: None, lambda features: None, *runs)
        monkeypatch.setitem(backends.BACKENDS, backend.name, backend)
        assert registry.try_on(backends._check, backend.name, torch.device("cpu")) == reason


def test_what_a_capture_cannot_do_is_an_error_and_not_a_reason(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="make the call once before you capture a CUDA graph"):
        registry.try_on(backends._check, "triton", torch.device("cuda", 0))
    monkeypatch.setattr(backends, "_why_no_gpu", lambda *_: None)
    with pytest.raises(BackendError, match="backend auto has not run such a call on cuda:0 yet"):
        backends.choose("auto", ON_GPU)
    with pytest.raises(BackendError, match="make it once before the capture"):
        table._upload(CONFIG.plan(4, (4, 4)), torch.device("cuda", 0))


def test_cuda_library_reasons(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not built for CUDA" in registry.load_cuda_library()
    registry.load_cuda_library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "without _C_cuda.so (no nvcc, or SFLLAVA_FAST_CUDA=0): " in registry.load_cuda_library()
    registry.load_cuda_library.cache_clear()
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
    reason = registry.load_cuda_library()
    assert reason.startswith("_C_cuda.so could not be loaded: ") and "\n" not in reason


def test_triton_reasons(fresh, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "triton", None)
        assert registry.load_triton() == "triton is not installed"
    pytest.importorskip("triton")
    registry.load_triton.cache_clear()
    assert registry.load_triton() is None
    registry.load_triton.cache_clear()

    def fail():
        raise AttributeError("no such thing\nin this version")

    monkeypatch.setattr(registry, "triton_kernels", fail)
    assert registry.load_triton() == "the Triton kernels could not be imported: no such thing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_that(fresh, monkeypatch):
    monkeypatch.setattr(registry, "load_cuda_library", lambda: None)
    assert backends.BACKENDS["cuda"].why_unavailable(None) == "no CUDA device was found"


def test_the_gpu_kernels_ops_trace():
    plan = CONFIG.plan(4, (4, 4))
    x, out = X.to("meta"), torch.empty(plan.offsets[-1], 8, device="meta")
    tables = plan_table(plan), plan_table(plan).to("meta")
    assert torch.ops.sfllava_fast.pool_gpu(x, *tables, out) is None
    assert torch.ops.sfllava_fast.pool_backward_gpu(out, x, *tables, torch.empty_like(x)) is None


def test_a_table_is_uploaded_outside_of_what_the_callers_thread_records():
    class Seen(TorchDispatchMode):
        ops = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.ops.append(op)
            return op(*args, **kwargs or {})

    plan = SlowFastLayout(3).plan(7, (4, 4))
    plan_table(plan)
    with Seen(), torch.inference_mode():
        uploaded = device_table(plan, torch.device("meta"))
    assert uploaded.device.type == "meta" and not uploaded.is_inference() and not Seen.ops


def test_device_tables_are_cached():
    plan, cpu = CONFIG.plan(4, (4, 4)), torch.device("cpu")
    assert device_table(plan, cpu) is device_table(plan, cpu)
    assert torch.equal(device_table(plan, cpu), plan_table(plan))

"""A fake GPU on the CPU: torch.cuda as CudaTimer uses it, and `rehearse` for the commands of `make gpu`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from bench.gpu import carried, copies, sanitize, tune
from bench.harness import timers
from bench.op import run as op
from bench.op import works
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import registry


class FakeGraph:
    """Replays the calls made during its capture."""

    def replay(self):
        self.calls()


class FakeCuda:
    """torch.cuda as CudaTimer uses it, on the CPU. elapsed: returns the milliseconds between two events."""

    CUDAGraph = FakeGraph

    def __init__(self, elapsed=None, l2=1 << 20, free=1 << 40, captures=True):
        self.elapsed, self.l2, self.free, self.captures, self.requested = elapsed, l2, free, captures, 0
        self.log = []

    def Event(self, enable_timing):
        event = SimpleNamespace(at=0.0)
        event.record = lambda: (self.log.append("event"), setattr(event, "at", time.perf_counter()))
        event.elapsed_time = lambda end: self.elapsed() if self.elapsed else (end.at - event.at) * 1e3
        return event

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        graph.calls = lambda: self.log.append("replay")
        yield
        if not self.captures:
            raise RuntimeError("operation failed due to a previous error during capture")

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=self.l2)

    def memory_stats(self):
        return {"requested_bytes.all.current": 100, "requested_bytes.all.peak": 100 + self.requested}

    def _sleep(self, cycles):
        self.log.append("sleep")

    def mem_get_info(self):
        return self.free, 1 << 40

    def set_stream(self, stream):
        self.log.append(f"stream {stream}")

    def current_stream(self):
        return 7

    def current_device(self):
        return 0

    def synchronize(self):
        pass

    empty_cache = reset_peak_memory_stats = synchronize


# --- the commands of `make gpu`

_SMALLER = 128  # times fewer channels
_NAMES = ("MAIN", "CUDA_WORKS", "SWEEP", "VIDEOS", "ONE_VIDEO")
Set = Callable[[Any, str, Any], None]  # setattr, or pytest's monkeypatch.setattr


def rehearse(set_: Set, set_item: Set) -> None:
    """Make the commands that `bench gpu` starts run on the CPU with few channels.

    The CPU's kernels replace the GPU's kernels, variants and copy kernel.
    """
    _make_works_small(set_)
    set_(timers.CudaTimer, "_WARM_UP", 0)
    set_(timers, "gc", SimpleNamespace(collect=int))  # there is enough memory
    set_(copies, "_LARGE", 1 << 20)
    for name in ("cuda", "triton"):
        set_item(backends.BACKENDS, name, replace(_on_the_cpu(), name=name))
    set_(tune.Variant, "built", True)
    set_(tune.Variant, "run", _run_variant)
    set_item(op.SETUPS, "cuda", _setup)
    set_(sanitize, "main", partial(_small_calls, sanitize.main))


def pretend_a_device(set_: Set) -> None:
    """Fake the device that `bench gpu` queries, and the libraries built for it."""
    fake = FakeCuda()
    for name in ("get_device_properties", "mem_get_info", "current_device"):
        set_(torch.cuda, name, getattr(fake, name))
    set_(torch.cuda, "is_available", lambda: True)
    set_(torch.cuda, "get_device_name", lambda: "Rehearsal")
    set_(torch.cuda, "get_device_capability", lambda: (9, 0))
    set_(carried, "why_not", lambda arch: None)
    set_(carried, "install", list)
    _make_works_small(set_)  # the steps contain names of works


def _make_works_small(set_: Set) -> None:
    for name in _NAMES:
        found = getattr(works, name)
        set_(works, name, _small(found) if isinstance(found, works.OpWork) else tuple(map(_small, found)))


def _small(work: works.OpWork) -> works.OpWork:
    return replace(work, channels=work.channels // _SMALLER)


def _setup() -> op.DeviceSetup:
    ours = ("cuda",) if registry.load_triton() else ("cuda", "triton")
    both = {"copy_": copies.torch_copy, copies.KERNEL: copies.torch_copy}
    timer = timers.CudaTimer(FakeCuda(l2=1 << 12))  # two sets of everything
    return op.DeviceSetup("cpu", works.CUDA_WORKS, ours, (), timer, compile_mode="default", copies=both)


def _run_variant(variant: tune.Variant, work: works.OpWork, features, tokens, gradient) -> None:
    if gradient is None:
        _on_the_cpu().run(features, work.plan, tokens)
    else:
        _on_the_cpu().run_backward(tokens, features, work.plan, gradient)


def _on_the_cpu() -> backends.Backend:
    return backends.BACKENDS["torch" if registry.load_library() else "cpu"]


def _small_calls(main: Callable[[str, bool], int], device: str, main_works: bool) -> int:
    return main("cpu", main_works)

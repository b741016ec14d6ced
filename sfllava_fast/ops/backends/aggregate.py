"""Backends of the aggregator: the C++, CUDA and Triton kernels, and the PyTorch reference.

`auto` takes the first backend that can run a call, on a GPU the fastest there. A named backend runs the call or raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from ...layouts.plan import Plan, kept_with_plan
from ...layouts.slowfast import SlowFastLayout
from . import reference, registry
from .plan_table import device_table, plan_table
from .registry import KERNEL_DTYPES, unfit_dtype

_ON_GPU = ("cuda", "triton")
# Layouts for which both GPU backends have tiles, only Triton has, and neither has, because the bins overlap.
_TILED, _TILED_BY_TRITON, _UNTILED = (SlowFastLayout(fast_grid=(n, n)) for n in (4, 3, 5))
_GRID = (24, 24)


@dataclass(frozen=True)
class Backend(registry.Backend):
    """A way to compute the aggregator."""

    run: Callable[[Tensor, Plan, Tensor], None]  # features [T, N, D], plan, out [S, D]
    run_backward: Callable[[Tensor, Tensor, Plan, Tensor], None]  # grad [S, D], features, plan, out [T, N, D]


def _unfit_for_cpu(features: Tensor) -> str | None:
    return unfit_dtype(features) if features.is_cpu else f"features are on {features.device}, not on the CPU"


def _unfit_for_gpu(features: Tensor) -> str | None:
    if not features.is_cuda:
        return f"features are on {features.device}, not on a CUDA device"
    return unfit_dtype(features)


def _run_cpu(features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool.default(features, plan_table(plan), out)


def _run_cpu_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool_backward.default(grad, features, plan_table(plan), out)


def _run_cuda(features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool_gpu.default(features, *_gpu_tables(features, plan), out)


def _run_cuda_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool_backward_gpu.default(grad, features, *_gpu_tables(features, plan), out)


def _run_triton(features: Tensor, plan: Plan, out: Tensor) -> None:
    registry.triton_kernels().pool(features, plan, *_gpu_tables(features, plan), out)


def _run_triton_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    registry.triton_kernels().pool_backward(grad, features, plan, *_gpu_tables(features, plan), out)


def _gpu_tables(features: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return plan_table(plan), device_table(plan, features.device)


def _run_reference(features: Tensor, plan: Plan, out: Tensor) -> None:
    out.copy_(reference.aggregate(features, plan))


def _run_reference_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    out.copy_(reference.aggregate_backward(grad, features, plan))


def _why_no_gpu(name: str, not_loaded: str | None, device: torch.device | None) -> str | None:
    if not_loaded:
        return not_loaded
    if device is None:
        if not torch.cuda.is_available():
            return "no CUDA device was found"
        device = torch.device("cuda", torch.cuda.current_device())
    return registry.try_on(_check, name, device)


def _check(name: str, device: torch.device) -> str | None:
    return next(filter(None, (_compare(BACKENDS[name], like, device) for like in (_TILED, _UNTILED))), None)


def _compare(backend: Backend, layout: SlowFastLayout, device: torch.device) -> str | None:
    plan = replace(layout, slow_frames=1).plan(2, _GRID)
    features = torch.arange(2 * 576 * 40, dtype=torch.float32, device=device).sin().view(2, 576, 40)
    tokens, gradient = features.new_empty(plan.offsets[-1], 40), torch.empty_like(features)
    backend.run(features, plan, tokens)
    backend.run_backward(tokens, features, plan, gradient)
    if not torch.equal(tokens, reference.aggregate(features, plan)):
        return f"self-test failed on {device}: tokens differ from the PyTorch reference"
    if not torch.equal(gradient, reference.aggregate_backward(tokens, features, plan)):
        return f"self-test failed on {device}: gradients differ from the PyTorch reference"
    return None


@dataclass(frozen=True)
class _Call:
    """What decides which backend is the fastest on a GPU."""

    device: torch.device
    dtype: torch.dtype
    like: SlowFastLayout = _TILED  # the one of the three layouts above that has the same kernels
    backward: bool = False


def _by_preference(features: Tensor, plan: Plan | None, backward: bool) -> Iterable[Backend]:
    """All backends; if both work on the GPU, sorted by the time that such calls take."""
    if not features.is_cuda or features.dtype not in KERNEL_DTYPES:
        return BACKENDS.values()
    if any(BACKENDS[name].why_unavailable(features.device) for name in _ON_GPU):
        return BACKENDS.values()
    like = _layout_like(plan, backward) if plan else _TILED
    return _fastest_first(_Call(features.device, features.dtype, like, backward))


@kept_with_plan
def _layout_like(plan: Plan, backward: bool) -> SlowFastLayout:
    table, path = plan_table(plan), registry.cuda_library().sfllava_cuda_path
    if path(table.data_ptr(), table.numel(), backward) == b"tile":
        return _TILED
    tiling = registry.triton_kernels().find_tiling(plan)
    return _TILED_BY_TRITON if tiling and (tiling.whole or not backward) else _UNTILED


@cache
def _fastest_first(call: _Call) -> tuple[Backend, ...]:
    registry.refuse_to_be_captured("auto", call.device)
    times = {name: _time(BACKENDS[name], call) for name in _ON_GPU}
    return tuple(sorted(BACKENDS.values(), key=lambda backend: times.get(backend.name, math.inf)))


def _time(backend: Backend, call: _Call) -> float:
    """Milliseconds of 20 calls at an encoder's usual shape, which take the device longer than the host."""
    plan = call.like.plan(50, _GRID)
    try:
        features = torch.randn(50, 576, 2048, dtype=call.dtype, device=call.device)
        tokens = torch.randn(plan.offsets[-1], 2048, dtype=call.dtype, device=call.device)
        run = partial(backend.run, features, plan, tokens)
        if call.backward:
            run = partial(backend.run_backward, tokens, features, plan, torch.empty_like(features))
        with torch.cuda.device(call.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for number in range(25):
                if number == 5:
                    start.record()
                run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end)
    except Exception:  # no memory to measure in, a kernel that does not compile: the other one is preferred
        return math.inf


def _why_no_cuda(device: torch.device | None) -> str | None:
    return _why_no_gpu("cuda", registry.load_cuda_library(), device)


def _why_no_triton(device: torch.device | None) -> str | None:
    return _why_no_gpu("triton", registry.load_triton(), device)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", lambda device: registry.load_library(), _unfit_for_cpu, _run_cpu, _run_cpu_backward),
        Backend("cuda", _why_no_cuda, _unfit_for_gpu, _run_cuda, _run_cuda_backward),
        Backend("triton", _why_no_triton, _unfit_for_gpu, _run_triton, _run_triton_backward),
        Backend("torch", lambda device: None, lambda features: None, _run_reference, _run_reference_backward),
    )
}
NAMES = ("auto", *BACKENDS)
check_name = partial(registry.check_name, names=NAMES)


def choose(name: str, features: Tensor, plan: Plan | None = None, backward: bool = False) -> Backend:
    """The backend for a call on these features; BackendError if the named one cannot run it.

    plan, backward: of the call, for which `auto` takes the fastest backend; None means the default layout.
    """
    if type(name) is not str or name not in NAMES:  # a check that calls nothing, for every call of the op
        check_name(name)
    order = _by_preference(features, plan, backward) if name == "auto" else (BACKENDS[name],)
    return registry.choose(name, order, features)

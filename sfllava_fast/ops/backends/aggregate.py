"""Who computes the aggregator: each backend says whether it can, and why not.

`auto` takes the first backend that can serve a call, on a GPU the fastest there; a backend asked for by name serves it
or raises.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ...errors import BackendError, first_line
from ...installed_parts import import_part
from ...layouts.plan import Plan, kept_with_plan
from ...layouts.slowfast import SlowFastLayout
from . import reference
from .plan_table import device_table, plan_table

log = logging.getLogger("sfllava_fast")

LIBRARY = Path(__file__).parents[2] / "_C.so"
CUDA_LIBRARY = Path(__file__).parents[2] / "_C_cuda.so"
_OLDEST_TORCH = (2, 10)  # the first whose stable ABI has everything csrc/torch calls
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ON_GPU = ("cuda", "triton")
# Layouts that both GPU backends serve by tiles, that Triton alone does, and that neither does: its bins overlap.
_TILED, _TILED_BY_TRITON, _UNTILED = (SlowFastLayout(fast_grid=(n, n)) for n in (4, 3, 5))
_GRID = (24, 24)


@dataclass(frozen=True)
class Backend:
    """A way to compute the aggregator. The reasons are None where nothing is in the way."""

    name: str
    why_unavailable: Callable[[torch.device | None], str | None]  # on this device; None: on any of this machine
    why_unfit: Callable[[Tensor], str | None]
    run: Callable[[Tensor, Plan, Tensor], None]  # features [T, N, D], plan, out [S, D]
    run_backward: Callable[[Tensor, Tensor, Plan, Tensor], None]  # grad [S, D], features, plan, out [T, N, D]


@cache
def load_library() -> str | None:
    """Loads the compiled CPU kernels into torch, once; the reason where that cannot be."""
    return _load(LIBRARY, "C++ compiler, such as g++", "SFLLAVA_FAST_CPU")


@cache
def load_cuda_library() -> str | None:
    """Loads the compiled CUDA kernels into torch, once; the reason where that cannot be."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is not built for CUDA"
    return _load(CUDA_LIBRARY, "nvcc", "SFLLAVA_FAST_CUDA")


def _load(library: Path, compiler: str, setting: str) -> str | None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return f"torch {torch.__version__} lacks the stable ABI of torch 2.10"
    if not library.exists():
        return _why_missing(library, compiler, setting)
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library.name} could not be loaded: {first_line(error)}"
    return None


def _why_missing(library: Path, compiler: str, setting: str) -> str:
    tree = library.parents[1]
    if (tree / "setup.py").exists():  # on the path before what is installed, if Python was started in it
        return (
            f"the source tree {tree} was imported, and {library.name} is not built in it: `pip install -e {tree}` "
            "builds it; if the package is installed, start Python in another folder, where the benchmark is "
            "`python -m sfllava_fast._bench`"
        )
    return f"the package was installed without {library.name} (no {compiler}, or {setting}=0): install both"


@cache
def load_triton() -> str | None:
    """Imports the Triton kernels, once; the reason where that cannot be."""
    if util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        triton_kernels()
    except Exception as error:  # a package of another version, or half of one, fails in its own way
        return f"the Triton kernels could not be imported: {first_line(error)}"
    return None


def triton_kernels() -> ModuleType:
    """kernels/triton, installed as `sfllava_fast._triton`."""
    return import_part("_triton", "kernels/triton")


def cpu_library() -> ctypes.CDLL:
    """The loaded kernels' C functions: `sfllava_isa`, `sfllava_tuning`, `sfllava_tuned_for`, those that force one."""
    if reason := load_library():
        raise BackendError(f"backend cpu: {reason}")
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("isa", "tuning", "tuned_for"):
        getattr(library, f"sfllava_{name}").restype = ctypes.c_char_p
    for force in (library.sfllava_force_isa, library.sfllava_force_tuning):
        force.argtypes, force.restype = [ctypes.c_char_p], ctypes.c_bool
    return library


def _unfit_for_cpu(features: Tensor) -> str | None:
    return _unfit_dtype(features) if features.is_cpu else f"features are on {features.device}, not on the CPU"


def _unfit_for_gpu(features: Tensor) -> str | None:
    return _unfit_dtype(features) if features.is_cuda else f"features are on {features.device}, not on a CUDA device"


def _unfit_dtype(features: Tensor) -> str | None:
    return None if features.dtype in _KERNEL_DTYPES else f"{features.dtype} is not float32, bfloat16 or float16"


def _run_cpu(features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool.default(features, plan_table(plan), out)


def _run_cpu_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool_backward.default(grad, features, plan_table(plan), out)


def _run_cuda(features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool_gpu.default(features, *_gpu_tables(features, plan), out)


def _run_cuda_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool_backward_gpu.default(grad, features, *_gpu_tables(features, plan), out)


def _run_triton(features: Tensor, plan: Plan, out: Tensor) -> None:
    triton_kernels().pool(features, plan, *_gpu_tables(features, plan), out)


def _run_triton_backward(grad: Tensor, features: Tensor, plan: Plan, out: Tensor) -> None:
    triton_kernels().pool_backward(grad, features, plan, *_gpu_tables(features, plan), out)


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
    return _try_on(name, device)


@cache
def _try_on(name: str, device: torch.device) -> str | None:
    """Why a backend fails on a GPU, from its first, small call there: a compiler that is missing, no code for it."""
    refuse_to_be_captured(name, device)
    try:
        return next(filter(None, (_compare(BACKENDS[name], like, device) for like in (_TILED, _UNTILED))), None)
    except Exception as error:  # compilers, drivers and loaders fail in many ways, and auto has to live with all
        return f"it failed on {device}: {first_line(error)}"


def _compare(backend: Backend, layout: SlowFastLayout, device: torch.device) -> str | None:
    plan = replace(layout, slow_frames=1).plan(2, _GRID)
    features = torch.arange(2 * 576 * 40, dtype=torch.float32, device=device).sin().view(2, 576, 40)
    tokens, gradient = features.new_empty(plan.offsets[-1], 40), torch.empty_like(features)
    backend.run(features, plan, tokens)
    backend.run_backward(tokens, features, plan, gradient)
    if not torch.equal(tokens, reference.aggregate(features, plan)):
        return f"its tokens are wrong on {device}"
    if not torch.equal(gradient, reference.aggregate_backward(tokens, features, plan)):
        return f"its gradients are wrong on {device}"
    return None


def refuse_to_be_captured(name: str, device: torch.device) -> None:
    if torch.cuda.is_current_stream_capturing():
        what = f"backend {name} has not served such a call on {device} yet"
        raise BackendError(f"{what}: make it once before you capture a CUDA graph")


@dataclass(frozen=True)
class _Call:
    """What decides which backend is the fastest on a GPU."""

    device: torch.device
    dtype: torch.dtype
    like: SlowFastLayout = _TILED  # which of the above the layout resembles
    backward: bool = False


def _by_preference(features: Tensor, plan: Plan | None, backward: bool) -> Iterable[Backend]:
    """All backends; where several work on a GPU, the one first that serves such calls in the least time."""
    if not features.is_cuda or features.dtype not in _KERNEL_DTYPES:
        return BACKENDS.values()
    if any(BACKENDS[name].why_unavailable(features.device) for name in _ON_GPU):
        return BACKENDS.values()
    like = _layout_like(plan, backward) if plan else _TILED
    return _fastest_first(_Call(features.device, features.dtype, like, backward))


@kept_with_plan
def _layout_like(plan: Plan, backward: bool) -> SlowFastLayout:
    table, path = plan_table(plan), _cuda_library().sfllava_cuda_path
    if path(table.data_ptr(), table.numel(), backward) == b"tile":
        return _TILED
    tiling = triton_kernels().find_tiling(plan)
    return _TILED_BY_TRITON if tiling and (tiling.whole or not backward) else _UNTILED


@cache
def _cuda_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.sfllava_cuda_path.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool]
    library.sfllava_cuda_path.restype = ctypes.c_char_p
    return library


@cache
def _fastest_first(call: _Call) -> tuple[Backend, ...]:
    refuse_to_be_captured("auto", call.device)
    times = {name: _time(BACKENDS[name], call) for name in _ON_GPU}
    return tuple(sorted(BACKENDS.values(), key=lambda backend: times.get(backend.name, math.inf)))


def _time(backend: Backend, call: _Call) -> float:
    """Milliseconds of 20 calls at an encoder's usual shape, which keep the device busier than the host."""
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
    return _why_no_gpu("cuda", load_cuda_library(), device)


def _why_no_triton(device: torch.device | None) -> str | None:
    return _why_no_gpu("triton", load_triton(), device)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", lambda device: load_library(), _unfit_for_cpu, _run_cpu, _run_cpu_backward),
        Backend("cuda", _why_no_cuda, _unfit_for_gpu, _run_cuda, _run_cuda_backward),
        Backend("triton", _why_no_triton, _unfit_for_gpu, _run_triton, _run_triton_backward),
        Backend("torch", lambda device: None, lambda features: None, _run_reference, _run_reference_backward),
    )
}
NAMES = ("auto", *BACKENDS)


def check_name(name: object) -> None:
    """BackendError for what is no backend's name, available or not."""
    if not isinstance(name, str):
        raise BackendError(f"backend must be a name, one of {', '.join(NAMES)}, not {type(name).__name__}")
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(NAMES)}")


def choose(name: str, features: Tensor, plan: Plan | None = None, backward: bool = False) -> Backend:
    """The backend that serves these features; BackendError where the one asked for cannot.

    plan, backward: of the call, by which `auto` takes the fastest; None: of the default layout.
    """
    check_name(name)
    if name == "auto":
        for backend in _by_preference(features, plan, backward):
            if not _why_not(backend, features, say=True):
                return backend  # the last one, the reference, serves everything
    if reason := _why_not(BACKENDS[name], features):
        raise BackendError(f"backend {name} cannot serve this call: {reason}; use backend='auto'")
    return BACKENDS[name]


def _why_not(backend: Backend, features: Tensor, say: bool = False) -> str | None:
    if unfit := backend.why_unfit(features):
        return unfit
    unavailable = backend.why_unavailable(features.device)
    if unavailable and say:
        say_once(backend.name, unavailable)
    return unavailable


@cache
def say_once(name: str, reason: str) -> None:
    log.warning("backend %s is not available: %s; falling back", name, reason)

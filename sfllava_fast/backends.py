"""Who computes the aggregator: each backend says whether it can, and why not.

`auto` takes the first backend that can serve a call; a backend asked for by name serves it or raises.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .config import Plan
from .errors import BackendError
from .table import plan_table

log = logging.getLogger("sfllava_fast")

LIBRARY = Path(__file__).parent / "_C.so"
_OLDEST_TORCH = (2, 10)  # the first whose stable ABI has everything csrc/torch calls


@dataclass(frozen=True)
class Backend:
    """A way to compute the aggregator. The reasons are None where nothing is in the way."""

    name: str
    why_unavailable: Callable[[], str | None]
    why_unfit: Callable[[Tensor], str | None]
    run: Callable[[Tensor, Plan, Tensor], None]  # features, plan, out


@cache
def load_library() -> str | None:
    """Loads the compiled kernels into torch, once; the reason where that cannot be."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return f"torch {torch.__version__} lacks the stable ABI of torch 2.10"
    if not LIBRARY.exists():
        return "the package was installed without compiled kernels (no C++ compiler then, or SFLLAVA_FAST_CPU=0)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} could not be loaded: {str(error).splitlines()[0]}"
    return None


def cpu_library() -> ctypes.CDLL:
    """The loaded kernels' C functions: `sfllava_isa`, `sfllava_force_isa`."""
    if reason := load_library():
        raise BackendError(f"backend cpu: {reason}")
    library = ctypes.CDLL(str(LIBRARY))
    library.sfllava_isa.restype = ctypes.c_char_p
    library.sfllava_force_isa.argtypes = [ctypes.c_char_p]
    library.sfllava_force_isa.restype = ctypes.c_bool
    return library


def _cpu_unfit(features: Tensor) -> str | None:
    if features.device.type != "cpu":
        return f"features are on {features.device}, not on the CPU"
    if features.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{features.dtype} is not float32, bfloat16 or float16"
    return None


def _run_cpu(features: Tensor, plan: Plan, out: Tensor) -> None:
    torch.ops.sfllava_fast.pool(features, plan_table(plan), out)


def _run_reference(features: Tensor, plan: Plan, out: Tensor) -> None:
    out.copy_(reference.aggregate(features, plan))


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", load_library, _cpu_unfit, _run_cpu),
        Backend("torch", lambda: None, lambda features: None, _run_reference),
    )
}
NAMES = ("auto", *BACKENDS)


def choose(name: str, features: Tensor) -> Backend:
    """The backend that serves these features; BackendError where the one asked for cannot."""
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if not _why_not(backend, features, say=True))
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(NAMES)}")
    if reason := _why_not(BACKENDS[name], features):
        raise BackendError(f"backend {name} cannot serve this call: {reason}; use backend='auto'")
    return BACKENDS[name]


def _why_not(backend: Backend, features: Tensor, say: bool = False) -> str | None:
    if unfit := backend.why_unfit(features):
        return unfit
    unavailable = backend.why_unavailable()
    if unavailable and say:
        _say_once(backend.name, unavailable)
    return unavailable


@cache
def _say_once(name: str, reason: str) -> None:
    log.warning("backend %s is not available: %s; falling back", name, reason)

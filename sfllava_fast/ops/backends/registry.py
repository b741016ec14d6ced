"""What the backends of every op share: compiled code is loaded, chosen, and checked at its first use on a device."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import BackendError, first_line
from ...installed_parts import import_part

log = logging.getLogger("sfllava_fast")

LIBRARY = Path(__file__).parents[2] / "_C.so"
CUDA_LIBRARY = Path(__file__).parents[2] / "_C_cuda.so"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TORCH = (2, 10)  # the first whose stable ABI has everything csrc/torch calls


@dataclass(frozen=True)
class Backend:
    """A way to run ops. Each reason is None if there is no obstacle.

    Attributes:
        name: "torch" for the reference, which runs every call.
        why_unavailable: why it cannot run on this device (None: on any device of this machine).
        why_unfit: why it cannot read such a tensor on any machine.
    """

    name: str
    why_unavailable: Callable[[torch.device | None], str | None]
    why_unfit: Callable[[Tensor], str | None]


AnyBackend = TypeVar("AnyBackend", bound=Backend)


def check_name(name: object, names: Iterable[str], op: str = "") -> None:
    """BackendError unless it is one of the names, whether available or not."""
    if not isinstance(name, str):
        raise BackendError(f"backend must be a name, one of {', '.join(names)}, not {type(name).__name__}")
    if name not in names:
        raise BackendError(f"unknown backend {name!r}{op}: choose one of {', '.join(names)}")


def choose(name: str, backends: Iterable[AnyBackend], tensor: Tensor, unfit: str | None = None) -> AnyBackend:
    """The named backend, or for "auto" the first that can run the call; those that are unavailable are logged once.

    unfit: why no kernel can run the call, or None. Raises BackendError if no backend is left.
    """
    reason: str | None = "no backend is left"
    for backend in backends:
        obstacle = backend.why_unfit(tensor) or (unfit if backend.name != "torch" else None)
        reason = obstacle or backend.why_unavailable(tensor.device)
        if not reason:
            return backend
        if name == "auto" and not obstacle:
            warn_once(backend.name, reason)
    raise BackendError(f"backend {name} cannot run this call: {reason}; use backend='auto'")


@cache
def warn_once(name: str, reason: str) -> None:
    log.warning("backend %s is not available: %s; falling back", name, reason)


@cache
def try_on(check: Callable[[str, torch.device], str | None], name: str, device: torch.device) -> str | None:
    """Why a backend fails its first calls on a GPU, by `check`, which compares them with the reference; None if not."""
    refuse_to_be_captured(name, device)
    try:
        return check(name, device)
    except Exception as error:  # compilers, drivers and loaders fail in many ways; auto falls back after all of them
        return f"its first call failed on {device}: {first_line(error)}"


def refuse_to_be_captured(name: str, device: torch.device | str) -> None:
    """BackendError inside the capture of a CUDA graph, which cannot hold the loading of a kernel."""
    if torch.cuda.is_current_stream_capturing():
        what = f"backend {name} has not run such a call on {device} yet"
        raise BackendError(f"{what}: make the call once before you capture a CUDA graph")


def unfit_dtype(tensor: Tensor) -> str | None:
    """Why kernels cannot read a tensor of this dtype; None if they can."""
    return None if tensor.dtype in KERNEL_DTYPES else f"{tensor.dtype} is not float32, bfloat16 or float16"


@cache
def load_library() -> str | None:
    """Loads the compiled CPU kernels into torch, once; the reason if that fails."""
    return _load(LIBRARY, "C++ compiler, such as g++", "SFLLAVA_FAST_CPU")


@cache
def load_cuda_library() -> str | None:
    """Loads the compiled CUDA kernels into torch, once; the reason if that fails."""
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
    if (tree / "setup.py").exists():  # Python was started in the source tree, which hides the installed package
        return (
            f"the source tree {tree} was imported, and {library.name} is not built in it: `pip install -e {tree}` "
            "builds it; if the package is installed, start Python in another folder, where the benchmark is "
            "`python -m sfllava_fast._bench`"
        )
    return f"the package was installed without {library.name} (no {compiler}, or {setting}=0): install both"


@cache
def load_triton() -> str | None:
    """Imports the Triton kernels, once; the reason if that fails."""
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
    """C functions of the CPU kernels: `sfllava_isa`, `sfllava_tuning`, `sfllava_tuned_for`, and two that force one."""
    if reason := load_library():
        raise BackendError(f"backend cpu: {reason}")
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("isa", "tuning", "tuned_for"):
        getattr(library, f"sfllava_{name}").restype = ctypes.c_char_p
    for force in (library.sfllava_force_isa, library.sfllava_force_tuning):
        force.argtypes, force.restype = [ctypes.c_char_p], ctypes.c_bool
    return library


@cache
def cuda_library() -> ctypes.CDLL:
    """C function of the CUDA kernels: `sfllava_cuda_path`."""
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.sfllava_cuda_path.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool]
    library.sfllava_cuda_path.restype = ctypes.c_char_p
    return library

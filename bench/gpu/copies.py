"""Copies, the limit of a memory-bound operator: torch's, and on a GPU our own kernel.

They copy random data; of the bytes moved half are read and half written.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..harness.record import BUILT
from ..harness.timers import CudaTimer, Run

KERNEL = "copy kernel"
LIBRARY = BUILT / "bench/copy.so"
_LARGE = 4 << 30  # bytes of a tensor
_LARGE_ROUNDS = 7
# bytes moved by a call, sets of tensors, device
Copy = Callable[[int, int, str], Run]


def torch_copy(size: int, sets: int, device: str) -> Run:
    pairs = _pairs(size, sets, device)
    return lambda number: pairs[number][1].copy_(pairs[number][0])


def gpu_copies() -> tuple[dict[str, Copy], dict[str, str]]:
    """The available copies, and why others are unavailable."""
    copies: dict[str, Copy] = {"copy_": torch_copy}
    if not LIBRARY.exists():
        return copies, {KERNEL: f"{LIBRARY.name} was not built: make gpu-build"}
    return copies | {KERNEL: kernel_copy}, {}


def kernel_copy(size: int, sets: int, device: str) -> Run:
    pairs = _pairs(size, sets, device)
    return lambda number: _copy_on_gpu(*pairs[number])


def large_copy(timer: CudaTimer, device: str) -> float:
    """GB/s, read and written, of a copy_ of gigabytes, for which launch time and caches are negligible."""
    moved = 2 * _LARGE
    if reason := timer.why_no_room(moved):
        raise RuntimeError(reason)
    copy = timer.prepare(torch_copy(moved, 1, device), 1, capture=False)
    return moved / statistics.median(timer.times({"copy": copy}, _LARGE_ROUNDS)["copy"]) / 1e9


def _pairs(size: int, sets: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Sets of (source, target)."""
    generator = torch.Generator(device).manual_seed(0)  # a failed capture breaks the default generator
    return [tuple(torch.randn(size // 8, device=device, generator=generator) for _ in range(2)) for _ in range(sets)]


def _copy_on_gpu(source: Tensor, target: Tensor) -> None:
    stream = torch.cuda.current_stream().cuda_stream  # the current one: a capture uses its own
    raise_reason(_library()(source.data_ptr(), target.data_ptr(), source.nbytes, stream))


@cache
def _library() -> Callable[..., bytes | None]:
    return c_function(LIBRARY, "sfllava_copy", ["pointer", "pointer", "int64", "pointer"])


def c_function(library: Path, name: str, arguments: list[str]) -> Callable[..., bytes | None]:
    """A C function that returns the reason of a failure, or null."""
    types = {"pointer": ctypes.c_void_p, "int64": ctypes.c_int64, "int": ctypes.c_int}
    function = getattr(ctypes.CDLL(str(library)), name)
    function.argtypes, function.restype = [types[kind] for kind in arguments], ctypes.c_char_p
    return function


def raise_reason(reason: bytes | None) -> None:
    if reason:
        raise RuntimeError(reason.decode())

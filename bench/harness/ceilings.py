"""The device's measured limits: a large matrix product in the run's dtype, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_CALLS = {"cpu": 1, "cuda": 10}


class Ceilings:
    """FLOP/s and bytes/s, one pair for each call of `measure`, which frees its tensors."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.gemm: list[float] = []
        self.copy: list[float] = []

    def measure(self) -> None:
        self.gemm.append(self._gemm())
        self.copy.append(self._copy())

    def _gemm(self) -> float:
        side = _GEMM_SIDE[self.device.type]
        left, right = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * side**3 / self._seconds(lambda: torch.mm(left, right, out=out))

    def _copy(self) -> float:
        size = _COPY_BYTES[self.device.type]
        source, target = (torch.ones(size // 8, device=self.device) for _ in range(2))
        return size / self._seconds(lambda: target.copy_(source))

    def _seconds(self, call: Callable[[], object]) -> float:
        calls = _CALLS[self.device.type]
        call()
        start = self._now()
        for _ in range(calls):
            call()
        return (self._now() - start) / calls

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

"""Paired timing: every contender runs once per round, in one process, and ratios are taken round by round.

On shared machines times drift, but ratios of calls close in time stay comparable.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[int], Any]  # a call on one of the sets of tensors, by number


@dataclass(frozen=True)
class Sample:
    """Calls that are timed as a whole.

    Attributes:
        run: Makes all calls.
        calls: Their number.
        graph: Whether they are captured in a CUDA graph; None on a CPU.
    """

    run: Callable[[], Any]
    calls: int = 1
    graph: bool | None = None


class CpuTimer:
    """Times single calls, each after evicting the caches."""

    _EVICT_BYTES = 96 << 20

    def __init__(self, warm_up: int = 2) -> None:
        self._warm_up = warm_up  # rounds

    def sets(self, size: int) -> int:
        return 1

    def why_no_room(self, size: int) -> str | None:
        return None

    def prepare(self, run: Run, sets: int, capture: bool = True) -> Sample:
        return Sample(lambda: run(0))

    def times(self, samples: dict[str, Sample], rounds: int) -> dict[str, list[float]]:
        """Seconds per call of each contender in each round; the order is random."""
        evict = torch.zeros(self._EVICT_BYTES, dtype=torch.uint8)
        times: dict[str, list[float]] = {name: [] for name in samples}
        order = random.Random(0)
        for round_ in range(-self._warm_up, rounds):
            # A new order each time: a call's speed depends on the memory that the previous one used.
            for name, sample in order.sample([*samples.items()], len(samples)):
                evict.add_(1)
                start = time.perf_counter()
                sample.run()
                if round_ >= 0:
                    times[name].append(time.perf_counter() - start)
        return times

    def synchronize(self) -> None:
        pass

    def memory_growth(self, call: Callable[[], Any]) -> int | None:
        return None


class CudaTimer:
    """Times CUDA graphs of calls that rotate over sets of tensors, together larger than the L2, between two events.

    Args:
        cuda: torch.cuda, or a fake one in tests.
    """

    _LEAST_CALLS = 8  # so that the launch of a graph is a small part of a sample
    _HEAD_START = 2_000_000  # cycles, about a millisecond, in which the queue fills before the first event
    _WARM_UP = 0.2  # seconds, in which the clocks rise

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda

    def sets(self, size: int) -> int:
        """Number of sets of `size` bytes, so that three times the L2 is accessed before a set is used again."""
        cache = self._cuda.get_device_properties(self._cuda.current_device()).L2_cache_size
        return 1 + max(1, math.ceil(3 * cache / size))

    def why_no_room(self, size: int) -> str | None:
        gc.collect()
        self._cuda.empty_cache()
        free = self._cuda.mem_get_info()[0]
        return None if size <= free else f"needs {size / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free"

    def prepare(self, run: Run, sets: int, capture: bool = True) -> Sample:
        """The calls of a sample, in a CUDA graph if they can be captured."""
        calls = sets * math.ceil(self._LEAST_CALLS / sets)
        for number in range(sets):  # compilation, tuning and uploads cannot be captured
            run(number)

        def run_all() -> None:
            for call in range(calls):
                run(call % sets)

        graph = self._capture(run_all) if capture else None
        return Sample(graph.replay, calls, True) if graph else Sample(run_all, calls, False)

    def _capture(self, run_all: Callable[[], None]) -> Any | None:
        stream = self._cuda.current_stream()
        graph = self._cuda.CUDAGraph()
        self._cuda.synchronize()
        try:
            with self._cuda.graph(graph, capture_error_mode="thread_local"):
                run_all()
            graph.replay()
            self._cuda.synchronize()
        except Exception:
            self._cuda.set_stream(stream)  # a failed capture does not restore it
            self._cuda.synchronize()  # raises if the device failed
            return None
        return graph

    def times(self, samples: dict[str, Sample], rounds: int) -> dict[str, list[float]]:
        """Seconds per call of each contender in each round; the order rotates."""
        names = list(samples)
        warm_until = time.perf_counter() + self._WARM_UP
        while time.perf_counter() < warm_until:
            self._round(samples, names)
        times: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(rounds):
            first = round_ % len(names)
            for name, seconds in self._round(samples, names[first:] + names[:first]).items():
                times[name].append(seconds)
        return times

    def _round(self, samples: dict[str, Sample], order: list[str]) -> dict[str, float]:
        events = {}
        for name in order:
            start, stop = events[name] = [self._cuda.Event(enable_timing=True) for _ in range(2)]
            self._cuda._sleep(self._HEAD_START)
            start.record()
            samples[name].run()
            stop.record()
        self._cuda.synchronize()
        return {name: start.elapsed_time(stop) / 1e3 / samples[name].calls for name, (start, stop) in events.items()}

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def memory_growth(self, call: Callable[[], Any]) -> int:
        """Peak bytes that a call allocates, including its result."""
        self.synchronize()
        before = self._cuda.memory_stats()["requested_bytes.all.current"]
        self._cuda.reset_peak_memory_stats()
        call()
        return self._cuda.memory_stats()["requested_bytes.all.peak"] - before


def summary(times: list[float], tokens: int = 0) -> dict[str, float]:
    """20th, 50th and 80th percentile in milliseconds; for a call that makes tokens, its tokens per second."""
    points = statistics.quantiles(times, n=10, method="inclusive")
    row = {"p20_ms": points[1] * 1e3, "p50_ms": points[4] * 1e3, "p80_ms": points[7] * 1e3}
    if tokens:
        row["tokens_per_s"] = tokens / points[4]
    return row


def paired_rows(times: dict[str, list[float]], base: str, tokens: int = 0) -> dict[str, dict[str, float]]:
    """The summary of each contender, and `ratio`: the median over rounds of its time over that of `base`."""
    return {name: summary(t, tokens) | {"ratio": median_ratio(t, times[base])} for name, t in times.items()}


def median_ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))

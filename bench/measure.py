"""Paired timing: every contender runs once a round, in one process, and ratios are taken round by round.

Machines are shared and drift; a ratio of neighbours in time survives that, a single time does not.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

_EVICT_BYTES = 96 << 20


def paired_times(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, caches emptied before each run; the first two rounds are warm-up."""
    evict = torch.zeros(_EVICT_BYTES, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, run in contenders.items():
            evict.add_(1)
            start = time.perf_counter()
            run()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, in milliseconds."""
    points = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_ms": points[1] * 1e3, "p50_ms": points[4] * 1e3, "p80_ms": points[7] * 1e3}


def median_ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def machine() -> dict[str, str]:
    """What a figure has to be read with."""
    return {
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "commit": _commit(),
        "allocator": "glibc malloc; outputs are allocated and touched before timing",
    }


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"

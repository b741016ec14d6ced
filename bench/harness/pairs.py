"""Works whose two forms are timed in pairs: the loop over them, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..op.works import chosen
from .progress import progress
from .record import guarded, machine
from .timers import CpuTimer, CudaTimer

Measure = Callable[[Any, str, CpuTimer | CudaTimer, int], dict]


def run(
    kind: str,
    works: Iterable[Any],
    measure: Measure,
    device: str,
    rounds: int,
    only: Sequence[str],
    save: Callable[[dict], None],
) -> dict:
    """Measures every work chosen by `only`; `save` gets the result after each."""
    timer = CudaTimer() if device == "cuda" else CpuTimer(warm_up=1)
    result: dict[str, Any] = {"kind": kind, "machine": machine(device, outputs="made by every call")}
    result |= {"unavailable": {}, "skipped": {}, "works": {}, "errors": {}}

    def add(work: Any) -> None:
        result["works"][str(work)] = measure(work, device, timer, rounds)

    for work in progress(chosen(works, only)):
        guarded(str(work), result["errors"], lambda work=work: add(work))
        save(result)
    return result

"""Works whose two forms are timed in pairs: the loop over them, and what its result is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..op.works import chosen
from .record import first_line, machine
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
    """The result of every work chosen by `only`; `save` gets what there is after each."""
    timer = CudaTimer() if device == "cuda" else CpuTimer(warm_up=1)
    result = {"kind": kind, "machine": machine(device, outputs="made by every call")}
    result |= {"unavailable": {}, "skipped": {}, "works": {}, "errors": {}}
    for work in chosen(works, only):
        try:
            result["works"][str(work)] = measure(work, device, timer, rounds)
        except Exception as error:  # no failure may cost the figures of the others
            result["errors"][str(work)] = first_line(error)
        save(result)
    return result

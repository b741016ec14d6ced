"""The stages of an answer: their times, their names in a trace, and the remedy if one runs out of memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from ..errors import OutOfMemoryError
from ..model.out_of_memory import is_out_of_memory

# decode and preprocess run in the background: their seconds are busy time, and wait is what the other stages waited.
STAGES = ("decode", "preprocess", "wait", "vision", "projector", "aggregate", "prefill", "generate")

_DTYPE = "a 16-bit dtype"
_HELP = {
    "decode": "lower frames",
    "preprocess": "lower frames",
    "vision": f"lower frames, or use {_DTYPE}",
    "projector": f"lower frames, take projector='commuted' or {_DTYPE}",
    "aggregate": f"lower frames, take a smaller layout or {_DTYPE}",
    "prefill": f"take a smaller layout, fewer frames or {_DTYPE}, or close other sessions",
    "generate": f"lower max_new_tokens, take a smaller layout or {_DTYPE}, or close other sessions",
}
_BYTES = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


class Stopwatch:
    """Seconds by stage, with the device synchronized at both ends; in a trace, a stage is a range of its name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage. Torch's out-of-memory errors become an OutOfMemoryError with a remedy."""
        start = self._now()
        try:
            with record_function(f"sfllava_fast.{stage}"):
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _explain(stage, error, self.device) from error
        self.add(stage, self._now() - start)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def by_stage(self) -> dict[str, float]:
        """The seconds, in the order of the stages."""
        return {stage: self.seconds[stage] for stage in STAGES if stage in self.seconds}

    def elapsed(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._begun

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _explain(stage: str, error: BaseException, device: torch.device) -> OutOfMemoryError:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    asked = _BYTES.search(str(error))
    size = asked.group(1) if asked else "more than there is"
    stage = "preprocess" if stage == "wait" else stage
    return OutOfMemoryError(f"out of memory on {device} in stage {stage} (asked for {size}): {_HELP[stage]}")

"""Peak memory of a call: torch's allocations on a GPU, the process's resident memory on a CPU (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def growth(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes by which a call's peak exceeds the memory in use before it; None if it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that glibc keeps would hide a part of the growth
        _CLEAR.write_text(_RESET_PEAK)
        before = _status("VmHWM")
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def tensor_peak(device: torch.device, call: Callable[[], object]) -> int:
    """Bytes of a call's tensors at its peak; unlike resident memory the same in every run."""
    if device.type == "cuda":
        return growth(device, call) or 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), initial=0))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; shared storages count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024

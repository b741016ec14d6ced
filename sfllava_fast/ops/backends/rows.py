"""Backends of the row ops: C++ kernels on a CPU, Triton's on a GPU, else the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...layouts.plan import ByteCache
from ..token_offsets import kept_of
from . import registry
from . import rows_reference as reference
from .plan_table import host_table


@dataclass(frozen=True)
class _Backend(registry.Backend):
    """kernels: an object with the kernels as functions, or None for the reference, which runs every call."""

    kernels: Callable[[], Any]


def _why_no_triton(device: torch.device | None) -> str | None:
    return registry.load_triton() or (registry.try_on(_check, "triton", device) if device else None)


def _unfit_for_cpu(tensor: Tensor) -> str | None:
    return None if tensor.is_cpu else f"tensors are on {tensor.device}, not on the CPU"


def _unfit_for_triton(tensor: Tensor) -> str | None:
    return None if tensor.is_cuda else f"tensors are on {tensor.device}, not on a CUDA device"


BACKENDS = {
    backend.name: backend
    for backend in (
        _Backend("cpu", lambda device: registry.load_library(), _unfit_for_cpu, lambda: torch.ops.sfllava_fast),
        _Backend("triton", _why_no_triton, _unfit_for_triton, lambda: registry.triton_kernels()),
        _Backend("torch", lambda device: None, lambda tensor: None, lambda: None),
    )
}
NAMES = ("auto", *BACKENDS)
check_name = partial(registry.check_name, names=NAMES, op=" for rows")


def find_kernels(name: str, tensor: Tensor, unfit: str | None) -> Any:
    """The kernels for a call on this tensor's device as functions; None for the reference.

    unfit: why no kernel can run the call, or None. BackendError if the named backend cannot run it.
    """
    check_name(name)
    order = BACKENDS.values() if name == "auto" else (BACKENDS[name],)
    return registry.choose(name, order, tensor, unfit).kernels()


def frame_table(token_offsets: tuple[int, ...], ratio: float) -> Tensor:
    """The table of `top_per_frame`, int32 [F, 4] on the CPU: start, tokens, tokens kept, first place in the result."""
    if (kept_table := _tables.find((token_offsets, ratio))) is not None:
        return kept_table
    table, first = [], 0
    for start, stop in zip(token_offsets, token_offsets[1:]):
        kept = kept_of(ratio, stop - start)
        table.append((start, stop - start, kept, first))
        first += kept
    # An offset is an object of the key and 16 bytes of the table, here and on a device.
    return _tables.keep((token_offsets, ratio), host_table(table, torch.int32), 256 + 80 * len(token_offsets))


_tables = ByteCache(4 << 20)


def _check(name: str, device: torch.device) -> str | None:
    return _compare(registry.triton_kernels(), device)


def _compare(kernels: Any, device: torch.device) -> str | None:
    """Which of the kernels differs from the reference; None if none does."""
    offsets = (2, 7, 9)
    hidden = torch.arange(12 * 40, dtype=torch.float32, device=device).view(1, 12, 40)
    scores = (hidden[:, 2:9, 0] - 99).square()
    index = reference.top_per_frame(scores, offsets, 0.5)
    kept, nan = torch.empty_like(index), torch.zeros(1, dtype=torch.int32, device=device)
    kernels.top_per_frame_out(scores, frame_table(offsets, 0.5), kept, nan)
    taken, put = reference.gather_rows(hidden, index), torch.empty_like(hidden)
    rows, weights = torch.empty_like(taken), scores[:, : index.shape[1]].contiguous() / 7
    kernels.gather_rows_out([hidden], index, [rows])
    kernels.scatter_rows_weighted_out(hidden, index, -rows, weights, put)
    received, heads = hidden.new_empty(1, 12), hidden.view(1, 1, 12, 40).sin()
    kernels.attention_received_out(heads[:, :, 10:], heads, 0.1, received)
    expected = reference.attention_received(heads[:, :, 10:], heads, 0.1)
    right = {
        "top_per_frame": torch.equal(kept, index) and not nan.item(),
        "gather_rows": torch.equal(rows, taken),
        "scatter_rows": torch.equal(put, reference.scatter_rows(hidden, index, -taken, weights)),
        "attention_received": torch.allclose(received, expected, rtol=1e-4, atol=1e-6),
    }
    wrong = [name for name, fine in right.items() if not fine]
    return f"self-test failed on {device}: {wrong[0]} differs from the PyTorch reference" if wrong else None

"""Who moves rows: the C++ kernels on a CPU, Triton's on a GPU, the reference where they cannot."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError, first_line
from ...layouts.plan import ByteCache
from ..token_offsets import kept_of
from . import aggregate as backends
from . import rows_reference as reference
from .plan_table import host_table

NAMES = ("auto", "cpu", "triton", "torch")
_DEVICES = {"cpu": "cpu", "triton": "cuda"}


def find_kernels(name: str, tensor: Tensor, unfit: str | None) -> Any:
    """What has the kernels for this tensor as functions; None where the reference serves.

    unfit: why no kernel can serve the call. "auto" falls back to the reference, and says once where kernels are
    missing; a backend asked for by name serves, or BackendError says why not.
    """
    check_backend(name)
    if name == "torch":
        return None
    wanted = name if name != "auto" else {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type)
    if wanted is None or (name == "auto" and unfit):
        return None
    if tensor.device.type != _DEVICES[wanted]:
        unfit = f"tensors are on {tensor.device}"
    reason = unfit or _why_unavailable(wanted, tensor.device)
    if not reason:
        return torch.ops.sfllava_fast if wanted == "cpu" else backends.triton_kernels()
    if name == "auto":
        backends.say_once(wanted, reason)
        return None
    raise BackendError(f"backend {name} cannot serve this call: {reason}; use backend='auto'")


def check_backend(name: object) -> None:
    if not isinstance(name, str) or name not in NAMES:
        raise BackendError(f"unknown backend {name!r} for rows: choose one of {', '.join(NAMES)}")


def frame_table(frames: tuple[int, ...], ratio: float) -> Tensor:
    """What `select_rows` reads, int32 [F, 4] on the CPU: start, tokens, how many are kept, and where in the result."""
    if (kept_table := _tables.find((frames, ratio))) is not None:
        return kept_table
    table, first = [], 0
    for start, stop in zip(frames, frames[1:]):
        kept = kept_of(ratio, stop - start)
        table.append((start, stop - start, kept, first))
        first += kept
    # An offset is an object of the key and 16 bytes of the table, here and on a device.
    return _tables.keep((frames, ratio), host_table(table, torch.int32), 256 + 80 * len(frames))


_tables = ByteCache(4 << 20)


def _why_unavailable(name: str, device: torch.device) -> str | None:
    if name == "cpu":
        return _why_no_library()
    return backends.load_triton() or _try_on(device)


@cache
def _why_no_library() -> str | None:
    if reason := backends.load_library():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sfllava_fast::copy_rows", "CPU"):
        return f"{backends.LIBRARY.name} was built before it had kernels for rows: install the package again"
    return None


@cache
def _try_on(device: torch.device) -> str | None:
    """Why Triton's kernels fail on a GPU, from their first, small calls there."""
    backends.refuse_to_be_captured("triton", device)
    try:
        return _compare(backends.triton_kernels(), device)
    except Exception as error:  # compilers and drivers fail in many ways, and auto has to live with all
        return f"it failed on {device}: {first_line(error)}"


def _compare(kernels: Any, device: torch.device) -> str | None:
    frames = (2, 7, 9)
    hidden = torch.arange(12 * 40, dtype=torch.float32, device=device).view(1, 12, 40)
    scores = (hidden[:, 2:9, 0] - 99).square()
    index = reference.top_per_frame(scores, frames, 0.5)
    kept, nan = torch.empty_like(index), torch.zeros(1, dtype=torch.int32, device=device)
    kernels.select_rows(scores, frame_table(frames, 0.5), kept, nan)
    taken, put = reference.gather_rows(hidden, index), torch.empty_like(hidden)
    rows, weights = torch.empty_like(taken), scores[:, : index.shape[1]].contiguous() / 7
    kernels.copy_rows([hidden], index, [rows])
    kernels.blend_rows(hidden, index, -rows, weights, put)
    received, heads = hidden.new_empty(1, 12), hidden.view(1, 1, 12, 40).sin()
    kernels.receive_attention(heads[:, :, 10:], heads, 0.1, received)
    expected = reference.attention_received(heads[:, :, 10:], heads, 0.1)
    right = {
        "choice": torch.equal(kept, index) and not nan.item(),
        "rows": torch.equal(rows, taken),
        "blended rows": torch.equal(put, reference.scatter_rows(hidden, index, -taken, weights)),
        "attention": torch.allclose(received, expected, rtol=1e-4, atol=1e-6),
    }
    wrong = [name for name, fine in right.items() if not fine]
    return f"its {wrong[0]} would be wrong on {device}" if wrong else None

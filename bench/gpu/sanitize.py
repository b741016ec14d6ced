"""Small calls of every GPU kernel for compute-sanitizer, and the main works once each for ncu."""

from __future__ import annotations

import torch

from sfllava_fast import SlowFastLayout
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import reference

from ..op import works
from ..op.run import run_backward, run_forward

# Layouts and grids: nested bins that are too narrow for CUDA's tiles, overlapping bins, repeated slow frames, and
# CUDA's tiles of 6 and of 4 patches.
CASES = (
    (SlowFastLayout(2), (8, 8)),
    (SlowFastLayout(2, "spatial_2d_avg_pool", (3, 5)), (8, 8)),
    (SlowFastLayout(6, "concat", (4, 4)), (8, 8)),
    (SlowFastLayout(2, fast_grid=(2, 2)), (12, 12)),
    (SlowFastLayout(6, "spatial_2d_avg_pool", (2, 2)), (8, 8)),
)
LENGTHS = 3, 2  # frames of the videos
_CHANNELS = (64, 7)  # with and without 16-byte vectors
_DTYPES = (torch.float32, torch.bfloat16)
_Case = tuple[SlowFastLayout, tuple[int, int]]


def names() -> tuple[str, ...]:
    """The available GPU backends."""
    return tuple(name for name in ("cuda", "triton") if not backends.BACKENDS[name].why_unavailable(None))


def run(names: tuple[str, ...], device: str) -> list[str]:
    """The calls whose values differ from the reference's on the CPU."""
    return [
        f"{name}, {dtype}, {channels} channels, {case[0]} on {case[1]}"
        for case in CASES
        for dtype in _DTYPES
        for channels in _CHANNELS
        for name in names
        if not _right(name, case, dtype, channels, device)
    ]


def _right(name: str, case: _Case, dtype: torch.dtype, channels: int, device: str) -> bool:
    layout, grid = case
    plan = layout.plan(LENGTHS, grid)
    host = torch.randn(sum(LENGTHS), 1 + grid[0] * grid[1], channels).to(dtype)[:, 1:]
    grad = torch.randn(plan.offsets[-1], channels).to(dtype)
    features = host.to(device)
    out = torch.empty(plan.offsets[-1], channels, dtype=dtype, device=device)
    backends.BACKENDS[name].run(features, plan, out)
    gradient = torch.empty(host.shape, dtype=dtype, device=device)
    backends.BACKENDS[name].run_backward(grad.to(device), features, plan, gradient)
    tokens_right = torch.equal(out.cpu(), reference.aggregate(host, plan))
    return tokens_right and torch.equal(gradient.cpu(), reference.aggregate_backward(grad, host, plan))


def run_main_works(names: tuple[str, ...], device: str) -> None:
    """Each main work once by each backend, caches cold."""
    for work in works.MAIN:
        sets = [work.make_set(device, torch.Generator(device).manual_seed(0))]
        for name in names:
            run_backward(work, sets, name)(0) if work.backward else run_forward(work, sets, name, 0)


def main(device: str, main_works: bool) -> int:
    """Returns 1 if a value is wrong or there is no backend."""
    found = names()
    if main_works:
        run_main_works(found, device)
        return int(not found)
    wrong = run(found, device)
    print("\n".join(wrong) or f"{', '.join(found) or 'no backend'}: every value is right")
    return 1 if wrong or not found else 0

"""Small calls of every GPU kernel, for compute-sanitizer: python -m bench.sanitize. Exit 1 where a token is wrong."""

from __future__ import annotations

import torch

from sfllava_fast import SlowFastConfig, backends, reference

# Bins that nest, bins that overlap, and a frame that is slow twice; vectors of 16 bytes, and channels that make none.
_LAYOUTS = (SlowFastConfig(2), SlowFastConfig(2, "spatial_2d_avg_pool", (3, 5)), SlowFastConfig(6, "concat", (4, 4)))
_GRID = (8, 8)
_CHANNELS = (64, 7)
_DTYPES = (torch.float32, torch.bfloat16)


def run(names: tuple[str, ...], device: str) -> list[str]:
    """The calls whose values differ from the reference's on the CPU."""
    return [
        f"{name}, {dtype}, {channels} channels, {layout}"
        for layout in _LAYOUTS
        for dtype in _DTYPES
        for channels in _CHANNELS
        for name in names
        if not _right(name, layout, dtype, channels, device)
    ]


def _right(name: str, layout: SlowFastConfig, dtype: torch.dtype, channels: int, device: str) -> bool:
    plan = layout.plan((3, 2), _GRID)
    host = torch.randn(5, 1 + _GRID[0] * _GRID[1], channels).to(dtype)[:, 1:]
    grad = torch.randn(plan.offsets[-1], channels).to(dtype)
    features = host.to(device)
    out = torch.empty(plan.offsets[-1], channels, dtype=dtype, device=device)
    backends.BACKENDS[name].run(features, plan, out)
    gradient = torch.empty(host.shape, dtype=dtype, device=device)
    backends.BACKENDS[name].run_backward(grad.to(device), features, plan, gradient)
    tokens_right = torch.equal(out.cpu(), reference.aggregate(host, plan))
    return tokens_right and torch.equal(gradient.cpu(), reference.aggregate_backward(grad, host, plan))


def main() -> int:
    names = tuple(name for name in ("cuda", "triton") if not backends.BACKENDS[name].why_unavailable(None))
    wrong = run(names, "cuda")
    print("\n".join(wrong) or f"{', '.join(names) or 'no backend'}: every value is right")
    return 1 if wrong or not names else 0


if __name__ == "__main__":
    raise SystemExit(main())

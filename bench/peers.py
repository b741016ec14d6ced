"""The default layout's peers, in our own words: each fills out [S, D] from features [T, N, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfllava_fast import SlowFastConfig, slowfast_aggregate

CONFIG = SlowFastConfig()


def _slow_frames(features: Tensor) -> list[int]:
    return [frame * features.shape[0] // 10 for frame in range(10)]  # the same as linspace at T = 50


def plain_eager(features: Tensor, out: Tensor) -> None:
    """As published: channels first, pool, channels last again."""
    frames, patches, channels = features.shape
    slow = F.max_pool1d(features[_slow_frames(features)].transpose(1, 2), 2, 2).transpose(1, 2)
    grid = features.reshape(frames, 24, 24, channels).permute(0, 3, 1, 2)
    fast = F.adaptive_avg_pool2d(grid, (4, 4)).permute(0, 2, 3, 1)
    out.copy_(torch.cat([slow.reshape(-1, channels), fast.reshape(-1, channels)]))


def best_eager(features: Tensor, out: Tensor) -> None:
    """The fastest that we could write with PyTorch's operators: no transpose, results straight into out."""
    frames, patches, channels = features.shape
    chosen = _slow_frames(features)
    slow = out[: len(chosen) * 288].view(len(chosen), 288, channels)
    for row, frame in enumerate(chosen):
        torch.maximum(features[frame, 0::2], features[frame, 1::2], out=slow[row])
    fast = F.adaptive_avg_pool2d(features.unflatten(1, (24, 24)).permute(0, 3, 1, 2), (4, 4))
    out[len(chosen) * 288 :].view(frames, 4, 4, channels).copy_(fast.permute(0, 2, 3, 1))


def functional_eager(features: Tensor, out: Tensor) -> None:
    """The same sums and maxima without out=, the form that torch.compile fuses best."""
    frames, patches, channels = features.shape
    pairs = features[_slow_frames(features)].unflatten(1, (288, 2))
    slow = torch.maximum(pairs[:, :, 0], pairs[:, :, 1]).reshape(-1, channels)
    fast = features.unflatten(1, (4, 6, 4, 6)).mean((2, 4)).reshape(-1, channels)
    out[: slow.shape[0]] = slow
    out[slow.shape[0] :] = fast


def ours(backend: str):
    def run(features: Tensor, out: Tensor) -> None:
        slowfast_aggregate(features, CONFIG, out=out, backend=backend)

    return run


def providers() -> dict:
    """Everything that is timed, by name."""
    return {
        "plain eager": plain_eager,
        "best eager": best_eager,
        "compiled plain": torch.compile(plain_eager, dynamic=False),
        "compiled best": torch.compile(functional_eager, dynamic=False),
        "torch": ours("torch"),
        "cpu": ours("cpu"),
    }

"""The peers, written for this benchmark: each fills tokens [S, D] from features [T, 576, D] of one video."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sfllava_fast import SlowFastLayout

from .works import GRID, PATCHES, OpWork

Fill = Callable[[Tensor, Tensor], None]


def peers(work: OpWork, device: str, compile_mode: str | None) -> dict[str, Fill]:
    """The peers of a work, by name; all but the plain form compute only the default layout."""
    if work.peers == "none":
        return {}
    slow_frames = torch.linspace(0, work.frames, work.layout.slow_frames + 1)[:-1].long()
    index = slow_frames.to(device)
    plain, means = plain_eager(work, index), eager_means(index)
    found = {"plain eager": plain}
    if work.peers in ("eager", "all"):
        found["best eager"] = best_eager(slow_frames.tolist())
        if device != "cpu":  # the CPU's targets were set without it
            found["eager means"] = means
    if work.peers == "all":
        torch._dynamo.reset()  # else it stops compiling after several recompilations
        found["compiled plain"] = torch.compile(plain, dynamic=False, mode=compile_mode)
        found["compiled best"] = torch.compile(means, dynamic=False, mode=compile_mode)
    return found


def plain_eager(work: OpWork, slow_frames: Tensor) -> Fill:
    tokens = plain_tokens(work.layout, slow_frames, GRID)
    return lambda features, out: out.copy_(tokens(features))


def plain_tokens(layout: SlowFastLayout, slow_frames: Tensor, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The published form, features [T, N, D] to tokens [S, D]: channels first, pool, channels last."""
    pool = {
        "concat": lambda x: x,
        "spatial_1d_max_pool": lambda x: F.max_pool1d(x, 2, 2),
        "spatial_1d_avg_pool": lambda x: F.avg_pool1d(x, 2, 2),
        "spatial_2d_max_pool": lambda x: F.max_pool2d(x.unflatten(2, grid), 2, 2).flatten(2),
        "spatial_2d_avg_pool": lambda x: F.avg_pool2d(x.unflatten(2, grid), 2, 2).flatten(2),
    }[layout.slow_pool]

    def tokens(features: Tensor) -> Tensor:
        channels = features.shape[2]
        slow = pool(features[slow_frames].transpose(1, 2)).transpose(1, 2)
        fast = F.adaptive_avg_pool2d(features.unflatten(1, grid).permute(0, 3, 1, 2), layout.fast_grid)
        return torch.cat([slow.reshape(-1, channels), fast.permute(0, 2, 3, 1).reshape(-1, channels)])

    return tokens


def best_eager(slow_frames: list[int]) -> Fill:
    """The fastest form found with PyTorch's operators: no transpose, results written into `out`."""
    pairs = PATCHES // 2

    def fill(features: Tensor, out: Tensor) -> None:
        frames, _, channels = features.shape
        slow = out[: len(slow_frames) * pairs].view(-1, pairs, channels)
        for row, frame in enumerate(slow_frames):
            torch.maximum(features[frame, 0::2], features[frame, 1::2], out=slow[row])
        fast = F.adaptive_avg_pool2d(features.unflatten(1, GRID).permute(0, 3, 1, 2), (4, 4))
        out[len(slow_frames) * pairs :].view(frames, 4, 4, channels).copy_(fast.permute(0, 2, 3, 1))

    return fill


def eager_means(slow_frames: Tensor) -> Fill:
    """Means and maxima without out=, the form that torch.compile fuses best."""

    def fill(features: Tensor, out: Tensor) -> None:
        channels = features.shape[2]
        pairs = features[slow_frames].unflatten(1, (PATCHES // 2, 2))
        slow = torch.maximum(pairs[:, :, 0], pairs[:, :, 1]).reshape(-1, channels)
        fast = features.unflatten(1, (4, 6, 4, 6)).mean((2, 4)).reshape(-1, channels)
        out[: slow.shape[0]] = slow
        out[slow.shape[0] :] = fast

    return fill

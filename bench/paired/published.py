"""The named layouts as their code bases compute them, with PyTorch's poolings and nothing of the package.

Each function takes patches [T, N, D], the grid (rows, columns) of the patches, and separators [K, D] or None, and
returns tokens [S, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
MakeTokens = Callable[[Tensor, Grid, Tensor | None], Tensor]
Pool = Callable[..., Tensor]


def average(x: Tensor, stride: int = 2) -> Tensor:
    return F.avg_pool2d(x, stride)


def largest(x: Tensor, stride: int = 2) -> Tensor:
    return F.max_pool2d(x, stride)


def bilinear(x: Tensor, stride: int = 2) -> Tensor:
    return F.interpolate(x, size=[math.ceil(side / stride) for side in x.shape[2:]], mode="bilinear")


def pooled(x: Tensor, grid: Grid, pool: Pool) -> Tensor:
    """Patches [T, N, D] pooled to [T, rows, columns, D]; pool takes [T, D, rows, columns]."""
    return pool(x.transpose(1, 2).unflatten(2, grid)).permute(0, 2, 3, 1)


def slowfast(slow: int, pool: str, fast: Grid | None) -> MakeTokens:
    """SlowFast-LLaVA (apple/ml-slowfast-llava): slow frames by linspace, then the fast pathway."""

    def tokens(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
        parts = []
        if slow:
            frames = x[torch.linspace(0, len(x), slow + 1).to(torch.int32)[:-1].long()]
            if pool.startswith("spatial_1d"):
                pool1d = F.max_pool1d if "max" in pool else F.avg_pool1d
                frames = pool1d(frames.transpose(1, 2), 2).transpose(1, 2)
            elif pool != "concat":
                frames = pooled(frames, grid, largest if "max" in pool else average).flatten(1, 2)
            parts.append(frames.flatten(0, 1))
        if fast:
            parts.append(pooled(x, grid, lambda x: F.adaptive_avg_pool2d(x, fast)).flatten(0, 2))
        return torch.cat(parts)

    return tokens


def each_frame(pool: Pool, newline: str = "no_token") -> MakeTokens:
    """LLaVA-NeXT-Video (LLaVA-VL/LLaVA-NeXT): every frame pooled, newlines by mm_newline_position."""

    def tokens(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
        frames = list(pooled(x, grid, pool))
        if newline == "grid":
            frames = [append_to_rows(frame, separators[0]) for frame in frames]
        frames = [frame.flatten(0, 1) for frame in frames]
        if newline == "frame":
            frames = [torch.cat([frame, separators]) for frame in frames]
        return torch.cat([*frames, separators] if newline == "one_token" else frames)

    return tokens


def slow_or_fast(pool: Pool, every: int, newline: bool) -> MakeTokens:
    """LLaVA-Video's add_faster_video: every k-th frame is slow, the others are pooled with twice the stride.

    The last separator follows each frame; the first, a newline, each row (in its code base always).
    """

    def tokens(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
        parts = []
        for t in range(len(x)):
            frame = pooled(x[t : t + 1], grid, partial(pool, stride=4 if t % every else 2))[0]
            frame = append_to_rows(frame, separators[0]) if newline else frame
            parts += [frame.flatten(0, 1), separators[-1:]]
        return torch.cat(parts)

    return tokens


def append_to_rows(frame: Tensor, newline: Tensor) -> Tensor:
    return torch.cat([frame, newline.expand(len(frame), 1, -1)], dim=1)


def pllava(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
    """PLLaVA (magic-research/PLLaVA): fewer than 16 frames are repeated and cut, then pooled in time and space."""
    if len(x) < 16:
        x = x.repeat_interleave(16 // len(x) + 1, 0)[:16]
    video = x.unflatten(1, grid).permute(3, 0, 1, 2)
    return F.adaptive_avg_pool3d(video[None], (16, 12, 12))[0].permute(1, 2, 3, 0).flatten(0, 2)


def means(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
    """Video-ChatGPT (mbzuai-oryx/Video-ChatGPT): a mean of each frame, zeros up to 100, a mean of each patch."""
    temporal = x.mean(1)
    padding = temporal.new_zeros(max(0, 100 - len(temporal)), x.shape[2])
    return torch.cat([temporal, padding, x.mean(0)])


def class_and_grid(interval: bool) -> MakeTokens:
    """VideoLLM-online (showlab/videollm-online): the class token and 3 x 3 patches, a separator between frames."""

    def tokens(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
        spatial = pooled(x[:, 1:], grid, lambda x: F.adaptive_avg_pool2d(x, 3)).flatten(1, 2)
        frames = torch.cat([x[:, :1], spatial], dim=1)
        if not interval:
            return frames.flatten(0, 1)
        return torch.cat([part for frame in frames for part in (separators, frame)][1:])

    return tokens


def whole(x: Tensor, grid: Grid, separators: Tensor | None) -> Tensor:
    """Every patch: SlowFast-LLaVA's "concat"; of IG-VLM's one picture."""
    return x.flatten(0, 1)


LAYOUTS = {
    "sf_llava": slowfast(10, "spatial_1d_max_pool", (4, 4)),
    "sf_llava_34b": slowfast(10, "spatial_1d_max_pool", (4, 4)),
    "slow_only": slowfast(10, "spatial_1d_max_pool", None),
    "fast_only": slowfast(0, "", (4, 4)),
    "uniform": whole,
    "llava_next_image": each_frame(average),
    "llava_next_video": each_frame(average),
    "llava_next_video-max": each_frame(largest),
    "llava_next_video-bilinear": each_frame(bilinear),
    "llava_next_video-newline_none": each_frame(average, "no_token"),
    "llava_next_video-avg-newline_grid": each_frame(average, "grid"),
    "llava_next_video-bilinear-newline_grid": each_frame(bilinear, "grid"),
    "llava_next_video-max-newline_frame": each_frame(largest, "frame"),
    "llava_next_video-bilinear-newline_one": each_frame(bilinear, "one_token"),
    "llava_video_slowfast": slow_or_fast(average, 10, newline=False),
    "llava_video_slowfast-every_1": slow_or_fast(average, 1, newline=False),
    "llava_video_slowfast-avg-every_10-newline_grid": slow_or_fast(average, 10, newline=True),
    "llava_video_slowfast-avg-every_3-newline_grid": slow_or_fast(average, 3, newline=True),
    "llava_video_slowfast-max-every_2-newline_grid": slow_or_fast(largest, 2, newline=True),
    "llava_video_slowfast-bilinear-every_3-newline_grid": slow_or_fast(bilinear, 3, newline=True),
    "pllava": pllava,
    "video_chatgpt": means,
    "red_villm": means,
    "videollm_online": class_and_grid(interval=False),
    "videollm_online-interval": class_and_grid(interval=True),
    "ig_vlm": whole,
}

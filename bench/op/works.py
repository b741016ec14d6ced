"""What `bench op` measures: shapes, layouts, the bytes that must move, and targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfllava_fast import SlowFastLayout
from sfllava_fast.layouts.pathways import Range
from sfllava_fast.layouts.plan import PathwayTables, Plan
from sfllava_fast.ops.backends import reference

from ..harness.record import ResultError

PAPER = SlowFastLayout()
GRID = (24, 24)
PATCHES = GRID[0] * GRID[1]
# No peer, the published form, all uncompiled ones, all.
PEERS = ("none", "plain", "eager", "all")


@dataclass(frozen=True)
class OpWork:
    """One kind of call; by default T=50 frames of 24 x 24 patches in the default layout.

    Attributes:
        dtype, channels: Of the features.
        cls_token: Whether a class token precedes the patches, so that the features are a view.
        bars: By opponent, the target ratio and, optionally, a higher one that is hoped for.
        peers: One of PEERS, the peers of bench/op/peers.py that compute it. A backward has none.
        frames: Of one video, or of several.
        layout: The layout.
        backward: Measure the gradient instead.
    """

    dtype: torch.dtype
    channels: int
    cls_token: bool = False
    bars: dict[str, tuple[float, ...]] = field(default_factory=dict)
    peers: str = "all"
    frames: int | tuple[int, ...] = 50
    layout: SlowFastLayout = PAPER
    backward: bool = False

    def __post_init__(self) -> None:
        assert not self.backward or self.peers == "none"

    def __str__(self) -> str:
        name = f"{str(self.dtype).removeprefix('torch.')} D={self.channels}{' behind CLS' if self.cls_token else ''}"
        if isinstance(self.frames, tuple):
            name += f" {len(self.frames)} videos"
        elif self.frames != 50:
            name += f" T={self.frames}"
        if self.layout != PAPER:
            name += f" {self.layout}"
        return f"backward {name}" if self.backward else name

    @property
    def plan(self) -> Plan:
        return self.layout.plan(self.frames, GRID)

    @property
    def tokens(self) -> int:
        """Number of tokens that a call makes, or for a backward that it gets gradients of."""
        return self.plan.offsets[-1]

    @property
    def frame_offsets(self) -> list[int] | None:
        return np.cumsum([0, *self.frames]).tolist() if isinstance(self.frames, tuple) else None

    def make_set(self, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [T, N, D], and the tokens' buffer [S, D] or for a backward their gradient."""
        plan, skip = self.plan, int(self.cls_token)
        kind = {"dtype": self.dtype, "device": device}
        features = torch.randn(sum(plan.lengths), PATCHES + skip, self.channels, generator=generator, **kind)[:, skip:]
        shape = self.tokens, self.channels
        if self.backward:
            return features, torch.randn(shape, generator=generator, **kind)
        return features, torch.zeros(shape, **kind)

    def expected(self, features: Tensor, tokens: Tensor) -> Tensor:
        if self.backward:
            return reference.aggregate_backward(tokens, features, self.plan)
        return reference.aggregate(features, self.plan)

    def bytes_moved(self) -> int:
        """The bytes that must move.

        Every patch that is used is read once and every token written once. In a backward, the tokens' gradient and the
        inputs of a max are read once, and the features' gradient is written once.
        """
        plan = self.plan
        if self.backward:
            chosen_from = patches_of(plan, [path for path in plan.pathways if _chooses(path)])
            rows = plan.offsets[-1] + chosen_from + sum(plan.lengths) * PATCHES
        else:
            rows = patches_of(plan, plan.pathways) + plan.offsets[-1]
        return rows * self.channels * self.dtype.itemsize


def patches_of(plan: Plan, paths: Iterable[PathwayTables]) -> int:
    """Number of different patches that these pathways pool."""
    pooled = np.zeros((sum(plan.lengths), *plan.grid), dtype=bool)
    for path in paths:
        frames = [bin_ for video in path.frames for bin_ in video]
        pooled.reshape(-1, *path.shape)[np.ix_(*map(_members, (frames, path.rows, path.cols)))] = True
    return int(pooled.sum())


def _members(bins: Iterable[Range]) -> list[int]:
    return sorted({member for bin_ in bins for member in range(*bin_)})


def _chooses(path: PathwayTables) -> bool:
    """Whether a pathway is a max over more than one element."""
    bins = (bin_ for axis in (*path.frames, path.rows, path.cols) for bin_ in axis)
    return path.pathway.reduce == "max" and any(stop - start > 1 for start, stop in bins)


CPU_WORKS = (
    OpWork(torch.float32, 4096, False, {"best peer": (1.4,), "copy_": (0.88,)}),
    OpWork(torch.bfloat16, 4096, False, {"best peer": (1.8,), "copy_": (0.82,)}),
    OpWork(torch.float16, 4096, False, {"best peer": (1.8,), "copy_": (0.82,)}),
    OpWork(torch.bfloat16, 1024, True, {"best peer": (2.2,), "copy_": (0.90,)}),
    OpWork(torch.float16, 1024, True, {"best peer": (2.2,), "copy_": (0.90,)}),
    *(
        OpWork(dtype, channels, cls, {"torch": (3.0,), "copy_": (0.60,)}, peers="none", backward=True)
        for dtype, channels, cls in (
            (torch.float32, 4096, False),
            (torch.bfloat16, 4096, False),
            (torch.float16, 4096, False),
            (torch.bfloat16, 1024, True),
        )
    ),
)

# Targets on an H200. The fairest copy is the faster of the captured copy_ and our copy kernel.
_AGAINST_PEERS = {"plain eager": (5.0, 8.0), "best peer": (1.25, 1.4)}
_PROJECTED = {"fairest copy": (0.92, 0.95), **_AGAINST_PEERS}
_BEHIND_CLS = {"fairest copy": (0.85, 0.90), **_AGAINST_PEERS}
_BACKWARD = {"fairest copy": (0.88, 0.92)}
_BACKWARD_BEHIND_CLS = {"fairest copy": (0.85, 0.90)}

SWEEP = tuple(OpWork(torch.bfloat16, 1024, peers="none", frames=2**n) for n in range(3, 13))
VIDEOS = OpWork(torch.bfloat16, 1024, peers="none", frames=tuple(8 + 37 * i % 57 for i in range(32)))


def _one_video_like(work: OpWork) -> OpWork:
    """One video that moves the same number of bytes, within half a frame."""
    short, longer = (replace(work, frames=frames).bytes_moved() for frames in (100, 101))
    return replace(work, frames=100 + round((work.bytes_moved() - short) / (longer - short)))


ONE_VIDEO = _one_video_like(VIDEOS)
ONE_VIDEO_BAR = 0.9
_LAYOUTS = (  # the last one's bins overlap
    "slowfast-slow_10frms_spatial_2d_avg_pool-fast_4x4",
    "slowfast-slow_10frms_concat-fast_4x4",
    "slowfast-slow_10frms_spatial_1d_max_pool-fast_3x3",
    "slowfast-slow_10frms_spatial_1d_max_pool-fast_5x5",
)
# The works with targets, which are also those of `bench tune`.
MAIN = (
    OpWork(torch.bfloat16, 4096, False, _PROJECTED),
    OpWork(torch.bfloat16, 1024, True, _BEHIND_CLS),
    OpWork(torch.bfloat16, 4096, False, _BACKWARD, peers="none", backward=True),
    OpWork(torch.bfloat16, 1024, True, _BACKWARD_BEHIND_CLS, peers="none", backward=True),
)
# The most important first, in case time runs out.
CUDA_WORKS = (
    *MAIN,
    OpWork(torch.float16, 4096, False, _PROJECTED),
    OpWork(torch.float16, 1024, True, _BEHIND_CLS),
    OpWork(torch.float16, 4096, False, _BACKWARD, peers="none", backward=True),
    VIDEOS,
    ONE_VIDEO,
    *SWEEP,
    OpWork(torch.float32, 4096, peers="eager"),
    OpWork(torch.float32, 1024, True, peers="eager"),
    *(OpWork(torch.bfloat16, 1024, True, peers="plain", layout=SlowFastLayout.parse(name)) for name in _LAYOUTS),
)


def capped(work: OpWork, most: str) -> OpWork:
    """The work with at most the peers `most`, one of PEERS; with fewer than its own, without a target for the best."""
    if PEERS.index(work.peers) <= PEERS.index(most):
        return work
    bars = {against: bar for against, bar in work.bars.items() if against != "best peer"}
    return replace(work, peers=most, bars=bars)


def chosen(works: Iterable[Any], only: Sequence[str]) -> list[Any]:
    """The works with these names, else those whose names contain one of them; all if `only` is empty.

    Raises:
        ResultError: There is none.
    """
    works = list(works)
    exact = [work for work in works if str(work) in only]
    found = exact or [work for work in works if not only or any(text in str(work) for text in only)]
    if not found:
        asked, there = " or ".join(map(repr, only)), ", ".join(map(str, works))
        raise ResultError(f"no work has {asked} in its name: there are {there}")
    return found

"""Layouts as data: which frames, rows and columns each pathway pools into tokens, and how.

A *layout* is a list of pathways. A *pathway* is separable box pooling: bins of frames x bins of rows x
bins of columns, each box reduced by max or mean. SlowFast-LLaVA (arXiv 2407.15841, section 3.2) is two of
them: few frames in fine detail, then every frame pooled hard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from .errors import InputError, LayoutError

Range = tuple[int, int]


@dataclass(frozen=True)
class Bins:
    """A rule that cuts an axis of length n into half-open ranges [start, stop).

    each      n bins of one element.
    stride    floor(n / size) bins of `size` elements; what is left over is dropped.
    adaptive  `size` bins, bin i = [floor(i n / size), ceil((i + 1) n / size)), as adaptive pooling cuts.
    linspace  `size` single elements at int32(torch.linspace(0, n, size + 1))[:-1], in float32.
    """

    rule: Literal["each", "stride", "adaptive", "linspace"]
    size: int = 1

    def count(self, n: int) -> int:
        """Number of bins on an axis of length n (which may be symbolic)."""
        if self.rule == "each":
            return n
        return n // self.size if self.rule == "stride" else self.size

    def cut(self, n: int) -> tuple[Range, ...]:
        """The bins of an axis of length n."""
        size = self.size
        if self.rule == "adaptive":
            return tuple((i * n // size, -(-(i + 1) * n // size)) for i in range(size))
        if self.rule == "linspace":
            return tuple((i, i + 1) for i in _linspace(n, size)[:-1])
        width = size if self.rule == "stride" else 1
        return tuple((i * width, (i + 1) * width) for i in range(n // width))


    def __str__(self) -> str:
        return self.rule if self.rule == "each" else f"{self.rule}{self.size}"


@dataclass(frozen=True)
class Pathway:
    """Separable box pooling of [T, H, W, D] patches; tokens come out frame by frame, row by row.

    `flat` pools the H*W patches of a frame as one row, so that bins may straddle the rows of an odd grid.
    A mean is sum / frames / rows / columns of its box; a max passes NaN on and keeps the first of equals.
    """

    name: str
    frames: Bins
    rows: Bins
    cols: Bins
    reduce: Literal["max", "mean"]
    flat: bool = False

    def shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The H x W on which this pathway cuts its rows and columns."""
        height, width = grid
        if not self.flat:
            return grid
        # Flattened pairs that never straddle a row are 1 x 2 boxes on the grid itself.
        return grid if width % self.cols.size == 0 else (1, height * width)

    def tokens_per_frame(self, grid: tuple[int, int]) -> int:
        height, width = self.shape(grid)
        rows = self.rows.count(height)
        return rows * self.cols.count(width)

    def __str__(self) -> str:
        flat = ",flat" if self.flat else ""
        return f"{self.name}:{self.frames},{self.rows},{self.cols},{self.reduce}{flat}"


_EACH, _PAIRS = Bins("each"), Bins("stride", 2)
_SLOW_POOLS = {  # name -> rows, columns, reduction, flat
    "concat": (_EACH, _EACH, "max", False),
    "spatial_1d_max_pool": (_EACH, _PAIRS, "max", True),
    "spatial_1d_avg_pool": (_EACH, _PAIRS, "mean", True),
    "spatial_2d_max_pool": (_PAIRS, _PAIRS, "max", False),
    "spatial_2d_avg_pool": (_PAIRS, _PAIRS, "mean", False),
}
SLOW_POOLS = tuple(_SLOW_POOLS)
_NUMBER = "([0-9]{1,9})"
_STRING = re.compile(rf"slowfast(?:-slow_{_NUMBER}frms_(\w+?))?(?:-fast_{_NUMBER}x{_NUMBER})?", re.ASCII)
_EXAMPLE = "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"
_PATHWAY_EXAMPLE = "pool:each,stride2,stride2,mean"
_BINS = "(?:each|(?:stride|adaptive|linspace)[0-9]{1,7})"
_PATHWAY = re.compile(rf"(\w+):({_BINS}),({_BINS}),({_BINS}),(max|mean)(,flat)?", re.ASCII)
# Kernels hold frame, row and token numbers in int32.
_MAX_COUNT = 2**20


class Layout:
    """What every layout has: `pathways`, in token order, and a text form, which `parse` reads and the op carries."""

    pathways: tuple[Pathway, ...]

    @staticmethod
    def parse(layout: str | Layout) -> Layout:
        """The layout that a text names: SlowFastConfig's or Pathways' form; a layout comes back as it is."""
        if isinstance(layout, Layout):
            return layout
        if isinstance(layout, str) and ":" in layout:
            return _parse_pathways(layout)
        return SlowFastConfig.parse(layout)

    def count_tokens(self, frames: int, grid: tuple[int, int], videos: int = 1) -> int:
        """Tokens of `videos` videos of `frames` frames together; either count may be symbolic."""
        total = 0
        for path in self.pathways:
            bins = frames if path.frames.rule == "each" else videos * path.frames.size
            total = total + bins * path.tokens_per_frame(grid)
        return total

    def plan(self, frames: int | Sequence[int], grid: tuple[int, int]) -> Plan:
        """Everything that (layout, frames, grid) decides, computed once and cached.

        frames: T, or the frame counts of several videos packed one after the other.
        Raises LayoutError where the layout leaves no token of this grid.
        """
        lengths = (frames,) if isinstance(frames, int) else tuple(frames)
        return _plan(self, lengths, tuple(grid))


@dataclass(frozen=True)
class Pathways(Layout):
    """Any layout; as text its pathways `name:frames,rows,cols,reduce`, flat ones with `,flat` behind it, joined by "+":
    `pool:each,stride2,stride2,mean` averages 2 x 2 patches of every frame.

    Raises LayoutError for no pathway or two of one name, for unknown bins, and for frames by stride: the tokens of
    several videos would not be those of their frames together.
    """

    pathways: tuple[Pathway, ...]

    def __post_init__(self) -> None:
        for path in self.pathways:
            counts = (bins.size for bins in (path.frames, path.rows, path.cols))
            if not _PATHWAY.fullmatch(str(path)) or not all(_is_count(count, least=1) for count in counts):
                raise LayoutError(f"unknown pathway {str(path)!r}: write it like {_PATHWAY_EXAMPLE}")
            if path.frames.rule == "stride":
                raise LayoutError(f"pathway {path.name} takes frames by stride: choose each, adaptive or linspace")
        if not self.pathways or len({path.name for path in self.pathways}) < len(self.pathways):
            raise LayoutError("a layout needs one pathway or more, each of another name")
        object.__setattr__(self, "_string", "+".join(map(str, self.pathways)))

    def __str__(self) -> str:
        return self._string


@dataclass(frozen=True)
class SlowFastConfig(Layout):
    """The SlowFast-LLaVA layout; the defaults are the paper's (3680 tokens from 50 frames of 24 x 24).

    slow_frames: frames of the slow pathway; 0 leaves it out.
    slow_pool: one of SLOW_POOLS; 1-D pools run over pairs of flattened patches, 2-D ones over 2 x 2, floored.
    fast_grid: (rows, columns) every frame is averaged to; None leaves the fast pathway out.

    Raises LayoutError for anything else.
    """

    slow_frames: int = 10
    slow_pool: str = "spatial_1d_max_pool"
    fast_grid: tuple[int, int] | None = (4, 4)

    def __post_init__(self) -> None:
        if not _is_count(self.slow_frames, least=0):
            raise LayoutError(f"slow_frames must be an integer from 0 to {_MAX_COUNT}, not {self.slow_frames!r}")
        if self.slow_pool not in _SLOW_POOLS:
            raise LayoutError(f"unknown slow pooling {self.slow_pool!r}: choose one of {', '.join(SLOW_POOLS)}")
        if self.fast_grid is not None:
            object.__setattr__(self, "fast_grid", _grid(self.fast_grid))
        if not self.slow_frames and self.fast_grid is None:
            raise LayoutError("the layout has neither a slow nor a fast pathway: set slow_frames or fast_grid")
        # Kept, not formatted on demand: torch.compile(dynamic=True) makes the numbers symbolic.
        slow = f"-slow_{self.slow_frames}frms_{self.slow_pool}" if self.slow_frames else ""
        fast = "-fast_{}x{}".format(*self.fast_grid) if self.fast_grid else ""
        object.__setattr__(self, "_string", f"slowfast{slow}{fast}")

    @classmethod
    def parse(cls, layout: str | SlowFastConfig) -> SlowFastConfig:
        """The config that a published layout string names; a config comes back as it is."""
        if isinstance(layout, cls):
            return layout
        if not isinstance(layout, str):
            raise LayoutError(f"a layout is a SlowFastConfig or a string like {_EXAMPLE}, not {type(layout).__name__}")
        return _parse(layout)

    def __str__(self) -> str:
        return self._string

    def only(self, name: Literal["slow", "fast"]) -> SlowFastConfig:
        """This layout with one of its pathways alone."""
        if name not in ("slow", "fast"):
            raise LayoutError(f"no pathway {name!r}: choose slow or fast")
        return replace(self, fast_grid=None) if name == "slow" else replace(self, slow_frames=0)

    @cached_property
    def pathways(self) -> tuple[Pathway, ...]:
        """The layout as data, in token order."""
        paths = []
        if self.slow_frames:
            rows, cols, reduce, flat = _SLOW_POOLS[self.slow_pool]
            paths.append(Pathway("slow", Bins("linspace", self.slow_frames), rows, cols, reduce, flat))
        if self.fast_grid:
            rows, cols = (Bins("adaptive", n) for n in self.fast_grid)
            paths.append(Pathway("fast", Bins("each"), rows, cols, "mean"))
        return tuple(paths)


@dataclass(frozen=True)
class PathwayTables:
    """A pathway cut for one plan: bins as ranges; frame bins of all videos, numbered in the packed frames."""

    pathway: Pathway
    shape: tuple[int, int]
    frames: tuple[tuple[Range, ...], ...]  # by video
    rows: tuple[Range, ...]
    cols: tuple[Range, ...]

    @property
    def tokens_per_frame(self) -> int:
        return len(self.rows) * len(self.cols)


@dataclass(frozen=True, eq=False)  # one plan per (layout, frames, grid): identity is equality, and hashing is free
class Plan:
    """What a layout does to videos of `lengths` frames on `grid`: the tables that kernels read."""

    lengths: tuple[int, ...]
    grid: tuple[int, int]
    pathways: tuple[PathwayTables, ...]

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens by pathway, and their total."""
        counts = {p.pathway.name: p.tokens_per_frame * sum(map(len, p.frames)) for p in self.pathways}
        return {"slow": 0, "fast": 0} | counts | {"total": sum(counts.values())}

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Row at which each video's tokens begin, and the number of rows: [videos + 1]."""
        ends = [0]
        for video in range(len(self.lengths)):
            ends.append(ends[-1] + sum(len(p.frames[video]) * p.tokens_per_frame for p in self.pathways))
        return tuple(ends)

    @cached_property
    def slow_frames(self) -> list[int]:
        """Frames of the slow pathway, numbered in the packed frames; empty without one."""
        return [start for p in self.pathways if p.pathway.name == "slow" for v in p.frames for start, _ in v]


def sample_frames(total: int, count: int) -> list[int]:
    """Uniform sampling as published: the middles of `count` equal segments of `total` frames.

    n = min(total, count), seg = (total - 1) / n, frame i = (round(seg i) + round(seg (i + 1))) // 2 with
    numpy's round half to even. Raises InputError unless both are at least 1.
    """
    if total < 1 or count < 1:
        raise InputError(f"cannot sample {count} frames of {total}: both must be at least 1")
    n = min(total, count)
    edges = np.round((total - 1) / n * np.arange(n + 1)).astype(np.int64)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def square_grid(patches: int) -> tuple[int, int]:
    """(side, side) of a square grid of `patches` patches; InputError where it is not square."""
    side = round(patches**0.5)
    if side * side != patches:
        hint = " (drop the CLS token with features[:, 1:])" if round((patches - 1) ** 0.5) ** 2 == patches - 1 else ""
        raise InputError(f"{patches} patches are not a square grid: pass grid=(rows, columns){hint}")
    return side, side


@lru_cache(maxsize=256)
def _parse(layout: str) -> SlowFastConfig:
    match = _STRING.fullmatch(layout)
    if match is None or not any(match.groups()):
        raise LayoutError(f"unknown layout {layout!r}: write it like {_EXAMPLE}")
    slow, pool, height, width = match.groups()
    grid = (int(height), int(width)) if height else None
    if slow and not int(slow):
        raise LayoutError(f"layout {layout!r} has 0 slow frames: leave the slow part out or ask for at least 1")
    return SlowFastConfig(int(slow or 0), pool or "spatial_1d_max_pool", grid)


@lru_cache(maxsize=256)
def _parse_pathways(layout: str) -> Pathways:
    matches = [_PATHWAY.fullmatch(part) for part in layout.split("+")]
    if not all(matches):
        raise LayoutError(f"unknown layout {layout!r}: write its pathways like {_PATHWAY_EXAMPLE}")
    return Pathways(tuple(
        Pathway(match[1], *map(_bins, match.group(2, 3, 4)), match[5], flat=match[6] is not None) for match in matches
    ))  # fmt: skip


def _bins(text: str) -> Bins:
    rule = text.rstrip("0123456789")
    return Bins(rule, int(text[len(rule) :] or 1))


@lru_cache(maxsize=256)
def _plan(config: Layout, lengths: tuple[int, ...], grid: tuple[int, int]) -> Plan:
    if not lengths or min(lengths) < 1 or min(grid) < 1:
        raise InputError(f"cannot lay out videos of {list(lengths)} frames on a {grid[0]}x{grid[1]} grid: "
                         "each needs at least one frame and one patch")
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    tables = []
    for path in config.pathways:
        height, width = shape = path.shape(grid)
        rows, cols = path.rows.cut(height), path.cols.cut(width)
        if not rows or not cols:
            raise LayoutError(f"{path.name} pooling of {str(config)!r} leaves no token of a {grid[0]}x{grid[1]} grid")
        frames = tuple(_shift(path.frames.cut(n), start) for n, start in zip(lengths, starts))
        tables.append(PathwayTables(path, shape, frames, rows, cols))
    return Plan(lengths, grid, tuple(tables))


def _linspace(stop: int, steps: int) -> list[int]:
    """int32(torch.linspace(0, stop, steps + 1)) in float32, as torch computes it with AVX2, on every machine.

    The first half counts up from 0, the second down from `stop`, each with one rounding (torch's path without
    AVX2 rounds twice). i * stop // steps differs by one at e.g. (stop, steps) = (8, 14).
    """
    step = np.float64(np.float32(stop) / np.float32(steps))
    up = np.arange((steps + 1) // 2)
    down = np.arange(steps - len(up), -1, -1)
    return np.concatenate([step * up, stop - step * down]).astype(np.float32).astype(np.int32).tolist()


def _shift(ranges: Sequence[Range], by: int) -> tuple[Range, ...]:
    return tuple((start + by, stop + by) for start, stop in ranges)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MAX_COUNT


def _grid(value: Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(_is_count(n, least=1) for n in pair):
        raise LayoutError(f"fast_grid must be two positive integers (rows, columns), not {value!r}")
    return pair

"""Layouts as data: which frames, rows and columns each pathway pools into tokens, how, and in which order.

A *layout* is a list of pathways. A *pathway* is separable box pooling: bins of frames x bins of rows x
bins of columns, each box reduced by max or mean. SlowFast-LLaVA (arXiv 2407.15841, section 3.2) is two of
them: few frames in fine detail, then every frame pooled hard. The field's other layouts have names in layouts.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from .errors import InputError, LayoutError
from .pathways import Bins, Count, Pathway, Range, Separator, at_least
from .plan import ByteCache, PathwayTables, Plan

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
_AXIS = "each|(?:stride|adaptive|linspace)[0-9]{1,7}"
_FRAMES, _SPACE = f"({_AXIS}|(?:repeat|every|others)[0-9]{{1,7}})", f"({_AXIS}|linear[0-9]{{1,7}})"
_PATHWAY = re.compile(
    rf"(\w+):{_FRAMES},{_SPACE},{_SPACE},(max|mean)(,flat)?(,class)?(?:,pad([0-9]{{1,7}}))?", re.ASCII
)
_OPTION = re.compile(r"(interleaved)|(before)|(\w+)@(row|frame|between|end)|canvas([0-9]{1,3})x([0-9]{1,3})", re.ASCII)
# Frames cut alone, so that what adjoins in an interleaved layout is known of every frame.
_ALONE = ("each", "every", "others")
# How many frame bins there are is a multiple of the frames, or a number.
_AFFINE = ("each", "adaptive", "linspace", "repeat")
# Kernels hold frame, row and token numbers in int32.
_MAX_COUNT = 2**20
# By layout as text, frames or those of several videos, rows and columns.
PLANS = ByteCache(64 << 20)


class Layout:
    """What every layout has: `pathways`, and a text form, which `layouts.parse_layout` reads and the op carries.

    interleaved: tokens come frame by frame, those of all pathways together, rather than pathway by pathway.
    separators: vectors between the tokens, which the caller supplies.
    stage: whether it pools "after" the projector or "before" it. canvas: (rows, columns) of frames that are put into
    one picture before the vision tower, None for frames as they are. The op looks at neither: they are for whoever runs
    the projector and the tower.
    """

    pathways: tuple[Pathway, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    stage: Literal["after", "before"] = "after"
    canvas: tuple[int, int] | None = None

    @cached_property
    def class_token(self) -> bool:
        """Whether a pathway reads the class token, which then stands before the patches."""
        return any(path.class_token for path in self.pathways)

    @cached_property
    def is_affine(self) -> bool:
        """Whether the tokens of several videos follow from how many videos and frames there are together."""
        return all(path.frames.rule in _AFFINE and not path.pad for path in self.pathways)

    @cached_property
    def is_plain(self) -> bool:
        """Whether tokens are pooled patches, pathway by pathway, and nothing else."""
        others = self.interleaved or self.separators or self.class_token
        return not others and not any(path.pad or path.is_linear for path in self.pathways)

    def count_tokens(self, frames: Count, grid: tuple[int, int]) -> Count:
        """Tokens of a video of so many frames, or of each of several."""
        of_row, of_frame, between, at_end = (self._count_separators(w) for w in ("row", "frame", "between", "end"))
        total, blocks = at_end, 0
        for path in self.pathways:
            total = total + path.count_frames(frames) * path.tokens_per_frame(grid, of_row)
            blocks = blocks + path.frames.count(frames)
        blocks = frames if self.interleaved else blocks
        total = total + blocks * of_frame
        # A video too short for any block has nothing to stand between.
        return total + at_least(blocks - 1, 0) * between if between else total

    def count_packed_tokens(self, frames: Count, grid: tuple[int, int], videos: Count) -> Count:
        """Tokens of several videos of so many frames together; for a layout that `is_affine`."""
        of_one, of_two = (self.count_tokens(n, grid) for n in (1, 2))
        return (of_two - of_one) * frames + (2 * of_one - of_two) * videos

    def count_pictures(self, frames: int) -> int:
        """Pictures that the tower sees of so many frames."""
        return frames if self.canvas is None else -(-frames // (self.canvas[0] * self.canvas[1]))

    def plan(self, frames: int | Sequence[int], grid: tuple[int, int]) -> Plan:
        """Everything that (layout, frames, grid) decides, computed once and cached.

        frames: T, or the frame counts of several videos packed one after the other.
        Raises LayoutError where the layout leaves no token of this grid.
        """
        if isinstance(frames, int):
            lengths = (frames,)
        elif not isinstance(frames, Sequence) or not all(isinstance(n, int) for n in frames):
            raise InputError(f"frames must be an integer, or one for each of several videos, not {frames!r}")
        else:
            lengths = tuple(frames)
            frames = lengths[0] if len(lengths) == 1 else lengths
        if sum(lengths) >= 1 << 31:
            raise InputError(f"{sum(lengths)} frames are more than a kernel can number: lay out fewer at a time")
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(n, (int, np.integer)) for n in grid):
            raise InputError(f"grid must be two integers, (rows, columns) such as (24, 24), not {grid!r}")
        key = str(self), frames, *grid
        return PLANS.find(key) or PLANS.keep(key, plan := _plan(self, lengths, tuple(grid)), plan.nbytes)

    def _count_separators(self, where: str) -> int:
        return sum(separator.where == where for separator in self.separators)


@dataclass(frozen=True)
class Pathways(Layout):
    """Any layout. As text: its pathways joined by "+", what else there is to say behind them, each after a ";".

    A pathway is `name:frames,rows,cols,reduce`, with `,flat`, `,class` or `,pad100` behind it: `pool:each,stride2,
    stride2,mean` averages 2 x 2 patches of every frame. The rest: `interleaved`, `before` (the projector), `canvas3x2`
    (rows x columns of frames), and separators as `newline@row`, `@frame`, `@between` or `@end`.

    Raises LayoutError, in a line that says why, for anything that is no layout.
    """

    pathways: tuple[Pathway, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    stage: Literal["after", "before"] = "after"
    canvas: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for path in self.pathways:
            _check_pathway(path)
        names = [part.name for part in (*self.pathways, *self.separators)]
        if not self.pathways or len(set(names)) < len(names):
            raise LayoutError("a layout needs one pathway or more, and each pathway and separator another name")
        rules = {path.frames for path in self.pathways}
        whole = any(Bins("others", bins.size) in rules for bins in rules if bins.rule == "every") or _EACH in rules
        if self.interleaved and not (whole and all(bins.rule in _ALONE for bins in rules)):
            raise LayoutError("pathways are interleaved frame by frame: take frames by each, or by every and others")
        padded = any(path.pad for path in self.pathways)
        if padded and (self.interleaved or any(separator.where != "end" for separator in self.separators)):
            raise LayoutError("a padded pathway has nothing between its tokens: leave interleaved and separators out")
        options = [*map(str, self.separators)]
        options += ["interleaved"] * self.interleaved + ["before"] * (self.stage == "before")
        options += ["canvas{}x{}".format(*self.canvas)] if self.canvas else []
        if not all(map(_OPTION.fullmatch, options)) or self.canvas and 0 in self.canvas:
            raise LayoutError(f"unknown part of a layout among {', '.join(options)}: write newline@row or canvas3x2")
        object.__setattr__(self, "_string", ";".join(["+".join(map(str, self.pathways)), *options]))

    @classmethod
    def parse(cls, layout: str) -> Pathways:
        """The layout that a text of this form describes."""
        return _parse_pathways(layout)

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
    paths, *options = layout.split(";")
    matches = [_PATHWAY.fullmatch(part) for part in paths.split("+")]
    if not all(matches):
        raise LayoutError(f"unknown layout {layout!r}: write its pathways like {_PATHWAY_EXAMPLE}")
    given: dict[str, object] = {"separators": ()}
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            known = "interleaved, before, newline@row or canvas3x2"
            raise LayoutError(f"unknown option {option!r} of a layout: write {known}")
        interleaved, before, name, where, rows, cols = match.groups()
        if name:
            given["separators"] += (Separator(name, where),)
        elif rows:
            given["canvas"] = int(rows), int(cols)
        else:
            given |= {"interleaved": True} if interleaved else {"stage": before}
    return Pathways(tuple(map(_pathway, matches)), **given)


def _pathway(match: re.Match[str]) -> Pathway:
    flat, class_token = (flag is not None for flag in match.group(6, 7))
    return Pathway(match[1], *map(_bins, match.group(2, 3, 4)), match[5], flat, class_token, int(match[8] or 0))


def _bins(text: str) -> Bins:
    rule = text.rstrip("0123456789")
    return Bins(rule, int(text[len(rule) :] or 1))


def _check_pathway(path: Pathway) -> None:
    sizes = (bins.size for bins in (path.frames, path.rows, path.cols))
    counted = all(_is_count(size, least=1) for size in sizes) and _is_count(path.pad, least=0)
    if not counted or not _PATHWAY.fullmatch(str(path)):
        raise LayoutError(f"unknown pathway {str(path)!r}: write it like {_PATHWAY_EXAMPLE}")
    rules = path.rows.rule, path.cols.rule
    if "linear" in rules and (set(rules) != {"linear"} or path.reduce != "mean" or path.flat):
        raise LayoutError(f"pathway {path.name}: linear bins are of rows and columns both, and of a mean")
    if path.class_token and (set(rules) != {"each"} or path.flat):
        raise LayoutError(f"pathway {path.name}: the class token has one row and one column, each")


def _plan(config: Layout, lengths: tuple[int, ...], grid: tuple[int, int]) -> Plan:
    if not lengths:
        raise InputError("the batch holds no video: features are [B, T, N, D] with B of at least 1")
    if min(lengths) < 1 or min(grid) < 1:
        raise InputError(f"cannot lay out videos of {list(lengths)} frames on a {grid[0]}x{grid[1]} grid: "
                         "each needs at least one frame and one patch")
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    row_separators = config._count_separators("row")
    tables = []
    for path in config.pathways:
        height, width = shape = path.shape(grid)
        rows, cols = path.rows.cut(height), path.cols.cut(width)
        if not rows or not cols:
            raise LayoutError(f"{path.name} pooling of {str(config)!r} leaves no token of a {grid[0]}x{grid[1]} grid")
        frames = tuple(_shift(path.frames.cut(n), start) for n, start in zip(lengths, starts))
        first_patch = int(config.class_token and not path.class_token)
        tables.append(PathwayTables(path, shape, frames, rows, cols, first_patch, row_separators))
    plan = Plan(lengths, grid, tuple(tables), config.interleaved, config.separators)
    if not plan.items:
        raise LayoutError(f"{str(config)!r} leaves no token of {list(lengths)} frames: give it more of them")
    return plan


def _shift(ranges: Sequence[Range], by: int) -> tuple[Range, ...]:
    return tuple((start + by, stop + by) for start, stop in ranges)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MAX_COUNT


def _grid(value: Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(_is_count(n, least=1) for n in pair):
        raise LayoutError(f"fast_grid must be two positive integers (rows, columns), not {value!r}")
    return pair

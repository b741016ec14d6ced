"""Layouts as data: which frames, rows and columns each pathway pools into tokens, how, and in which order.

A *layout* is a list of pathways. A *pathway* is separable box pooling: bins of frames x bins of rows x bins of columns,
each box reduced by max or mean. SlowFast-LLaVA (arXiv 2407.15841, section 3.2) is two of them: few frames in fine
detail, then every frame pooled hard. presets.py has the field's other layouts by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from ..errors import InputError, LayoutError
from .pathways import Count, Pathway, Range, Separator, at_least
from .plan import ByteCache, PathwayTables, Plan

# How many frame bins there are is a multiple of the frames, or a number.
_AFFINE = ("each", "adaptive", "linspace", "repeat")
# Kernels hold frame, row and token numbers in int32.
MAX_COUNT = 2**20
# By layout as text, frames or those of several videos, rows and columns.
PLANS = ByteCache(64 << 20)


class Layout:
    """What every layout has: `pathways`, and a text form, which `layouts.parse_layout` reads and the op carries.

    interleaved: tokens come frame by frame, those of all pathways together, rather than pathway by pathway.
    separators: vectors between the tokens, which the caller supplies.
    stage: whether it pools "after" the projector or "before" it. canvas: (rows, columns) of frames that are put into
    one picture before the vision tower, None for frames as they are. The op looks at neither: they are for whoever runs
    the projector and the tower.
    frames: number of frames that a layout with a name of PRESETS was published with; None for any other. It is part of
    neither the text nor equality.
    """

    pathways: tuple[Pathway, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    stage: Literal["after", "before"] = "after"
    canvas: tuple[int, int] | None = None
    frames: int | None = None

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


def square_grid(patches: int) -> tuple[int, int]:
    """(side, side) of a square grid of `patches` patches; InputError where it is not square."""
    side = round(patches**0.5)
    if side * side != patches:
        hint = " (drop the CLS token with features[:, 1:])" if round((patches - 1) ** 0.5) ** 2 == patches - 1 else ""
        raise InputError(f"{patches} patches are not a square grid: pass grid=(rows, columns){hint}")
    return side, side


def _plan(layout: Layout, lengths: tuple[int, ...], grid: tuple[int, int]) -> Plan:
    if not lengths:
        raise InputError("the batch holds no video: features are [B, T, N, D] with B of at least 1")
    if min(lengths) < 1 or min(grid) < 1:
        raise InputError(
            f"cannot lay out videos of {list(lengths)} frames on a {grid[0]}x{grid[1]} grid: "
            "each needs at least one frame and one patch"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    row_separators = layout._count_separators("row")
    tables = []
    for path in layout.pathways:
        height, width = shape = path.shape(grid)
        rows, cols = path.rows.cut(height), path.cols.cut(width)
        if not rows or not cols:
            raise LayoutError(f"{path.name} pooling of {str(layout)!r} leaves no token of a {grid[0]}x{grid[1]} grid")
        frames = tuple(_shift(path.frames.cut(n), start) for n, start in zip(lengths, starts))
        first_patch = int(layout.class_token and not path.class_token)
        tables.append(PathwayTables(path, shape, frames, rows, cols, first_patch, row_separators))
    plan = Plan(lengths, grid, tuple(tables), layout.interleaved, layout.separators)
    if not plan.items:
        raise LayoutError(f"{str(layout)!r} leaves no token of {list(lengths)} frames: give it more of them")
    return plan


def _shift(ranges: Sequence[Range], by: int) -> tuple[Range, ...]:
    return tuple((start + by, stop + by) for start, stop in ranges)


def is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT

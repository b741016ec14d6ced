"""Layouts as data: which frames, rows and columns each pathway pools into tokens, how, and in which order.

A *layout* is a list of pathways. A *pathway* is separable box pooling: bins of frames x bins of rows x bins of columns,
each box reduced by max or mean. SlowFast-LLaVA (arXiv 2407.15841, section 3.2) has two: few frames in fine detail, then
every frame pooled to few tokens. presets.py has other published layouts by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ..errors import InputError, LayoutError
from .pathways import Count, Pathway, Range, Separator, at_least
from .plan import ByteCache, PathwayTables, Plan

if TYPE_CHECKING:
    from typing_extensions import Self

# Rules whose number of bins is a multiple of the number of frames, or a constant.
_AFFINE = ("each", "adaptive", "linspace", "repeat")
# Kernels hold the numbers of frames, rows and tokens in int32.
MAX_COUNT = 2**20
# Keys: text of the layout, frames or the frames of several videos, rows, columns.
PLANS = ByteCache(64 << 20)


class Layout:
    """Base class of layouts. `str(layout)` is its text, which `parse_layout` reads and the op receives.

    The op ignores `stage` and `canvas`; the code that runs the projector and the vision tower applies them.

    Attributes:
        pathways: In the order of their tokens.
        interleaved: Whether tokens are ordered by frame and then by pathway, instead of by pathway and then by frame.
        separators: Vectors that the caller supplies and that are written between the tokens.
        stage: Whether the layout pools "after" the projector or "before" it.
        canvas: (rows, columns) of frames that are composed into one picture before the vision tower, or None.
        name: The name that it was parsed from, such as "pllava"; None for any other text.
        frames: Number of frames that a named layout was published with; None for any other.
        grid: (rows, columns) of patches that a named layout was published with; None for any other. Neither the text
            nor equality includes these three.
    """

    pathways: tuple[Pathway, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    stage: Literal["after", "before"] = "after"
    canvas: tuple[int, int] | None = None
    name: ClassVar[str | None] = None
    frames: ClassVar[int | None] = None
    grid: ClassVar[tuple[int, int] | None] = None

    def published_as(self, name: str, frames: int, grid: tuple[int, int]) -> Self:
        """This layout with a name, and the frames and the grid of its publication; it equals the one without them."""
        named = copy(self)
        vars(named).update(name=name, frames=frames, grid=grid)
        return named

    @cached_property
    def class_token(self) -> bool:
        """Whether a pathway reads the class token, which then precedes the patches."""
        return any(path.class_token for path in self.pathways)

    @cached_property
    def is_affine(self) -> bool:
        """Whether the number of tokens of several videos follows from the number of videos and of all frames."""
        return all(path.frames.rule in _AFFINE and not path.pad for path in self.pathways)

    @cached_property
    def is_plain(self) -> bool:
        """Whether tokens are pooled patches, pathway by pathway, and nothing else."""
        others = self.interleaved or self.separators or self.class_token
        return not others and not any(path.pad or path.is_linear for path in self.pathways)

    def count_tokens(self, frames: Count, grid: tuple[int, int]) -> Count:
        """Number of tokens of a video of `frames` frames; of each of several videos if `frames` is a tensor [V]."""
        of_row, of_frame, between, at_end = (self._count_separators(w) for w in ("row", "frame", "between", "end"))
        total, blocks = at_end, 0
        for path in self.pathways:
            total = total + path.count_frames(frames) * path.tokens_per_frame(grid, of_row)
            blocks = blocks + path.frames.count(frames)
        blocks = frames if self.interleaved else blocks
        total = total + blocks * of_frame
        # A video that is too short for any block has no separators between blocks.
        return total + at_least(blocks - 1, 0) * between if between else total

    def count_packed_tokens(self, frames: Count, grid: tuple[int, int], videos: Count) -> Count:
        """Number of tokens of `videos` videos with `frames` frames in all. The layout must be `is_affine`."""
        of_one, of_two = (self.count_tokens(n, grid) for n in (1, 2))
        return (of_two - of_one) * frames + (2 * of_one - of_two) * videos

    def count_pictures(self, frames: int) -> int:
        """Number of pictures that the vision tower encodes for `frames` frames."""
        return frames if self.canvas is None else -(-frames // (self.canvas[0] * self.canvas[1]))

    def plan(self, frames: int | Sequence[int], grid: tuple[int, int]) -> Plan:
        """The tables of bins and tokens for these frames and this grid, from a cache if they were computed before.

        Args:
            frames: Number of frames T, or the number of frames of each of several videos that are packed.
            grid: (rows, columns) of a frame's patches.

        Raises:
            InputError: If `frames` or `grid` is not of this form.
            LayoutError: If the layout leaves no token of this grid.
        """
        lengths: tuple[int, ...]
        if isinstance(frames, int):
            lengths = (frames,)
        elif not isinstance(frames, Sequence) or not all(isinstance(n, int) for n in frames):
            raise InputError(f"frames must be an integer, or one integer a video, not {frames!r}")
        else:
            lengths = tuple(frames)
        if sum(lengths) >= 1 << 31:
            raise InputError(f"{sum(lengths)} frames are more than int32 can number: aggregate fewer at a time")
        if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(n, (int, np.integer)) for n in grid):
            raise InputError(f"grid must be two integers, (rows, columns) such as (24, 24), not {grid!r}")
        rows, columns = grid
        key = str(self), lengths[0] if len(lengths) == 1 else lengths, rows, columns
        return PLANS.find(key) or PLANS.keep(key, plan := _plan(self, lengths, (rows, columns)), plan.nbytes)

    def _count_separators(self, where: str) -> int:
        return sum(separator.where == where for separator in self.separators)


def square_grid(patches: int) -> tuple[int, int]:
    """(side, side) of a square grid of `patches` patches. Raises InputError if `patches` is not a square."""
    side = round(patches**0.5)
    if side * side != patches:
        hint = " (drop the CLS token with features[:, 1:])" if round((patches - 1) ** 0.5) ** 2 == patches - 1 else ""
        raise InputError(f"{patches} patches are not a square grid: pass grid=(rows, columns){hint}")
    return side, side


def _plan(layout: Layout, lengths: tuple[int, ...], grid: tuple[int, int]) -> Plan:
    if not lengths:
        raise InputError("the batch holds no video: features must be [B, T, N, D] with B of at least 1")
    if min(lengths) < 1 or min(grid) < 1:
        raise InputError(
            f"cannot lay out videos of {list(lengths)} frames on a {grid[0]}x{grid[1]} grid: "
            "each video needs at least one frame, and the grid one patch"
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
        raise LayoutError(f"{str(layout)!r} leaves no token of {list(lengths)} frames: give it more frames")
    return plan


def _shift(ranges: Sequence[Range], by: int) -> tuple[Range, ...]:
    return tuple((start + by, stop + by) for start, stop in ranges)


def is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT

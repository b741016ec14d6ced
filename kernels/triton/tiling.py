"""How a plan's two pathways nest, so that one read of a patch is enough for both."""

from dataclasses import dataclass

from sfllava_fast.layouts.pathways import Range
from sfllava_fast.layouts.plan import Plan

# A fine box's rows x columns, and the patches of a strip, whose loads are in flight together.
_FINE = ((1, 1), (1, 2), (2, 2))
_MOST_IN_STRIP = 16


@dataclass(frozen=True)
class Tiling:
    """Tiles of `strips * fine_rows` x `width` patches: each a box of the coarse mean, made of whole fine boxes."""

    width: int
    strips: int
    tile_rows: int
    tile_cols: int
    fine_rows: int
    fine_cols: int
    fine_mean: bool
    repeats: bool  # some frame is in several fine items
    every_frame: bool  # every frame is in a tile, so that a frame's number is its group's
    whole: bool  # every patch of every frame is in a tile


def find_tiling(plan: Plan) -> Tiling | None:
    """The tiling of a plan; None if its pathways do not nest.

    They nest if the last of two pathways is a mean over equal boxes of every frame on its own, the other's boxes are
    1x1, 1x2 or 2x2 of one frame on the same grid, and both cover the same patches. The default layout on 24x24 does.
    Tokens of an item follow each other without a gap; items may be anywhere.
    """
    has_class_token = plan.patches != plan.grid[0] * plan.grid[1]
    if len(plan.pathways) != 2 or has_class_token:
        return None
    if any(path.pitch != len(path.cols) or path.shape != plan.grid for path in plan.pathways):
        return None
    fine, coarse = plan.pathways
    if coarse.reduce != "mean" or fine.reduce == "linear":
        return None
    covered = [bins for video in coarse.frames for bins in video]
    if not all(stop - start == 1 for start, stop in covered) or len(set(covered)) != len(covered):
        return None
    refined = [bins for video in fine.frames for bins in video]
    if not set(refined) <= set(covered):
        return None
    sizes = [_even(bins) for bins in (fine.rows, fine.cols, coarse.rows, coarse.cols)]
    fine_rows, fine_cols, height, width = sizes
    if (fine_rows, fine_cols) not in _FINE or not height or not width:
        return None
    if height % fine_rows or width % fine_cols or fine_rows * width > _MOST_IN_STRIP:
        return None
    if fine.rows[-1][1] != coarse.rows[-1][1] or fine.cols[-1][1] != coarse.cols[-1][1]:
        return None
    every_frame = len(covered) == sum(plan.lengths)
    return Tiling(
        width, height // fine_rows, len(coarse.rows), len(coarse.cols), fine_rows, fine_cols,
        fine.reduce == "mean", len(set(refined)) < len(refined), every_frame,
        every_frame and (coarse.rows[-1][1], coarse.cols[-1][1]) == plan.grid,
    )  # fmt: skip


def _even(bins: tuple[Range, ...]) -> int:
    """The size of equal bins that follow each other from 0; 0 for others."""
    size = bins[0][1]
    return size if all(bin == (i * size, (i + 1) * size) for i, bin in enumerate(bins)) else 0

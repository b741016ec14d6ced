"""SlowFast-LLaVA's layout, and the strings that its code base calls it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from ..errors import LayoutError
from .layout import MAX_COUNT, Layout, is_count
from .pathways import AxisRule, Pathway, Reduction

_EACH, _PAIRS = AxisRule("each"), AxisRule("stride", 2)
_SLOW_POOLS: dict[str, tuple[AxisRule, AxisRule, Reduction, bool]] = {  # name -> rows, columns, reduction, flat
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


@dataclass(frozen=True)
class SlowFastLayout(Layout):
    """The SlowFast-LLaVA layout (arXiv 2407.15841, section 3.2).

    The defaults are the paper's: 3680 tokens from 50 frames of 24 x 24 patches.

    Attributes:
        slow_frames: Number of frames of the slow pathway; 0 omits the pathway.
        slow_pool: One of SLOW_POOLS. 1-D pools reduce pairs of flattened patches, 2-D pools 2 x 2 patches; patches that
            are left over are dropped.
        fast_grid: (rows, columns) that every frame is averaged to; None omits the fast pathway.

    Raises:
        LayoutError: If a value is none of these, or if both pathways are omitted.
    """

    slow_frames: int = 10
    slow_pool: str = "spatial_1d_max_pool"
    fast_grid: tuple[int, int] | None = (4, 4)
    pathways: tuple[Pathway, ...] = field(init=False, compare=False, repr=False)
    _string: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.slow_frames, least=0):
            raise LayoutError(f"slow_frames must be an integer from 0 to {MAX_COUNT}, not {self.slow_frames!r}")
        if self.slow_pool not in _SLOW_POOLS:
            raise LayoutError(f"unknown slow pooling {self.slow_pool!r}: choose one of {', '.join(SLOW_POOLS)}")
        if self.fast_grid is not None:
            object.__setattr__(self, "fast_grid", _grid(self.fast_grid))
        if not self.slow_frames and self.fast_grid is None:
            raise LayoutError("the layout has neither a slow nor a fast pathway: set slow_frames or fast_grid")
        # Formatted here, not on demand: torch.compile(dynamic=True) makes the numbers symbolic.
        slow = f"-slow_{self.slow_frames}frms_{self.slow_pool}" if self.slow_frames else ""
        fast = "-fast_{}x{}".format(*self.fast_grid) if self.fast_grid else ""
        object.__setattr__(self, "_string", f"slowfast{slow}{fast}")
        object.__setattr__(self, "pathways", self._make_pathways())

    @classmethod
    def parse(cls, layout: str | SlowFastLayout) -> SlowFastLayout:
        """The layout of a published string such as slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4.

        A SlowFastLayout is returned unchanged.

        Raises:
            LayoutError: If `layout` is anything else.
        """
        if isinstance(layout, cls):
            return layout
        if not isinstance(layout, str):
            raise LayoutError(f"a layout is a SlowFastLayout or a string like {_EXAMPLE}, not {type(layout).__name__}")
        return _parse(layout)

    def __str__(self) -> str:
        return self._string

    def only(self, name: Literal["slow", "fast"]) -> SlowFastLayout:
        """This layout with only its slow or only its fast pathway. Raises LayoutError for any other name."""
        if name not in ("slow", "fast"):
            raise LayoutError(f"no pathway {name!r}: choose slow or fast")
        if name == "slow":
            return replace(self, fast_grid=None)
        return replace(self, slow_frames=0)

    def _make_pathways(self) -> tuple[Pathway, ...]:
        paths = []
        if self.slow_frames:
            rows, cols, reduce, flat = _SLOW_POOLS[self.slow_pool]
            paths.append(Pathway("slow", AxisRule("linspace", self.slow_frames), rows, cols, reduce, flat))
        if self.fast_grid:
            height, width = (AxisRule("adaptive", n) for n in self.fast_grid)
            paths.append(Pathway("fast", _EACH, height, width, "mean"))
        return tuple(paths)


@lru_cache(maxsize=256)
def _parse(layout: str) -> SlowFastLayout:
    match = _STRING.fullmatch(layout)
    if match is None or not any(match.groups()):
        raise LayoutError(f"unknown layout {layout!r}: write it like {_EXAMPLE}")
    slow, pool, height, width = match.groups()
    grid = (int(height), int(width)) if height else None
    if slow and not int(slow):
        raise LayoutError(f"layout {layout!r} has 0 slow frames: omit the slow part or write at least 1 frame")
    return SlowFastLayout(int(slow or 0), pool or "spatial_1d_max_pool", grid)


def _grid(value: Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(is_count(n, least=1) for n in pair):
        raise LayoutError(f"fast_grid must be two positive integers (rows, columns), not {value!r}")
    return pair

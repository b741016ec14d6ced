"""SlowFast-LLaVA's layout, and the strings that its code base names it by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

from ..errors import LayoutError
from .layout import MAX_COUNT, Layout, is_count
from .pathways import AxisRule, Pathway

_EACH, _PAIRS = AxisRule("each"), AxisRule("stride", 2)
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


@dataclass(frozen=True)
class SlowFastLayout(Layout):
    """The SlowFast-LLaVA layout; the defaults are the paper's (3680 tokens from 50 frames of 24 x 24).

    slow_frames: frames of the slow pathway; 0 leaves it out.
    slow_pool: one of SLOW_POOLS; 1-D pools run over pairs of flattened patches, 2-D ones over 2 x 2, floored.
    fast_grid: (rows, columns) every frame is averaged to; None leaves the fast pathway out.

    Raises LayoutError for anything else.
    """

    slow_frames: int = 10
    slow_pool: str = "spatial_1d_max_pool"
    fast_grid: tuple[int, int] | None = (4, 4)
    frames: int | None = field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not is_count(self.slow_frames, least=0):
            raise LayoutError(f"slow_frames must be an integer from 0 to {MAX_COUNT}, not {self.slow_frames!r}")
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
    def parse(cls, layout: str | SlowFastLayout) -> SlowFastLayout:
        """The config that a published layout string names; a config comes back as it is."""
        if isinstance(layout, cls):
            return layout
        if not isinstance(layout, str):
            raise LayoutError(f"a layout is a SlowFastLayout or a string like {_EXAMPLE}, not {type(layout).__name__}")
        return _parse(layout)

    def __str__(self) -> str:
        return self._string

    def only(self, name: Literal["slow", "fast"]) -> SlowFastLayout:
        """This layout with one of its pathways alone."""
        if name not in ("slow", "fast"):
            raise LayoutError(f"no pathway {name!r}: choose slow or fast")
        other = {"fast_grid": None} if name == "slow" else {"slow_frames": 0}
        return replace(self, frames=None, **other)

    @cached_property
    def pathways(self) -> tuple[Pathway, ...]:
        """The layout as data, in token order."""
        paths = []
        if self.slow_frames:
            rows, cols, reduce, flat = _SLOW_POOLS[self.slow_pool]
            paths.append(Pathway("slow", AxisRule("linspace", self.slow_frames), rows, cols, reduce, flat))
        if self.fast_grid:
            rows, cols = (AxisRule("adaptive", n) for n in self.fast_grid)
            paths.append(Pathway("fast", AxisRule("each"), rows, cols, "mean"))
        return tuple(paths)


@lru_cache(maxsize=256)
def _parse(layout: str) -> SlowFastLayout:
    match = _STRING.fullmatch(layout)
    if match is None or not any(match.groups()):
        raise LayoutError(f"unknown layout {layout!r}: write it like {_EXAMPLE}")
    slow, pool, height, width = match.groups()
    grid = (int(height), int(width)) if height else None
    if slow and not int(slow):
        raise LayoutError(f"layout {layout!r} has 0 slow frames: leave the slow part out or ask for at least 1")
    return SlowFastLayout(int(slow or 0), pool or "spatial_1d_max_pool", grid)


def _grid(value: Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(is_count(n, least=1) for n in pair):
        raise LayoutError(f"fast_grid must be two positive integers (rows, columns), not {value!r}")
    return pair

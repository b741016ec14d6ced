"""The parts of layouts: rules that cut an axis into bins, pathways that pool boxes of bins, separators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Range = tuple[int, int]
Count = Any  # int, SymInt while torch traces, or a tensor [V] with the count of each video
Rule = Literal["each", "stride", "adaptive", "linear", "linspace", "repeat", "every", "others"]
Reduction = Literal["max", "mean"]
Place = Literal["row", "frame", "between", "end"]


@dataclass(frozen=True)
class AxisRule:
    """A rule that cuts an axis of length n into half-open ranges [start, stop).

    - each: n bins of one element.
    - stride: floor(n / size) bins of `size` elements; elements that are left over are dropped.
    - adaptive: `size` bins as in adaptive pooling, bin i = [floor(i n / size), ceil((i + 1) n / size)).
    - linear: ceil(n / size) bins of one or two elements, those around the middles of equal segments, between which a
      bilinear resize interpolates (align_corners=False, no antialias). For rows and columns only.
    - linspace: `size` single elements at int32(torch.linspace(0, n, size + 1))[:-1], in float32.
    - repeat: `size` bins, adaptive if n >= size. Otherwise elements are repeated as PLLaVA repeats frames: bin i is
      element i // (size // n + 1), so the last elements are dropped if n does not divide `size`.
    - every: the elements 0, size, 2 size, ... For frames only.
    - others: all elements except those of `every`. For frames only.
    """

    rule: Rule
    size: int = 1

    def count(self, n: Count) -> Count:
        """Number of bins on an axis of length n."""
        if self.rule == "each":
            return n
        if self.rule == "stride":
            return n // self.size
        if self.rule in ("linear", "every", "others"):
            cut = (n + (self.size - 1)) // self.size
            return n - cut if self.rule == "others" else cut
        return self.size

    def cut(self, n: int) -> tuple[Range, ...]:
        """The bins of an axis of length n."""
        if self.rule == "linear":
            count = self.count(n)
            return tuple((start, start + 1 + (rest > 0)) for start, rest in _middles(n, count))
        if self.rule == "adaptive" or (self.rule == "repeat" and n >= self.size):
            return tuple((i * n // self.size, -(-(i + 1) * n // self.size)) for i in range(self.size))
        if self.rule == "stride":
            return tuple((i * self.size, (i + 1) * self.size) for i in range(n // self.size))
        return tuple((i, i + 1) for i in self._elements(n))

    def _elements(self, n: int) -> list[int]:
        if self.rule == "linspace":
            return _linspace(n, self.size)[:-1]
        if self.rule == "repeat":
            return [i // (self.size // n + 1) for i in range(self.size)]
        if self.rule == "others":
            return [i for i in range(n) if i % self.size]
        return list(range(0, n, self.size if self.rule == "every" else 1))

    def __str__(self) -> str:
        return self.rule if self.rule == "each" else f"{self.rule}{self.size}"


def linear_rests(n: int, count: int) -> list[int]:
    """The weight of the second element of `count` linear bins on an axis of length n, in units of 1 / (2 count).

    The first element has the remaining weight.
    """
    return [rest for _, rest in _middles(n, count)]


@dataclass(frozen=True)
class Pathway:
    """Separable box pooling of [T, H, W, D] patches. Tokens are ordered by frame bin, then by row bin.

    A mean is the sum of a box divided by its frames, then its rows, then its columns. With linear bins it is the sum of
    elements times weights. A max propagates NaN and takes the first of equal elements.

    Attributes:
        name: Unique in a layout.
        frames: Rule that cuts the frames.
        rows: Rule that cuts the rows of the grid.
        cols: Rule that cuts the columns of the grid.
        reduce: "max" or "mean".
        flat: Whether the H * W patches of a frame are one row, so that column bins may span two rows of the grid.
        class_token: Whether the pathway reads the token before the patches, and no patch.
        pad: Minimum number of frame bins; zero tokens replace those that are missing.
    """

    name: str
    frames: AxisRule
    rows: AxisRule
    cols: AxisRule
    reduce: Reduction
    flat: bool = False
    class_token: bool = False
    pad: int = 0

    def shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) whose rows and columns this pathway cuts."""
        height, width = grid
        if self.class_token:
            return 1, 1
        if not self.flat:
            return grid
        # Flattened bins that never span two rows are boxes of one row on the grid itself.
        on_grid = self.rows.rule == "each" and self.cols.rule in ("each", "stride") and width % self.cols.size == 0
        return grid if on_grid else (1, height * width)

    @property
    def is_linear(self) -> bool:
        return self.rows.rule == "linear"

    def count_frames(self, frames: Count) -> Count:
        """Number of frame bins, with those that zeros replace."""
        bins = self.frames.count(frames)
        return at_least(bins, self.pad) if self.pad else bins

    def tokens_per_frame(self, grid: tuple[int, int], separators: int = 0) -> int:
        """Number of tokens of a frame bin, with `separators` separators after each row."""
        height, width = self.shape(grid)
        return self.rows.count(height) * (self.cols.count(width) + separators)

    def __str__(self) -> str:
        parts = [str(self.frames), str(self.rows), str(self.cols), self.reduce]
        if self.flat:
            parts.append("flat")
        if self.class_token:
            parts.append("class")
        if self.pad > 0:
            parts.append(f"pad{self.pad}")
        return f"{self.name}:{','.join(parts)}"


@dataclass(frozen=True)
class Separator:
    """A vector that the caller supplies, such as a learned newline.

    Attributes:
        name: Unique in a layout.
        where: After every "row" of tokens, after every "frame" (bin), "between" frames, or at the "end" of a video.
    """

    name: str
    where: Place

    def __str__(self) -> str:
        return f"{self.name}@{self.where}"


def _middles(n: int, count: int) -> list[tuple[int, int]]:
    """Floor and remainder of ((2 i + 1) n - count) / (2 count), the middle of segment i, for each segment."""
    return [divmod((2 * i + 1) * n - count, 2 * count) for i in range(count)]


def _linspace(stop: int, steps: int) -> list[int]:
    """int32(torch.linspace(0, stop, steps + 1)) in float32, as torch computes it with AVX2, on every machine.

    The first half counts up from 0, the second half down from `stop`, both with one rounding; torch without AVX2 rounds
    twice. i * stop // steps differs by one at e.g. (stop, steps) = (8, 14).
    """
    step = np.float64(np.float32(stop) / np.float32(steps))
    up = np.arange((steps + 1) // 2)
    down = np.arange(steps - len(up), -1, -1)
    return np.concatenate([step * up, stop - step * down]).astype(np.float32).astype(np.int32).tolist()


def at_least(count: Count, least: int) -> Count:
    """max(count, least), also while torch traces and for tensors."""
    if isinstance(count, int):
        return max(count, least)
    import torch

    return count.clamp(min=least) if isinstance(count, torch.Tensor) else torch.sym_max(count, least)

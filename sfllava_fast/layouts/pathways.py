"""What layouts are made of: bins that cut an axis, pathways that pool boxes of bins, separators between tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Range = tuple[int, int]
Count = Any  # a number (int), one that a trace leaves open (SymInt), or one of each video (Tensor)


@dataclass(frozen=True)
class AxisRule:
    """A rule that cuts an axis of length n into half-open ranges [start, stop).

    each      n bins of one element.
    stride    floor(n / size) bins of `size` elements; what is left over is dropped.
    adaptive  `size` bins, bin i = [floor(i n / size), ceil((i + 1) n / size)), as adaptive pooling cuts.
    linear    ceil(n / size) bins: the one or two elements around the middle of equal segments, between which a bilinear
              resize interpolates (align_corners=False, no antialias). Of rows and columns.
    linspace  `size` single elements at int32(torch.linspace(0, n, size + 1))[:-1], in float32.
    repeat    `size` bins: adaptive, but fewer than `size` elements are repeated as PLLaVA repeats frames: bin i is
              element i // (size // n + 1), which leaves the last ones out where n does not divide `size`.
    every     elements 0, size, 2 size, ...; others: all but those. Of frames.
    """

    rule: Literal["each", "stride", "adaptive", "linear", "linspace", "repeat", "every", "others"]
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
    """The weight of each of `count` linear bins' second element, on an axis of length n, in parts of 2 count; the first
    element has the rest."""
    return [rest for _, rest in _middles(n, count)]


@dataclass(frozen=True)
class Pathway:
    """Separable box pooling of [T, H, W, D] patches; tokens come out frame by frame, row by row.

    A mean is sum / frames / rows / columns of its box, between linear bins the sum of its elements by their weights; a
    max passes NaN on and keeps the first of equals.
    flat: pools the H*W patches of a frame as one row, so that column bins may straddle the rows of the grid.
    class_token: reads the token before the patches, and no patch.
    pad: zero tokens make up for frame bins lacking to so many.
    """

    name: str
    frames: AxisRule
    rows: AxisRule
    cols: AxisRule
    reduce: Literal["max", "mean"]
    flat: bool = False
    class_token: bool = False
    pad: int = 0

    def shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The H x W on which this pathway cuts its rows and columns."""
        height, width = grid
        if self.class_token:
            return 1, 1
        if not self.flat:
            return grid
        # Flattened pairs that never straddle a row are 1 x 2 boxes on the grid itself; other bins cut the whole row.
        on_grid = self.rows.rule == "each" and self.cols.rule in ("each", "stride") and width % self.cols.size == 0
        return grid if on_grid else (1, height * width)

    @property
    def is_linear(self) -> bool:
        return self.rows.rule == "linear"

    def count_frames(self, frames: Count) -> Count:
        """Frame bins, and those that zeros stand for."""
        bins = self.frames.count(frames)
        return at_least(bins, self.pad) if self.pad else bins

    def tokens_per_frame(self, grid: tuple[int, int], separators: int = 0) -> int:
        """Tokens of a frame bin, with so many separators behind each row of them."""
        height, width = self.shape(grid)
        return self.rows.count(height) * (self.cols.count(width) + separators)

    def __str__(self) -> str:
        parts = [self.frames, self.rows, self.cols, self.reduce]
        parts += ["flat"] * self.flat + ["class"] * self.class_token + [f"pad{self.pad}"] * (self.pad > 0)
        return f"{self.name}:{','.join(map(str, parts))}"


@dataclass(frozen=True)
class Separator:
    """A vector that the caller supplies, such as a learned newline, and where it stands.

    where: behind every "row" of tokens, behind every "frame" (bin), "between" frames, or at the "end" of a video.
    """

    name: str
    where: Literal["row", "frame", "between", "end"]

    def __str__(self) -> str:
        return f"{self.name}@{self.where}"


def _middles(n: int, count: int) -> list[tuple[int, int]]:
    """((2 i + 1) n - count) / (2 count), the middle of segment i in elements, as its floor and what is left in parts of
    2 count."""
    return [divmod((2 * i + 1) * n - count, 2 * count) for i in range(count)]


def _linspace(stop: int, steps: int) -> list[int]:
    """int32(torch.linspace(0, stop, steps + 1)) in float32, as torch computes it with AVX2, on every machine.

    The first half counts up from 0, the second down from `stop`, each with one rounding (torch's path without
    AVX2 rounds twice). i * stop // steps differs by one at e.g. (stop, steps) = (8, 14).
    """
    step = np.float64(np.float32(stop) / np.float32(steps))
    up = np.arange((steps + 1) // 2)
    down = np.arange(steps - len(up), -1, -1)
    return np.concatenate([step * up, stop - step * down]).astype(np.float32).astype(np.int32).tolist()


def at_least(count: Any, least: int) -> Any:
    if isinstance(count, int):
        return max(count, least)
    import torch

    return count.clamp(min=least) if isinstance(count, torch.Tensor) else torch.sym_max(count, least)

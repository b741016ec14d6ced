"""The token contract once more: float64, plain loops, nothing of the package. Slow, and easy to believe."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def sample_frames(total: int, count: int) -> list[int]:
    """Middles of equal segments; Python's round, like numpy's, takes halves to the even neighbour."""
    n = min(total, count)
    segment = float(total - 1) / n
    return [(round(segment * i) + round(segment * (i + 1))) // 2 for i in range(n)]


def slow_frames(frames: int, count: int) -> list[int]:
    """float32 linspace truncated: the step is rounded once, then each value once, the late ones down from the end."""
    step = Fraction(float(np.float32(frames) / np.float32(count)))
    early = (count + 1) // 2
    exact = [step * i if i < early else frames - step * (count - i) for i in range(count)]
    return [int(np.float32(float(value))) for value in exact]


def adaptive_bin(i: int, length: int, bins: int) -> range:
    return range(math.floor(Fraction(i * length, bins)), math.ceil(Fraction((i + 1) * length, bins)))


def tokens(x: np.ndarray, grid: tuple[int, int], slow: int, pool: str, fast: tuple[int, int] | None) -> np.ndarray:
    """Tokens [S, D] in float64 of patches x [T, H*W, D]; slow = 0 or fast = None leaves a pathway out."""
    x = x.astype(np.float64)
    rows = []
    for frame in slow_frames(len(x), slow) if slow else []:
        rows += slow_tokens(x[frame], grid, pool)
    for frame in x if fast else []:
        rows += fast_tokens(frame, grid, fast)
    return np.array(rows)


def slow_tokens(frame: np.ndarray, grid: tuple[int, int], pool: str) -> list[np.ndarray]:
    height, width = grid
    reduce = largest if "max" in pool else mean
    if pool == "concat":
        return list(frame)
    if "1d" in pool:
        return [reduce([frame[2 * i], frame[2 * i + 1]]) for i in range(len(frame) // 2)]
    corners = [(2 * r, 2 * c) for r in range(height // 2) for c in range(width // 2)]
    return [reduce([frame[(r + i) * width + c + j] for i in (0, 1) for j in (0, 1)]) for r, c in corners]


def fast_tokens(frame: np.ndarray, grid: tuple[int, int], fast: tuple[int, int]) -> list[np.ndarray]:
    height, width = grid
    out = []
    for i in range(fast[0]):
        for j in range(fast[1]):
            box = [(r, c) for r in adaptive_bin(i, height, fast[0]) for c in adaptive_bin(j, width, fast[1])]
            out.append(mean([frame[r * width + c] for r, c in box]))
    return out


def largest(patches: list[np.ndarray]) -> np.ndarray:
    return np.maximum.reduce(patches)  # passes NaN on


def mean(patches: list[np.ndarray]) -> np.ndarray:
    return sum(patches) / len(patches)

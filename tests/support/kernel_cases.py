"""What kernels are tested with: every kind of number, view and plan, and rows with guards around them."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from sfllava_fast.layouts.pathways import AxisRule, Pathway
from sfllava_fast.layouts.plan import PathwayTables, Plan
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every kind of number: normal, denormal, infinite, NaN with any payload."""
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(kind)
    return torch.randint(limits.min, limits.max + 1, shape, dtype=kind).view(dtype)


def few_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Ties, zeros of both signs, denormals and infinities side by side."""
    smallest = torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, smallest, -smallest, math.inf, -math.inf, math.nan], dtype=dtype)
    return values[torch.randint(len(values), shape)]


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


SOURCES = (normal, few_values, random_bits)
VIEWS = {
    "contiguous": lambda make, t, n, d: make((t, n, d)),
    "behind a CLS token": lambda make, t, n, d: make((t, n + 1, d))[:, 1:],
    "every other frame": lambda make, t, n, d: make((2 * t, n, d))[::2],
    "some channels": lambda make, t, n, d: make((t, n, d + 5))[:, :, 3 : 3 + d],
    "patch-major": lambda make, t, n, d: make((n, t, d)).transpose(0, 1),
    "one frame": lambda make, t, n, d: make((1, n, d)).expand(t, n, d),
    "one patch": lambda make, t, n, d: make((t, 1, d)).expand(t, n, d),
}

# Layout, frames of each video, grid: everything that a table can say, on few patches.
FIELD_LAYOUTS = {
    "class token, 3x3, frame by frame": (
        "class:each,each,each,max,class+pool:each,adaptive3,adaptive3,mean;interleaved;line@between",
        (2, 1),
        (3, 4),
    ),
    "class token alone": ("class:each,each,each,max,class", (2,), (2, 2)),
    "class token behind maxima": ("pool:each,stride2,each,max+class:adaptive1,each,each,mean,class", (3,), (3, 2)),
    "linear, even": ("pool:each,linear2,linear2,mean", (2,), (4, 4)),
    "linear, odd": ("pool:each,linear2,linear3,mean", (1,), (5, 7)),
    "linear, frames together": ("pool:adaptive2,linear2,linear2,mean+all:adaptive1,each,each,max", (3,), (2, 3)),
    "linear, packed videos": ("pool:stride3,linear2,linear2,mean+all:linspace1,each,each,mean", (4, 3), (1, 3)),
    "linear behind a class token": ("class:each,each,each,max,class+pool:each,linear3,linear2,mean", (1,), (4, 3)),
    "a newline behind each row": ("pool:each,stride2,stride2,mean;newline@row", (2,), (4, 4)),
    "two behind each row": ("pool:each,each,stride2,max;a@row;b@row;c@end", (1, 2), (2, 4)),
    "slow and fast, frame by frame": (
        "slow:every2,stride2,stride2,mean+fast:others2,each,stride4,max;line@row;end@frame;interleaved",
        (3,),
        (2, 4),
    ),
    "padded": ("temporal:each,adaptive1,adaptive1,mean,pad4+spatial:adaptive1,each,each,mean", (3, 2), (2, 2)),
    "repeated frames": ("pool:repeat4,adaptive2,adaptive2,mean", (3,), (2, 3)),
    "frames that nothing reads": ("pool:every2,each,stride2,mean", (4,), (2, 2)),
    "nested, frame by frame": (
        "fine:each,each,stride2,max+coarse:each,adaptive1,adaptive2,mean;interleaved;line@between",
        (2, 1),
        (2, 4),
    ),
    "nested, padded": ("fine:every2,each,stride2,mean,pad3+coarse:each,adaptive1,adaptive2,mean", (2, 1), (2, 4)),
}


def rows_without_patches(plan: Plan) -> list[int]:
    """Rows of the output that no kernel writes, and whose gradient none reads."""
    return [*plan.zeros, *(row for row, _ in plan.separator_rows)]


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, signs of zero included; a NaN for a NaN, whatever its payload."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got).masked_fill(nan, 0), bits(expected).masked_fill(nan, 0))


class GuardedRows:
    """Rows for the tokens inside a larger buffer, all of it filled with NaN."""

    def __init__(self, tokens: int, channels: int, dtype: torch.dtype, left: int = 3, right: int = 2, device="cpu"):
        self.poison = 0x7FA12345 if dtype == torch.float32 else 0x7F81 if dtype == torch.bfloat16 else 0x7C01
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        self.buffer = torch.full((tokens + 5, left + channels + right), self.poison, dtype=kind, device=device)
        self.rows = self.buffer.view(dtype)[2 : 2 + tokens, left : left + channels]

    def check(self) -> None:
        self.rows.view(self.buffer.dtype).fill_(self.poison)
        assert (self.buffer == self.poison).all(), "something was written outside the tokens"


@st.composite
def slowfast_calls(draw, channels: tuple[int, ...], frames: int = 6, side: int = 9, device: str = "cpu"):
    """(features, plan) of SlowFast layouts on any grid, odd, narrow, finer and coarser than the bins."""
    height, width, frames = draw(st.integers(1, side)), draw(st.integers(1, side)), draw(st.integers(1, frames))
    pools = [p for p in SLOW_POOLS if p == "concat" or (min(height, width) > 1 if "2d" in p else height * width > 1)]
    slow, pool = draw(st.integers(0, side - 1)), draw(st.sampled_from(pools))
    bins = st.integers(1, side + 1)
    fast = draw(st.tuples(bins, bins) if not slow else st.none() | st.tuples(bins, bins))
    plan = SlowFastLayout(slow, pool, fast).plan(frames, (height, width))
    return draw(features(frames, height * width, channels, device)), plan


@st.composite
def features(draw, frames: int, patches: int, channels: tuple[int, ...], device: str):
    dtype, make = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SOURCES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    view = VIEWS[draw(st.sampled_from(list(VIEWS)))]
    return view(lambda shape: make(shape, dtype).to(device), frames, patches, draw(st.sampled_from(channels)))


@st.composite
def pathway_tables(draw, lengths: tuple[int, ...], grid: tuple[int, int]):
    """Any separable pooling of any reduction, over several frames at a time too."""
    bins = st.builds(AxisRule, st.sampled_from(["each", "stride", "adaptive", "linspace"]), st.integers(1, 4))
    path = Pathway("any", draw(bins), draw(bins), draw(bins), draw(st.sampled_from(["max", "mean"])))
    shape = draw(st.sampled_from([grid, (1, grid[0] * grid[1])]))
    rows, cols = path.rows.cut(shape[0]) or ((0, shape[0]),), path.cols.cut(shape[1]) or ((0, shape[1]),)
    frames, start = [], 0
    for length in lengths:
        cut = path.frames.cut(length) or ((0, length),)
        frames.append(tuple((start + first, start + last) for first, last in cut))
        start += length
    return PathwayTables(path, shape, tuple(frames), rows, cols)


@st.composite
def any_calls(draw, channels: tuple[int, ...], frames: int = 4, side: int = 7, device: str = "cpu"):
    lengths = tuple(draw(st.lists(st.integers(1, frames), min_size=1, max_size=3)))
    grid = draw(st.integers(1, side)), draw(st.integers(1, side))
    tables = draw(st.lists(pathway_tables(lengths, grid), min_size=1, max_size=4))
    return draw(features(sum(lengths), grid[0] * grid[1], channels, device)), Plan(lengths, grid, tuple(tables))

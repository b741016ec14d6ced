"""The compiled CPU kernel against the reference, bit for bit, with every instruction set there is here."""

from __future__ import annotations

import math
import resource
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllava_fast import backends, reference, slowfast_aggregate
from sfllava_fast.config import SLOW_POOLS, Bins, Pathway, PathwayTables, Plan, SlowFastConfig
from sfllava_fast.table import plan_table

if reason := backends.load_library():
    pytest.skip(reason, allow_module_level=True)

LIBRARY = backends.cpu_library()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 7, 15, 16, 31, 32, 33, 64, 65, 127, 256, 1024)
PAPER = SlowFastConfig()


def available(name: bytes) -> bool:
    try:
        return LIBRARY.sfllava_force_isa(name)
    finally:
        LIBRARY.sfllava_force_isa(None)


ISAS = [name for name in (b"avx512", b"avx2", b"generic") if available(name)]
pytestmark = pytest.mark.parametrize("isa", ISAS, indirect=True, ids=[name.decode() for name in ISAS])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def isa(request):
    assert LIBRARY.sfllava_force_isa(request.param)
    yield request.param
    LIBRARY.sfllava_force_isa(None)


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
    values = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, smallest, -smallest, math.inf, -math.inf, math.nan], dtype=dtype
    )
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


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, signs of zero included; a NaN for a NaN, whatever its payload."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got).masked_fill(nan, 0), bits(expected).masked_fill(nan, 0))


class GuardedRows:
    """Rows for the tokens inside a larger buffer, all of it filled with NaN."""

    def __init__(self, tokens: int, channels: int, dtype: torch.dtype, left: int = 3, right: int = 2) -> None:
        self.poison = 0x7FA12345 if dtype == torch.float32 else 0x7F81 if dtype == torch.bfloat16 else 0x7C01
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        self.buffer = torch.full((tokens + 5, left + channels + right), self.poison, dtype=kind)
        self.rows = self.buffer.view(dtype)[2 : 2 + tokens, left : left + channels]

    def check(self) -> None:
        self.rows.view(self.buffer.dtype).fill_(self.poison)
        assert (self.buffer == self.poison).all(), "something was written outside the tokens"


def check_plan(x: torch.Tensor, plan: Plan) -> None:
    out = GuardedRows(plan.offsets[-1], x.shape[2], x.dtype)
    torch.ops.sfllava_fast.pool(x, plan_table(plan), out.rows)
    assert_same(out.rows, reference.aggregate(x, plan))
    out.check()


@st.composite
def slowfast_calls(draw):
    """(features, plan) of SlowFast layouts on any grid, odd, narrow, finer and coarser than the bins."""
    height, width, frames = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    pools = [
        p
        for p in SLOW_POOLS
        if p == "concat" or (min(height, width) > 1 if "2d" in p else height * width > 1)
    ]
    slow, pool = draw(st.integers(0, 8)), draw(st.sampled_from(pools))
    side = st.integers(1, 10)
    fast = draw(st.tuples(side, side) if not slow else st.none() | st.tuples(side, side))
    return draw(features(frames, height * width)), SlowFastConfig(slow, pool, fast).plan(
        frames, (height, width)
    )


@st.composite
def features(draw, frames: int, patches: int):
    dtype, make = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SOURCES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    view = VIEWS[draw(st.sampled_from(list(VIEWS)))]
    return view(lambda shape: make(shape, dtype), frames, patches, draw(st.sampled_from(CHANNELS)))


@settings(max_examples=150)
@given(slowfast_calls())
def test_slowfast_layouts(isa, call):
    check_plan(*call)


@st.composite
def pathway_tables(draw, lengths: tuple[int, ...], grid: tuple[int, int]):
    """Any separable pooling of any reduction, over several frames at a time too."""
    bins = st.builds(Bins, st.sampled_from(["each", "stride", "adaptive", "linspace"]), st.integers(1, 4))
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
def any_calls(draw):
    lengths = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    grid = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    tables = draw(st.lists(pathway_tables(lengths, grid), min_size=1, max_size=4))
    return draw(features(sum(lengths), grid[0] * grid[1])), Plan(lengths, grid, tuple(tables))


@settings(max_examples=100)
@given(any_calls())
def test_any_pathways_of_packed_videos(isa, call):
    check_plan(*call)


@dtypes
@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("pool", SLOW_POOLS)
def test_the_papers_grid(isa, dtype, make, pool):
    check_plan(make((5, 577, 72), dtype)[:, 1:], SlowFastConfig(4, pool).plan(5, (24, 24)))


@dtypes
@pytest.mark.parametrize("shift", [0, 1, 4], ids=["aligned", "element off", "16 bytes off"])
def test_outputs_that_outgrow_the_cache(isa, dtype, shift):
    """Aligned rows from 4 MB on are written around the cache; rows that are not aligned must not be."""
    channels, plan = 1024, SlowFastConfig(8, "concat", (4, 4)).plan(3, (24, 24))
    x = normal((3, 577, channels), dtype)[:, 1:]
    tokens = plan.tokens["total"]
    buffer = torch.full((tokens * channels + 128,), 7.0, dtype=dtype)
    start = -(buffer.data_ptr() // buffer.element_size()) % 64 + shift
    out = buffer[start : start + tokens * channels].view(tokens, channels)
    assert out.nbytes >= 4 << 20 and (out.data_ptr() % 64 == 0) == (shift == 0)
    torch.ops.sfllava_fast.pool(x, plan_table(plan), out)
    assert_same(out, reference.aggregate(x, plan))
    assert (buffer[:start] == 7).all() and (buffer[start + tokens * channels :] == 7).all()


@pytest.mark.parametrize("pitch", [1024 + 1, 1024 + 64])
def test_large_outputs_with_a_pitch(isa, pitch):
    plan = SlowFastConfig(8, "spatial_1d_max_pool", (4, 4)).plan(3, (24, 24))
    x = normal((3, 576, 1024), torch.bfloat16)
    buffer = torch.full((plan.tokens["total"], pitch), 7.0, dtype=torch.bfloat16)
    torch.ops.sfllava_fast.pool(x, plan_table(plan), buffer[:, :1024])
    assert_same(buffer[:, :1024], reference.aggregate(x, plan))
    assert (buffer[:, 1024:] == 7).all()


@dtypes
def test_sums_longer_than_the_cache(isa, dtype):
    check_plan(
        normal((2, 12, 20001), dtype), SlowFastConfig(2, "spatial_1d_avg_pool", (2, 3)).plan(2, (3, 4))
    )


def lazily_backed(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Memory that the system hands out page by page, as it is touched."""
    reach = sum((size - 1) * step for size, step in zip(shape, stride)) + 1
    assert reach > 2**31
    return torch.empty(reach, dtype=torch.bfloat16).as_strided(shape, stride)


@pytest.mark.parametrize(
    "shape, stride",
    [((9000, 16, 8), (2**18, 8, 1)), ((3, 16, 8), (8, 2**27 + 2**24, 1))],
    ids=["far frames", "far patches"],
)
def test_features_past_2_to_the_31(isa, shape, stride):
    x = lazily_backed(shape, stride)
    config = SlowFastConfig(3, "spatial_1d_avg_pool", None)
    picked = config.plan(shape[0], (4, 4)).slow_frames
    near = normal((3, 16, 8), torch.bfloat16)
    for frame, values in zip(picked, near):
        x[frame] = values
    got = slowfast_aggregate(x, config, backend="cpu")
    assert_same(got, reference.aggregate(near, config.plan(3, (4, 4))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # kilobytes


def test_tokens_past_2_to_the_31(isa):
    plan = SlowFastConfig(3, "concat", (1, 1)).plan(3, (4, 4))
    out = lazily_backed((plan.tokens["total"], 8), (2**26, 1))
    x = normal((3, 16, 8), torch.bfloat16)
    assert_same(
        slowfast_aggregate(x, "slowfast-slow_3frms_concat-fast_1x1", out=out, backend="cpu"),
        reference.aggregate(x, plan),
    )


@dtypes
def test_same_bits_in_every_run_with_any_number_of_threads(isa, dtype, torch_threads):
    x = normal((12, 576, 320), dtype)  # 2.2 million elements: work for several threads
    first = slowfast_aggregate(x, PAPER, backend="cpu")
    for threads in (1, 2, 3, 2):
        torch_threads(threads)
        assert torch.equal(bits(slowfast_aggregate(x, PAPER, backend="cpu")), bits(first))


def test_calls_from_two_threads_at_once(isa):
    inputs = [normal((4, 576, channels), torch.float32) for channels in (64, 1000)]
    expected = [reference.aggregate(x, PAPER.plan(4, (24, 24))) for x in inputs]
    start, wrong = threading.Barrier(2), []

    def work(mine: int) -> None:
        start.wait()
        for turn in range(6):
            which = (
                mine + turn
            ) % 2  # the running sums of a thread grow, and are used again for fewer channels
            if not torch.equal(slowfast_aggregate(inputs[which], PAPER, backend="cpu"), expected[which]):
                wrong.append((mine, turn))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_channel_needs_no_unit_stride(isa):
    x = normal((3, 16, 6), torch.float32)[:, :, 2:3].as_strided((3, 16, 1), (96, 6, 5))
    plan = SlowFastConfig(2).plan(3, (4, 4))
    assert_same(slowfast_aggregate(x, SlowFastConfig(2), backend="cpu"), reference.aggregate(x, plan))


def test_the_instruction_set_is_chosen_by_name(isa):
    assert LIBRARY.sfllava_isa() == isa
    assert not LIBRARY.sfllava_force_isa(b"mmx") and LIBRARY.sfllava_isa() == isa
    LIBRARY.sfllava_force_isa(None)
    assert LIBRARY.sfllava_isa() == ISAS[0]


PLAN = plan_table(SlowFastConfig(2).plan(3, (4, 4)))
ROWS = 2 * 8 + 3 * 16
BAD_KERNEL_CALLS = {
    "fewer frames than the plan": lambda x, out: (x[1:], PLAN, out),
    "fewer patches than the plan": lambda x, out: (x[:, 1:], PLAN, out),
    "fewer tokens than the plan": lambda x, out: (x, PLAN, out[1:]),
    "other channels": lambda x, out: (x, PLAN, out[:, 1:]),
    "another dtype": lambda x, out: (x, PLAN, out.half()),
    "float64": lambda x, out: (x.double(), PLAN, out.double()),
    "features of 2-D": lambda x, out: (x[0], PLAN, out),
    "no unit stride": lambda x, out: (x.transpose(1, 2).contiguous().transpose(1, 2), PLAN, out),
    "a plan of another type": lambda x, out: (x, PLAN.long(), out),
    "a plan with gaps": lambda x, out: (x, torch.stack([PLAN, PLAN], 1)[:, 0], out),
    "a plan cut short": lambda x, out: (x, PLAN[:-1], out),
    "an empty plan": lambda x, out: (x, PLAN[:0], out),
    "a plan of another version": lambda x, out: (x, PLAN + (torch.arange(len(PLAN)) == 0), out),
}


@pytest.mark.parametrize("call", BAD_KERNEL_CALLS)
def test_the_kernel_itself_refuses_what_it_cannot_read(isa, call):
    out = torch.full((ROWS, 8), 7.0)
    with pytest.raises(RuntimeError):
        torch.ops.sfllava_fast.pool(*BAD_KERNEL_CALLS[call](torch.zeros(3, 16, 8), out))
    assert (out == 7).all()

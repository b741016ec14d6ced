"""Layouts, bins, counts and the sampling rule, against the contract written out by hand or in oracle.py."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sfllava_fast
from sfllava_fast.errors import InputError, LayoutError
from sfllava_fast.layouts.layout import PLANS, square_grid
from sfllava_fast.layouts.pathway_layout import Pathways
from sfllava_fast.layouts.pathways import AxisRule
from sfllava_fast.layouts.plan import ByteCache
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.layouts.sampling import sample_frames
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout
from sfllava_fast.ops.backends.plan_table import on_device, plan_table
from sfllava_fast.ops.backends.reference import aggregate
from sfllava_fast.ops.separators import write_separators

PAPER = "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"
counts = st.integers(1, 2**20)
configs = st.builds(
    SlowFastLayout,
    slow_frames=counts,
    slow_pool=st.sampled_from(SLOW_POOLS),
    fast_grid=st.none() | st.tuples(counts, counts),
)


def one_line(error: pytest.ExceptionInfo) -> bool:
    return bool(str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "frames", "grid", "slow", "fast"),
    [
        (PAPER, 50, (24, 24), 2880, 800),
        ("slowfast-slow_10frms_concat-fast_4x4", 50, (24, 24), 5760, 800),
        ("slowfast-slow_10frms_spatial_2d_max_pool-fast_4x4", 50, (24, 24), 1440, 800),
        ("slowfast-slow_4frms_spatial_1d_avg_pool-fast_2x2", 16, (8, 8), 128, 64),
        ("slowfast-slow_10frms_spatial_1d_max_pool", 50, (24, 24), 2880, 0),
        ("slowfast-fast_4x4", 50, (24, 24), 0, 800),
        (PAPER, 1, (24, 24), 2880, 16),  # fewer frames than slow ones: they repeat
        ("slowfast-slow_1frms_spatial_1d_max_pool-fast_1x1", 3, (5, 5), 12, 3),  # the 25th token is dropped
        ("slowfast-slow_1frms_spatial_2d_avg_pool-fast_1x1", 3, (5, 7), 6, 3),
        ("slowfast-slow_2frms_spatial_1d_max_pool-fast_6x7", 2, (4, 4), 16, 84),  # up-sampling
    ],
)
def test_token_counts(layout, frames, grid, slow, fast):
    config = SlowFastLayout.parse(layout)
    plan = config.plan(frames, grid)
    assert plan.tokens == {"slow": slow, "fast": fast, "total": slow + fast}
    assert plan.offsets == (0, slow + fast)
    assert config.count_tokens(frames, grid) == slow + fast
    assert len(plan.slow_frames) == config.slow_frames


@pytest.mark.parametrize("frames", [*range(1, 34), 50, 64, 100, 128, 300])
def test_slow_frames_follow_the_contract(frames):
    for count in range(1, 65):
        picked = SlowFastLayout(slow_frames=count).plan(frames, (2, 2)).slow_frames
        assert picked == oracle.slow_frames(frames, count)
        # Exact arithmetic, but for float32 falling just short of a whole number.
        for i, frame in enumerate(picked):
            floor, rest = divmod(i * frames, count)
            assert frame == floor or (frame == floor - 1 and rest == 0)


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (50, 10, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]),
        (4, 10, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (1, 3, [0, 0, 0]),
        (3, 1, [0]),
    ],
)
def test_slow_frames_by_hand(frames, count, expected):
    assert SlowFastLayout(slow_frames=count).plan(frames, (2, 2)).slow_frames == expected


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's linspace rounds twice where it has no fused multiply-add",
)
@given(st.integers(1, 4096), st.integers(1, 200))
def test_slow_frames_are_those_of_torch(frames, count):
    picks = torch.linspace(0, frames, count + 1, dtype=torch.float32).int().tolist()[:-1]
    assert SlowFastLayout(slow_frames=count).plan(frames, (2, 2)).slow_frames == picks


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (8, [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7]),
        (64, [0, 4, 9, 13, 18, 22, 27, 31, 36, 41, 45, 50, 54, 59]),
    ],
)
def test_slow_frames_are_not_floored_integers(frames, expected):
    assert SlowFastLayout(slow_frames=14).plan(frames, (2, 2)).slow_frames == expected
    assert expected != [i * frames // 14 for i in range(14)]


@given(st.integers(1, 100), st.integers(1, 100))
def test_adaptive_bins(length, bins):
    cut = AxisRule("adaptive", bins).cut(length)
    assert [range(*b) for b in cut] == [oracle.adaptive_bin(i, length, bins) for i in range(bins)]
    assert len(cut) == AxisRule("adaptive", bins).count(length)


def test_adaptive_bins_overlap_and_repeat():
    assert AxisRule("adaptive", 4).cut(7) == ((0, 2), (1, 4), (3, 6), (5, 7))
    assert AxisRule("adaptive", 4).cut(3) == ((0, 1), (0, 2), (1, 3), (2, 3))
    assert AxisRule("adaptive", 3).cut(1) == ((0, 1), (0, 1), (0, 1))


@pytest.mark.parametrize("rule", ["each", "stride", "adaptive", "linspace"])
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_bins_count_what_they_cut(rule, length):
    for size in (1, 2, 3):
        bins = AxisRule(rule, size)
        assert len(bins.cut(length)) == bins.count(length)
        assert all(0 <= start < stop <= length for start, stop in bins.cut(length))


def test_an_odd_width_straddles_rows():
    table = SlowFastLayout(slow_frames=1, fast_grid=None).plan(1, (3, 3)).pathways[0]
    assert table.shape == (1, 9) and table.cols == ((0, 2), (2, 4), (4, 6), (6, 8))


@given(st.integers(1, 5000), st.integers(1, 200))
def test_sampling_rule(total, count):
    frames = sample_frames(total, count)
    assert frames == oracle.sample_frames(total, count)
    assert frames == sorted(frames) and frames[0] >= 0 and frames[-1] < total and len(frames) == min(total, count)


def test_sampling_by_hand():
    assert sample_frames(1, 50) == [0]
    assert sample_frames(4, 8) == [0, 1, 2, 2]  # edges 0, 0.75, 1.5 -> 2, 2.25, 3
    assert sample_frames(6, 2) == [1, 3]  # the edge 2.5 goes to 2, not 3
    assert sample_frames(8, 2) == [2, 5]  # the edge 3.5 goes to 4


@pytest.mark.parametrize(("total", "count"), [(0, 5), (5, 0), (-1, 5)])
def test_nothing_to_sample(total, count):
    with pytest.raises(InputError) as error:
        sample_frames(total, count)
    assert one_line(error)


@given(configs)
def test_strings_round_trip(config):
    again = SlowFastLayout.parse(str(config))
    assert again == config and hash(again) == hash(config) and str(again) == str(config)
    assert SlowFastLayout.parse(config) is config


def test_string_without_slow_frames_round_trips():
    config = SlowFastLayout(slow_frames=0, fast_grid=(3, 5))
    assert str(config) == "slowfast-fast_3x5"
    assert SlowFastLayout.parse(str(config)) == config


def test_the_defaults_are_the_papers():
    assert SlowFastLayout() == SlowFastLayout.parse(PAPER)
    assert str(SlowFastLayout()) == PAPER
    assert SlowFastLayout(fast_grid=[4, 4]) == SlowFastLayout()


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "slowfast",
        "slow_10frms_concat",
        "slowfast-slow_10frms-fast_4x4",
        "slowfast-slow_10frms_median_pool-fast_4x4",
        "slowfast-slow_0frms_concat-fast_4x4",
        "slowfast-slow_-1frms_concat-fast_4x4",
        "slowfast-slow_10frms_concat-fast_0x4",
        "slowfast-slow_10frms_concat-fast_4",
        "slowfast-slow_10frms_concat-fast_4x4 ",
        "slowfast-slow_10frms_concat-fast_4x4\n",
        "SLOWFAST-fast_4x4",
        "slowfast-slow_99999999frms_concat",
        f"slowfast-slow_{'9' * 5000}frms_concat",
        "slowfast-fast_4x4-slow_10frms_concat",
        "slowfast-slow_१०frms_concat",
        None,
        7,
        ["slowfast-fast_4x4"],
    ],
)
def test_bad_strings(layout):
    with pytest.raises(LayoutError) as error:
        SlowFastLayout.parse(layout)
    assert one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"slow_frames": -1},
        {"slow_frames": 2.0},
        {"slow_frames": True},
        {"slow_frames": "10"},
        {"slow_frames": 2**20 + 1},
        {"slow_pool": "median"},
        {"slow_pool": None},
        {"fast_grid": (0, 4)},
        {"fast_grid": (4,)},
        {"fast_grid": (4, 4, 4)},
        {"fast_grid": (4.0, 4)},
        {"fast_grid": "44"},
        {"fast_grid": 4},
        {"slow_frames": 0, "fast_grid": None},
    ],
)
def test_bad_values(values):
    with pytest.raises(LayoutError) as error:
        SlowFastLayout(**values)
    assert one_line(error)


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        SlowFastLayout().slow_frames = 3


def test_one_pathway_alone():
    config = SlowFastLayout.parse(PAPER)
    assert str(config.only("slow")) == "slowfast-slow_10frms_spatial_1d_max_pool"
    assert str(config.only("fast")) == "slowfast-fast_4x4"
    with pytest.raises(LayoutError):
        config.only("medium")
    with pytest.raises(LayoutError):
        config.only("slow").only("fast")


def test_plans_are_cached():
    config = SlowFastLayout(slow_frames=3)
    assert config.plan(7, (4, 4)) is SlowFastLayout(slow_frames=3).plan((7,), [4, 4])


def test_cached_plans_are_bounded_in_bytes(monkeypatch):
    """Of everything that is kept with them, as tracemalloc finds it."""
    cache = ByteCache(4 << 20)
    monkeypatch.setattr("sfllava_fast.layouts.layout.PLANS", cache)
    layouts = "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4", "llava_next_video-newline_grid", "pllava"
    layouts += "llava_video_slowfast", "red_villm"
    for layout in map(parse_layout, layouts):
        cache.clear()
        gc.collect()
        tracemalloc.start()
        try:
            for frames in range(600, 640):
                plan = layout.plan(frames, (24, 24))
                table = plan_table(plan), write_separators(torch.empty(plan.offsets[-1], 1), plan, None)
                del plan, table
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert cache.nbytes <= cache.most and taken < 1.5 * cache.most, (layout, taken, cache.nbytes)


def test_a_cache_drops_the_oldest():
    cache = ByteCache(100)
    for key in "abc":
        cache.keep(key, key.upper(), 40)
    assert (cache.find("a"), cache.find("b"), cache.find("c"), cache.nbytes) == (None, "B", "C", 80)
    cache.keep("c", "D", 50)
    assert cache.find("c") == "D" and cache.nbytes == 90
    cache.keep("e", "E", 1000)  # the newest is kept whatever its size
    assert len(cache) == 1 and cache.find("e") == "E" and cache.nbytes == 1000
    cache.clear()
    assert not len(cache) and not cache.nbytes


def test_what_is_made_of_a_plan_goes_with_it():
    plan = SlowFastLayout(2).plan(5, (4, 4))
    table = plan_table(plan)
    assert plan_table(plan) is table and on_device(table, torch.device("cpu")) is on_device(table, torch.device("cpu"))
    seen = weakref.ref(plan)
    PLANS.clear()
    del plan, table
    gc.collect()
    assert seen() is None


def test_a_plan_of_several_videos():
    plan = SlowFastLayout(slow_frames=2, fast_grid=(1, 1)).plan((3, 1, 4), (2, 2))
    assert plan.slow_frames == [0, 1, 3, 3, 4, 6]
    assert plan.offsets == (0, 7, 12, 20)  # 2 * 2 slow and one fast token per frame
    assert plan.tokens == {"slow": 12, "fast": 8, "total": 20}
    assert plan.offsets[-1] == SlowFastLayout(slow_frames=2, fast_grid=(1, 1)).count_packed_tokens(8, (2, 2), videos=3)


@pytest.mark.parametrize("lengths", [(), 0, (3, 0), (-1,)])
def test_plans_need_frames(lengths):
    with pytest.raises(InputError) as error:
        SlowFastLayout().plan(lengths, (4, 4))
    assert one_line(error)


@pytest.mark.parametrize(
    ("pool", "grid"),
    [("spatial_2d_max_pool", (1, 9)), ("spatial_2d_avg_pool", (9, 1)), ("spatial_1d_max_pool", (1, 1))],
)
def test_a_grid_too_small_for_the_pooling(pool, grid):
    with pytest.raises(LayoutError) as error:
        SlowFastLayout(slow_pool=pool).plan(4, grid)
    assert one_line(error)


def test_square_grids():
    assert square_grid(576) == (24, 24) and square_grid(1) == (1, 1)
    with pytest.raises(InputError, match=r"features\[:, 1:\]"):
        square_grid(577)
    with pytest.raises(InputError, match="grid="):
        square_grid(575)


@pytest.mark.parametrize(
    ("text", "frames", "tokens"),
    [
        ("pool:each,stride2,stride2,mean", 5, 5 * 3 * 3),
        ("pool:adaptive16,adaptive12,adaptive12,mean", 5, 16 * 12 * 12),
        ("mean:adaptive1,each,each,mean", 5, 36),
        ("slow:linspace2,each,stride2,max,flat+fast:each,adaptive4,adaptive3,mean", 5, 2 * 18 + 5 * 12),
    ],
)
def test_layouts_of_any_pathways(text, frames, tokens):
    layout = parse_layout(text)
    assert str(layout) == text and parse_layout(str(layout)) == layout
    assert layout.count_tokens(frames, (6, 6)) == layout.plan(frames, (6, 6)).tokens["total"] == tokens


@pytest.mark.parametrize("grid", [(3, 4), (3, 5), (4, 6), (1, 7)])
@pytest.mark.parametrize("cols", ["each", "stride2", "stride3", "adaptive2", "adaptive5", "adaptive6"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_flat_cuts_the_patches_of_a_frame_as_one_row(cols, reduce, grid):
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (2, grid[0] * grid[1], 3)).astype(np.float64)
    number = int(cols[-1]) if cols != "each" else 1
    if cols.startswith("adaptive"):
        bins = [oracle.adaptive_bin(i, x.shape[1], number) for i in range(number)]
    else:
        bins = [range(i, i + number) for i in range(0, x.shape[1] - number + 1, number)]
    pool = oracle.largest if reduce == "max" else oracle.mean
    expected = np.array([pool([frame[i] for i in bin]) for frame in x for bin in bins])
    layout = parse_layout(f"pool:each,each,{cols},{reduce},flat")
    assert layout.count_tokens(2, grid) == layout.plan(2, grid).tokens["total"] == len(expected)
    assert np.allclose(aggregate(torch.tensor(x), layout.plan(2, grid)).numpy(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rows", ["stride2", "stride3"])
def test_flat_leaves_no_rows_to_stride_over(rows):
    for width in (4, 5):
        with pytest.raises(LayoutError, match="leaves no token"):
            parse_layout(f"pool:each,{rows},stride2,max,flat").plan(2, (4, width))


@pytest.mark.parametrize("frames", ["stride4", "others8", "others1", "each", "every3"])
@pytest.mark.parametrize("options", ["a@between", "a@between;b@end", "a@frame;b@between;c@row", "b@end"])
def test_tokens_are_counted_of_videos_too_short_for_any(frames, options):
    layout = parse_layout(f"pool:{frames},each,stride2,mean;{options}")
    lengths = (1, 4, 2, 9, 3)
    try:
        plan = layout.plan(lengths, (2, 2))
    except LayoutError:
        assert frames == "others1"
        return
    counted = [layout.count_tokens(n, (2, 2)) for n in lengths]
    assert counted == list(np.diff(plan.offsets)) and min(counted) >= 0
    assert layout.count_tokens(torch.tensor(lengths), (2, 2)).tolist() == counted
    if layout.is_affine:
        assert layout.count_packed_tokens(sum(lengths), (2, 2), len(lengths)) == plan.offsets[-1]


def test_slowfast_is_two_pathways():
    config = SlowFastLayout(3, "spatial_2d_avg_pool", (2, 5))
    same = Pathways(config.pathways)
    assert str(same) == "slow:linspace3,stride2,stride2,mean+fast:each,adaptive2,adaptive5,mean"
    assert same.plan((4, 7), (6, 6)).pathways == config.plan((4, 7), (6, 6)).pathways
    assert parse_layout(str(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        "pool:each,stride2,stride2", "pool:each,stride2,stride0,mean", "pool:each,stride2,stride2,median",
        "pool:linear2,each,each,mean", "a:each,each,each,max+a:each,each,each,max", "a:each,each,each,max+",
        "a b:each,each,each,max", ":each,each,each,max", "pool:each3,each,each,max",
        f"pool:each,stride{2**20 + 1},each,max", ":",
    ],
)  # fmt: skip
def test_bad_pathways(text):
    with pytest.raises(LayoutError) as error:
        parse_layout(text)
    assert "\n" not in str(error.value)


def test_a_layout_needs_a_pathway():
    with pytest.raises(LayoutError):
        Pathways(())


def test_layouts_need_numpy_alone(tmp_path):
    """In a process that cannot import torch: presets, plans, counts, sampling."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.modules['torch'] = None\n"
        "from sfllava_fast import SlowFastLayout, layouts, sample_frames\n"
        "for name, preset in layouts.PRESETS.items():\n"
        "    layout = layouts.parse_layout(name)\n"
        "    pictures = layout.count_pictures(len(sample_frames(1000, layout.frames)))\n"
        "    plan = layout.plan(pictures, preset.grid)\n"
        "    assert plan.tokens['total'] == layout.count_tokens(pictures, preset.grid) == preset.count_tokens()\n"
        "print(SlowFastLayout().count_tokens(50, (24, 24)))"
    )
    root = str(Path(sfllava_fast.__file__).parents[1])
    command = [sys.executable, script]
    done = subprocess.run(command, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3680\n", "")

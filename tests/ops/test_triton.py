"""The Triton kernels without a GPU: through the interpreter, compiled ahead of time, and how plans are tiled."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from sass import most_in_flight
from triton_process import HERE, LEAST_OCCUPANCY, in_registers, interpret, run

from sfllava_fast.layouts.pathway_layout import Pathways
from sfllava_fast.layouts.pathways import AxisRule, Pathway
from sfllava_fast.layouts.plan import PathwayTables, Plan
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.ops.backends import registry

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

_REGISTERS, _MOST_WARPS, _BLOCK_BYTES = 65536, 32, 512  # of a multiprocessor; of programs on it, each one warp; a patch
# A multiprocessor's share of bandwidth x latency: 8 TB/s x 0.8 us / 148 on the largest device that is compiled for.
_BYTES_IN_FLIGHT = 44 << 10


def test_in_the_interpreter():
    interpret("triton_interpreted.py")


# --- compiled ahead of time


@pytest.fixture(scope="module", params=["80", "90", "100"], ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton")
    run(str(HERE / "triton_ahead.py"), request.param, str(out / "kernels.json"), TRITON_CACHE_DIR=str(out / "cache"))
    return json.loads((out / "kernels.json").read_text())


def accesses(ptx: str, kind: str) -> list[str]:
    """Widths of the global loads or stores, those of the table (one 32-bit number a program) left out."""
    widths = re.findall(rf"{kind}\.global\.(\S+)", ptx)
    return [width for width in widths if width != "b32" or kind == "st"]


def test_16_bytes_a_lane_where_addresses_allow(compiled):
    for kernel in compiled:
        widths = accesses(kernel["ptx"], "ld") + accesses(kernel["ptx"], "st")
        expected = "v4.b32" if kernel["vector"] > 1 else "b16"
        assert set(widths) == {expected}, kernel["name"]
        assert ("LDG.E.128" in kernel["sass"]) == ("STG.E.128" in kernel["sass"]) == (kernel["vector"] > 1)


def test_every_patch_of_a_tile_is_loaded_once_and_a_strip_at_a_time(compiled):
    tiles = [kernel for kernel in compiled if kernel["kernel"] == "pool_tiles" and kernel["vector"] > 1]
    assert len(tiles) == 6
    for kernel in tiles:
        width, fine_rows, fine_cols, *_ = kernel["constants"]
        assert len(accesses(kernel["ptx"], "ld")) == width * fine_rows
        assert len(accesses(kernel["ptx"], "st")) == width // fine_cols + 1
        order = re.findall(r"LDG\.E\.128|STG\.E\.128|FADD", kernel["sass"])
        assert order[: width * fine_rows] == ["LDG.E.128"] * (width * fine_rows), "arithmetic waits for single loads"


def test_a_strip_of_a_backward_is_in_flight_at_once_and_every_patch_is_written_once(compiled):
    tiles = [kernel for kernel in compiled if kernel["kernel"] == "spread_tiles" and kernel["vector"] > 1]
    assert len(tiles) == 4
    for kernel in tiles:
        width, fine_rows, fine_cols, mean, repeats, *_ = kernel["constants"]
        patches, boxes = width * fine_rows, width // fine_cols
        read = 0 if mean or fine_rows * fine_cols == 1 else patches  # features, where a box has a maximum to find
        # The coarse gradient; a strip before the loop and one in it; what repeats.
        assert len(accesses(kernel["ptx"], "ld")) == 1 + 2 * (boxes + read) + boxes * repeats
        assert most_in_flight(kernel["sass"]) >= boxes + read, kernel["name"]
        assert len(accesses(kernel["ptx"], "st")) == 2 * patches  # with a fine pathway on the frame and without


def test_no_local_memory_and_enough_in_flight(compiled):
    for kernel in compiled:
        assert in_registers(kernel), kernel["name"]
        warps = min(_MOST_WARPS, _REGISTERS // (-(-kernel["registers"] // 8) * 8 * 32))
        if "boxes" in kernel["kernel"]:
            assert warps >= LEAST_OCCUPANCY * _MOST_WARPS, (kernel["kernel"], kernel["registers"])
        if kernel["kernel"] == "pool_tiles" and kernel["vector"] > 1:
            width, fine_rows, *_ = kernel["constants"]
            assert warps * width * fine_rows * _BLOCK_BYTES >= _BYTES_IN_FLIGHT, (kernel["name"], kernel["registers"])


def test_arithmetic_is_ieee(compiled):
    for kernel in compiled:
        assert not re.search(r"\.ftz|fma|(add|sub|mul)\.f32|div\.(full|approx)|rcp", kernel["ptx"])
        assert "div.rn.f32" in kernel["ptx"]


# --- tiles


def tiling(plan: Plan):
    return importlib.import_module("sfllava_fast._triton.tiling").find_tiling(plan)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    return registry.triton_kernels()


def test_the_default_layout_is_tiled():
    found = tiling(SlowFastLayout().plan(50, (24, 24)))
    assert (found.width, found.strips, found.tile_rows, found.tile_cols) == (6, 6, 4, 4)
    assert (found.fine_rows, found.fine_cols, found.fine_mean, found.repeats) == (1, 2, False, False)


@pytest.mark.parametrize(
    "layout, fine",
    [
        ("concat", (1, 1, False)),
        ("spatial_1d_max_pool", (1, 2, False)),
        ("spatial_1d_avg_pool", (1, 2, True)),
        ("spatial_2d_max_pool", (2, 2, False)),
        ("spatial_2d_avg_pool", (2, 2, True)),
    ],
)
def test_every_slow_pooling_is_tiled(layout, fine):
    found = tiling(SlowFastLayout(10, layout, (4, 4)).plan((4, 50), (24, 24)))
    assert (found.fine_rows, found.fine_cols, found.fine_mean) == fine and found.repeats


def table(frames, rows, cols, reduce, shape=(4, 4)):
    path = Pathway("any", AxisRule("each"), AxisRule("each"), AxisRule("each"), reduce)
    return PathwayTables(path, shape, (tuple(frames),), tuple(rows), tuple(cols))


ONE, TWO, FOUR = [(i, i + 1) for i in range(4)], [(0, 2), (2, 4)], [(0, 4)]
FRAMES = ONE[:2]
FINE, COARSE = table(FRAMES, ONE, TWO, "max"), table(FRAMES, TWO, TWO, "mean")
NOT_NESTED = {
    "one pathway": [COARSE],
    "three pathways": [FINE, FINE, COARSE],
    "the mean first": [COARSE, FINE],
    "a coarse maximum": [FINE, table(FRAMES, TWO, TWO, "max")],
    "a frame that only the fine pathway reads": [FINE, table(FRAMES[:1], TWO, TWO, "mean")],
    "a frame in two coarse items": [FINE, table([*FRAMES, FRAMES[0]], TWO, TWO, "mean")],
    "means of several frames": [FINE, table([(0, 2)], TWO, TWO, "mean")],
    "fine boxes of several frames": [table([(0, 2)], ONE, TWO, "max"), COARSE],
    "overlapping boxes": [FINE, table(FRAMES, TWO, [(0, 3), (1, 4)], "mean")],
    "boxes with a gap": [FINE, table(FRAMES, [(0, 1), (2, 3)], TWO, "mean")],
    "boxes of two sizes": [FINE, table(FRAMES, TWO, [(0, 1), (1, 4)], "mean")],
    "a fine box across two coarse ones": [FINE, table(FRAMES, TWO, ONE, "mean")],
    "patches that only the fine pathway reads": [FINE, table(FRAMES, TWO, [(0, 2)], "mean")],
    "patches that only the coarse pathway reads": [table(FRAMES, ONE, [(0, 2)], "max"), COARSE],
    "tall fine boxes": [table(FRAMES, TWO, ONE, "max"), COARSE],
    "large fine boxes": [table(FRAMES, FOUR, FOUR, "max"), table(FRAMES, FOUR, FOUR, "mean")],
    "a flattened grid": [table(FRAMES, [(0, 1)], [(i, i + 2) for i in range(0, 16, 2)], "max", (1, 16)), COARSE],
}


def test_a_plan_that_nests():
    assert tiling(Plan((2,), (4, 4), (FINE, COARSE)))


@pytest.mark.parametrize("name", NOT_NESTED)
def test_plans_that_do_not_nest(name):
    assert tiling(Plan((2,), (4, 4), tuple(NOT_NESTED[name]))) is None


PAIRS, SQUARES = "fine:each,each,stride2,max", "coarse:each,adaptive2,adaptive2,mean"


@pytest.mark.parametrize(
    "layout, whole",
    [
        (f"{PAIRS}+{SQUARES};interleaved;newline@frame;line@between;end@end", True),
        (f"fine:every3,each,stride2,mean,pad9+{SQUARES}", True),
        ("fine:each,each,stride2,max+coarse:every2,adaptive2,adaptive2,mean", None),
        (f"fine:others2,each,stride2,max+{SQUARES};interleaved", True),
        ("fine:every3,each,stride2,max+coarse:others3,adaptive2,adaptive2,mean;interleaved", None),
        (f"{PAIRS}+{SQUARES};newline@row", None),
        ("fine:each,linear2,linear2,mean+coarse:each,adaptive1,adaptive1,mean", None),
        ("fine:each,each,stride2,max+coarse:each,linear2,linear2,mean", None),
        ("fine:each,each,each,max,class+coarse:each,adaptive2,adaptive2,mean", None),
    ],
)
def test_whether_other_layouts_nest(layout, whole):
    found = tiling(Pathways.parse(layout).plan((4, 3), (4, 4)))
    assert (found and found.whole) == whole


def test_the_class_token_is_no_tile_of_a_grid_of_one_patch():
    layout = "a:each,each,each,max,class+b:each,each,each,mean,class"
    assert tiling(Pathways.parse(layout).plan(2, (1, 1))) is None


@pytest.mark.parametrize(
    "config, grid",
    [
        (SlowFastLayout(), (27, 27)),  # overlapping bins
        (SlowFastLayout(fast_grid=(5, 5)), (24, 24)),
        (SlowFastLayout(fast_grid=(3, 8)), (24, 24)),  # 3 patches wide: not whole pairs
        (SlowFastLayout(fast_grid=(1, 1)), (24, 24)),  # 24 wide: too many patches for registers
        (SlowFastLayout(fast_grid=(48, 48)), (24, 24)),  # up-sampling
        (SlowFastLayout(fast_grid=None), (24, 24)),
    ],
)
def test_layouts_that_do_not_nest(config, grid):
    assert tiling(config.plan(8, grid)) is None

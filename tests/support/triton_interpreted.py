"""The Triton kernels, unmodified, through Triton's interpreter against the reference.

Run by test_triton.py in a process with TRITON_INTERPRET=1, which Triton reads when the kernels are imported. A program
takes tens of milliseconds here, so everything is small.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import (
    DTYPES,
    FIELD_LAYOUTS,
    SOURCES,
    VIEWS,
    GuardedRows,
    any_calls,
    assert_same,
    bits,
    few_values,
    normal,
    rows_without_patches,
    slowfast_calls,
)  # fmt: skip
from triton_repairs import repaired_interpreter as repaired_interpreter

from sfllava_fast.layouts.pathway_layout import Pathways
from sfllava_fast.layouts.pathways import AxisRule, Pathway
from sfllava_fast.layouts.plan import PathwayTables, Plan
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import reference, registry

kernels = registry.triton_kernels()
launches = kernels.pool_launch
CHANNELS = (1, 8, 33)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pools = pytest.mark.parametrize("pool", SLOW_POOLS)
sources = pytest.mark.parametrize("make", SOURCES)


def run(x: torch.Tensor, plan: Plan, out: torch.Tensor) -> None:
    backends.BACKENDS["triton"].run(x, plan, out)


def check(x: torch.Tensor, plan: Plan, left: int = 3, right: int = 2) -> None:
    """Equal to the reference, and nothing written outside the tokens, which lie `left` channels into their rows."""
    out = GuardedRows(plan.offsets[-1], x.shape[2], x.dtype, left, right)
    run(x, plan, out.rows)
    expected = reference.aggregate(x, plan)
    expected[rows_without_patches(plan)] = torch.nan  # as they were
    assert_same(out.rows, expected)
    out.check()


def kernel_of(plan: Plan) -> object:
    return launches.forward_work(plan, backends.plan_table(plan), 1)[0]


@dtypes
@pools
@sources
def test_tiles(dtype, pool, make):
    plan = SlowFastLayout(1, pool, (2, 2)).plan(2, (4, 4))
    assert kernel_of(plan) is launches.pool_tiles
    check(make((2, 16, 20), dtype), plan)


@dtypes
@pools
def test_tiles_of_fewer_frames_than_slow_ones(dtype, pool):
    plan = SlowFastLayout(5, pool, (1, 2)).plan(2, (2, 4))
    assert kernel_of(plan) is launches.pool_tiles
    check(normal((2, 8, 5), dtype), plan)


@dtypes
@pools
@sources
def test_boxes(dtype, pool, make):
    plan = SlowFastLayout(2, pool, (2, 2)).plan(2, (3, 4))
    assert kernel_of(plan) is launches.pool_boxes
    check(make((2, 12, 20), dtype), plan)


@dtypes
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("grid", [(2, 6), (3, 3)], ids=["tiles", "boxes"])
def test_views(dtype, view, grid):
    x = VIEWS[view](lambda shape: normal(shape, dtype), 2, grid[0] * grid[1], 17)
    check(x, SlowFastLayout(1, "spatial_1d_max_pool", (1, 2)).plan(2, grid))


@pytest.mark.parametrize("width", range(1, 10))
def test_tiles_of_every_width(width):
    plan = SlowFastLayout(1, "concat", (1, 2)).plan(1, (2, 2 * width))
    assert kernel_of(plan) is launches.pool_tiles
    check(normal((1, 4 * width, 3), torch.float32), plan)


@dtypes
@pytest.mark.parametrize("grid", [(6, 6), (5, 6)], ids=["tiles", "boxes"])
@pytest.mark.parametrize("left, vectors", [(8, True), (6, False)], ids=["16 bytes a lane", "an element a lane"])
def test_chunks_of_channels(dtype, grid, left, vectors):
    """More channels than a program takes, the last ones in part; aligned rows behind a CLS token, and others."""
    channels = 264
    x = normal((2, grid[0] * grid[1] + 1, channels), dtype)[:, 1:]
    plan = SlowFastLayout(1, "spatial_1d_max_pool", (1, 1)).plan(2, grid)
    rows = GuardedRows(plan.offsets[-1], channels, dtype, left, 8).rows
    aligned = (x.data_ptr() | rows.data_ptr()) % 16 == 0
    width = kernels.launch.vector_of(aligned, x.element_size(), (*x.stride()[:2], rows.stride(0), channels))
    assert width == (16 // x.element_size() if vectors else 1)
    check(x, plan, left, 8)


@pytest.mark.parametrize("grid", [(2, 4), (3, 4)], ids=["tiles", "boxes"])
def test_packed_videos(grid):
    x = normal((6, grid[0] * grid[1], 5), torch.float32)
    check(x, SlowFastLayout(2, "spatial_1d_avg_pool", (2, 2)).plan((1, 3, 2), grid))


@pytest.mark.parametrize("fast", [None, (1, 1), (3, 2)])
def test_more_boxes_than_programs_of_a_group(fast):
    plan = SlowFastLayout(1, "concat", fast).plan(1, (9, 9))
    check(normal((1, 81, 2), torch.float32), plan)


def test_a_pathway_alone():
    check(normal((2, 16, 4), torch.float16), SlowFastLayout(0, fast_grid=(2, 2)).plan(2, (4, 4)))
    check(normal((3, 16, 4), torch.float16), SlowFastLayout(1, fast_grid=None).plan(3, (4, 4)))


field = pytest.mark.parametrize("name", FIELD_LAYOUTS)


def field_call(name: str, dtype: torch.dtype, make=normal) -> tuple[torch.Tensor, Plan]:
    layout, lengths, grid = FIELD_LAYOUTS[name]
    plan = Pathways.parse(layout).plan(lengths, grid)
    return make((sum(lengths), plan.patches, 5), dtype), plan


@dtypes
@field
def test_layouts_of_the_field(dtype, name):
    x, plan = field_call(name, dtype)
    assert kernel_of(plan) is (launches.pool_tiles if "nested" in name else launches.pool_boxes)
    check(x, plan)


@sources
def test_linear_weights_of_any_numbers(make):
    check(*field_call("linear, odd", torch.float32, make))


@settings(max_examples=20)
@given(slowfast_calls(CHANNELS, frames=2, side=4))
def test_slowfast_layouts(call):
    check(*call)


@settings(max_examples=20)
@given(any_calls(CHANNELS, frames=2, side=4))
def test_any_pathways_of_packed_videos(call):
    check(*call)


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)], ids=["tiles", "boxes"])
@pytest.mark.parametrize("stride", [(2**31, 4, 1), (4, 2**30 + 2**29, 1)], ids=["far frames", "far patches"])
def test_features_past_2_to_the_31(grid, stride):
    """In memory that the system hands out page by page, as it is touched."""
    patches = grid[0] * grid[1]
    reach = stride[0] + (patches - 1) * stride[1] + 4
    x = torch.empty(reach, dtype=torch.bfloat16).as_strided((2, patches, 4), stride)
    x.copy_(normal((2, patches, 4), torch.bfloat16))
    check(x, SlowFastLayout(1, "concat", (1, 1)).plan(2, grid))


def test_tokens_past_2_to_the_31():
    plan = SlowFastLayout(1, "concat", (1, 1)).plan(1, (2, 2))
    out = torch.empty(4 * 2**30 + 4, dtype=torch.bfloat16).as_strided((5, 4), (2**30, 1))
    x = normal((1, 4, 4), torch.bfloat16)
    run(x, plan, out)
    assert_same(out, reference.aggregate(x, plan))


def test_no_channels():
    plan = SlowFastLayout(1).plan(1, (4, 4))
    run(torch.empty(1, 16, 0), plan, torch.empty(plan.offsets[-1], 0))


def test_one_channel_needs_no_unit_stride():
    x = normal((3, 16, 6), torch.float32).as_strided((3, 16, 1), (96, 6, 5))
    check(x, SlowFastLayout(2).plan(3, (4, 4)))


def test_same_bits_in_every_run():
    x, plan = normal((2, 16, 20), torch.float32), SlowFastLayout(2, "spatial_2d_avg_pool", (2, 2)).plan(2, (4, 4))
    outs = [torch.empty(plan.offsets[-1], 20) for _ in range(2)]
    for out in outs:
        run(x, plan, out)
    assert torch.equal(*map(bits, outs))


# --- backward


def check_backward(x: torch.Tensor, plan: Plan, grad: torch.Tensor) -> None:
    """As `check`, for the features' gradient."""
    out = GuardedRows(x.shape[0] * x.shape[1], x.shape[2], x.dtype, 0, 0)
    table = backends.plan_table(plan)
    kernels.pool_backward(grad, x, plan, table, table, out.rows.view(x.shape))
    assert_same(out.rows, reference.aggregate_backward(grad, x, plan).view_as(out.rows))
    out.check()


def gradient_of(x: torch.Tensor, plan: Plan, make=normal) -> torch.Tensor:
    grad = make((plan.offsets[-1], x.shape[2]), x.dtype)
    grad[rows_without_patches(plan)] = torch.nan  # not to be read
    return grad


def backward_kernel_of(plan: Plan) -> object:
    return launches.backward_work(plan, backends.plan_table(plan), 1)[0]


@dtypes
@pools
@pytest.mark.parametrize("make", SOURCES[:2])
@pytest.mark.parametrize("slow", [1, 5], ids=["some frames", "repeated frames"])
def test_backward_of_tiles(dtype, pool, make, slow):
    plan, x = SlowFastLayout(slow, pool, (2, 2)).plan(2, (4, 4)), make((2, 16, 5), dtype)
    assert backward_kernel_of(plan) is launches.spread_tiles
    check_backward(x, plan, gradient_of(x, plan, make))


@dtypes
@pools
@pytest.mark.parametrize("make", SOURCES[1:])
def test_backward_of_boxes(dtype, pool, make):
    """A repeated frame, overlapping boxes, patches that a pathway leaves over."""
    plan, x = SlowFastLayout(2, pool, (1, 2)).plan(1, (2, 3)), make((1, 6, 5), dtype)
    assert backward_kernel_of(plan) is launches.spread_boxes
    check_backward(x, plan, gradient_of(x, plan, make))


@pytest.mark.parametrize("make", [few_values, normal, lambda shape, dtype: torch.full(shape, -torch.inf, dtype=dtype)])
def test_backward_of_a_maximum_over_frames(make):
    path = Pathway("any", AxisRule("adaptive", 1), AxisRule("each"), AxisRule("adaptive", 1), "max")
    plan = Plan((3,), (1, 2), (PathwayTables(path, (1, 2), (((0, 3),),), ((0, 1),), ((0, 2),)),))
    x = make((3, 2, 33), torch.float32)
    check_backward(x, plan, gradient_of(x, plan))


@pools
def test_what_nothing_reads_has_no_gradient(pool):
    plan, x = SlowFastLayout(1, pool, None).plan(2, (3, 2)), normal((2, 6, 5), torch.float32)
    check_backward(x, plan, gradient_of(x, plan))


@dtypes
@pytest.mark.parametrize("grid", [(2, 6), (1, 3)], ids=["tiles", "boxes"])
@pytest.mark.parametrize("left", [16, 15], ids=["16 bytes a lane", "an element a lane"])
def test_backward_of_chunks_views_and_packed_videos(dtype, grid, left):
    plan = SlowFastLayout(1, "spatial_1d_max_pool", (1, 1)).plan((1, 1), grid)
    grad = normal((plan.offsets[-1], 304), dtype)[:, left : left + 264]
    check_backward(normal((2, grid[0] * grid[1] + 1, 264), dtype)[:, 1:], plan, grad)


@pytest.mark.parametrize("view", VIEWS)
def test_backward_of_views(view):
    plan = SlowFastLayout(1, "spatial_1d_max_pool", (1, 2)).plan(2, (1, 3))
    x = VIEWS[view](lambda shape: normal(shape, torch.bfloat16), 2, 3, 17)
    check_backward(x, plan, gradient_of(x, plan))


@dtypes
@field
def test_backward_of_layouts_of_the_field(dtype, name):
    x, plan = field_call(name, dtype)
    assert backward_kernel_of(plan) is (launches.spread_tiles if "nested" in name else launches.spread_boxes)
    check_backward(x, plan, gradient_of(x, plan))


@settings(max_examples=15)
@given(slowfast_calls(CHANNELS, frames=2, side=3))
def test_backward_of_slowfast_layouts(call):
    check_backward(*call, gradient_of(*call))


@settings(max_examples=10)
@given(any_calls(CHANNELS, frames=2, side=2))
def test_backward_of_any_pathways_of_packed_videos(call):
    check_backward(*call, gradient_of(*call))


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)], ids=["tiles", "boxes"])
def test_backward_past_2_to_the_31(grid):
    patches, stride = grid[0] * grid[1], (4, 2**30 + 2**29, 1)
    plan = SlowFastLayout(1, "spatial_1d_max_pool", (1, 1)).plan(2, grid)
    x = torch.empty((patches - 1) * stride[1] + 8, dtype=torch.bfloat16).as_strided((2, patches, 4), stride)
    x.copy_(normal((2, patches, 4), torch.bfloat16))
    far = torch.empty((plan.offsets[-1] - 1) * 2**30 + 4, dtype=torch.bfloat16)
    grad = far.as_strided((plan.offsets[-1], 4), (2**30, 1))
    grad.copy_(gradient_of(x, plan))
    check_backward(x, plan, grad)


def test_programs_that_share_few_parts(monkeypatch):
    """More boxes and patches than programs: a run of them each, the last one's shorter or empty."""
    monkeypatch.setattr(launches, "_MOST_SPLITS", 4)
    plan, x = SlowFastLayout(1, fast_grid=(2, 2)).plan(1, (2, 3)), normal((1, 6, 3), torch.float32)
    plan = Plan(plan.lengths, plan.grid, plan.pathways)  # not cached with other splits
    assert backward_kernel_of(plan) is launches.spread_boxes
    check(x, plan)
    check_backward(x, plan, gradient_of(x, plan))

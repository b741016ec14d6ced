"""The projector's Triton kernels, unmodified, through Triton's interpreter against float64.

Run by test_triton_project.py, as triton_interpreted.py is by test_triton.py. Tiles are small, so that few patches fill
several of them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from kernel_cases import VIEWS, GuardedRows, bits, normal
from projector_oracle import project
from torch import nn
from torch.nn.functional import gelu
from triton_repairs import repaired_interpreter as repaired_interpreter

from sfllava_fast.layouts.plan import Plan
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.ops import projector
from sfllava_fast.ops.backends import registry

kernels = registry.triton_kernels()
POOL_TILE = kernels.project_launch.Tile(rows=64, channels=64, depth=16, warps=4, stages=1)
ROWS_TILE = kernels.project_launch.Tile(rows=16, channels=32, depth=16, warps=4, stages=1)
DTYPES = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INNER = 40

PLANS = {
    "default": SlowFastLayout(2, fast_grid=(2, 2)).plan(3, (6, 6)),
    "boxes in several tiles": SlowFastLayout(1, fast_grid=(1, 1)).plan(3, (9, 9)),
    "pairs that nest": SlowFastLayout(2, "spatial_1d_avg_pool", (2, 2)).plan(3, (8, 8)),
    "squares that nest": SlowFastLayout(2, "spatial_2d_avg_pool", (2, 2)).plan(3, (8, 8)),
    "patches": SlowFastLayout(1, "concat", (2, 3)).plan(2, (6, 6)),
    "repeated frames": SlowFastLayout(5, "spatial_1d_avg_pool", (1, 2)).plan(2, (4, 4)),
    "packed videos": SlowFastLayout(3, "spatial_2d_avg_pool", (2, 2)).plan((1, 2), (6, 6)),
    "packed videos, maxima": SlowFastLayout(2, "spatial_2d_max_pool", (2, 2)).plan((2, 1), (6, 6)),
    "overlapping boxes": SlowFastLayout(1, "spatial_1d_max_pool", (2, 2)).plan(2, (7, 7)),
    "overlapping boxes, pairs across rows": SlowFastLayout(1, "spatial_1d_avg_pool", (2, 2)).plan(2, (7, 7)),
    "more boxes than patches": SlowFastLayout(1, fast_grid=(4, 4)).plan(2, (3, 3)),
    "equal boxes": SlowFastLayout(1, "spatial_1d_avg_pool", (4, 4)).plan(2, (2, 2)),
    "a narrow grid": SlowFastLayout(1, "spatial_1d_avg_pool", (3, 1)).plan(2, (9, 1)),
    "maxima alone": SlowFastLayout(2, "spatial_2d_max_pool", None).plan(3, (5, 5)),
    "means alone": SlowFastLayout(2, "spatial_2d_avg_pool", None).plan(3, (5, 5)),
    "the fast pathway alone": SlowFastLayout(0, fast_grid=(2, 2)).plan(2, (6, 6)),
    "every patch": SlowFastLayout(0, fast_grid=(5, 5)).plan(2, (5, 5)),
}


def linear(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)


def features(plan: Plan, channels: int, dtype: torch.dtype) -> torch.Tensor:
    return normal((sum(plan.lengths), plan.grid[0] * plan.grid[1] + 1, channels), dtype)[:, 1:]


def check(hidden, weight, bias, plan, tile=POOL_TILE) -> None:
    pooled, kept = kernels.project_pool(hidden, weight, bias, plan, tile)
    tokens, patches = project(hidden, weight, bias, plan)
    assert pooled.dtype == torch.float32 and kept.dtype == hidden.dtype
    torch.testing.assert_close(pooled.double(), tokens, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept.double(), patches, rtol=torch.finfo(kept.dtype).eps * 0.51, atol=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_plans(name):
    dtype = DTYPES[len(name) % 2]
    check(features(PLANS[name], 24, dtype), *linear(INNER, 24, dtype), PLANS[name])


@dtypes
@pytest.mark.parametrize("channels, inner", [(16, 64), (24, 40), (33, 72), (7, 33), (1, 1)])
def test_channels_in_part_of_a_block(dtype, channels, inner):
    plan = PLANS["squares that nest" if inner == 40 else "default"]
    check(features(plan, channels, dtype), *linear(inner, channels, dtype), plan)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    hidden = VIEWS[view](lambda shape: normal(shape, torch.bfloat16), 3, 36, 16)
    check(hidden, *linear(INNER, 16, torch.bfloat16), PLANS["default"])


def test_rows_of_the_weight_apart():
    plan, weight = PLANS["default"], linear(INNER, 32, torch.bfloat16)[0][:, 8:24]
    check(features(plan, 16, torch.bfloat16), weight, None, plan)


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_tiles_of_other_sizes(rows):
    for name in ("default", "squares that nest"):
        plan = PLANS[name]
        tile = POOL_TILE._replace(rows=rows, channels=32)
        check(features(plan, 16, torch.bfloat16), *linear(INNER, 16, torch.bfloat16), plan, tile)


def test_hidden_past_2_to_the_31():
    """In memory that the system hands out page by page, as it is touched."""
    plan, stride = SlowFastLayout(1, fast_grid=(1, 1)).plan(2, (2, 2)), (2**31, 2**29, 1)
    hidden = torch.empty(2**31 + 2**31, dtype=torch.bfloat16).as_strided((2, 4, 16), stride)
    hidden.copy_(normal((2, 4, 16), torch.bfloat16))
    check(hidden, *linear(INNER, 16, torch.bfloat16), plan)


@pytest.mark.parametrize(
    "name, value",
    [
        ("default", torch.nan),
        ("squares that nest", torch.nan),
        ("overlapping boxes, pairs across rows", torch.inf),
        ("boxes in several tiles", -torch.inf),
    ],
)
def test_what_is_not_finite_stays_in_its_boxes(name, value):
    plan = PLANS[name]
    hidden, (weight, bias) = features(plan, 16, torch.bfloat16), linear(INNER, 16, torch.bfloat16)
    clean = kernels.project_pool(hidden, weight, bias, plan, POOL_TILE)
    hidden[0, 21, 3] = value
    dirty = kernels.project_pool(hidden, weight, bias, plan, POOL_TILE)
    marked = torch.zeros(*hidden.shape[:2], 1)
    marked[0, 21] = 1
    reached = project(marked, torch.ones(1, 1), None, plan)
    for clean, dirty, reached in zip(clean, dirty, reached):
        reached = reached[..., 0] > 0
        assert reached.any() or not len(reached)
        assert torch.equal(clean[~reached], dirty[~reached]) and not dirty[reached].isfinite().any()


def test_gelu_is_closer_than_torchs():
    """Than torch's in float32, for every bfloat16 number whose GELU is not its limit."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[(x.abs() < 20) & (x.abs() > 1e-30)]
    x = x[: len(x) // 64 * 64].view(1, -1, 1)
    plan = SlowFastLayout(0, fast_grid=(64, x.shape[1] // 64)).plan(1, (64, x.shape[1] // 64))
    tile = POOL_TILE._replace(rows=4096, channels=16)
    pooled, _ = kernels.project_pool(x, torch.ones(1, 1, dtype=torch.bfloat16), None, plan, tile)
    x = x.flatten()
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    error, torchs = (((got.flatten() - exact) / x).abs() for got in (pooled.double(), gelu(x.float()).double()))
    assert error.max() < 2e-7 and error.max() < torchs.max()
    middle = x.abs() < 5
    error, torchs = ((error * x / exact).abs()[middle], (torchs * x / exact).abs()[middle])
    assert error.max() < 1e-4 < torchs.max()


def test_same_bits_in_every_run():
    plan = PLANS["boxes in several tiles"]
    arguments = features(plan, 16, torch.bfloat16), *linear(INNER, 16, torch.bfloat16), plan, POOL_TILE
    (pooled, kept), (again, kept_again) = (kernels.project_pool(*arguments) for _ in range(2))
    assert torch.equal(bits(pooled), bits(again)) and torch.equal(bits(kept), bits(kept_again))


def test_bins_of_several_frames_are_refused():
    plan = PLANS["default"]
    paths = replace(plan.pathways[1], frames=(((0, 2),),))
    with pytest.raises(ValueError, match="several frames"):
        kernels.project_pool(features(plan, 16, torch.bfloat16), *linear(8, 16, torch.bfloat16),
                             Plan(plan.lengths, plan.grid, (paths,)), POOL_TILE)  # fmt: skip


# --- Linear2


def linear_2(pooled, weight, bias, left=8):
    out = GuardedRows(len(pooled), len(weight), weight.dtype, left, 8)
    kernels.project_pooled(pooled, weight, bias, out.rows, ROWS_TILE)
    result = out.rows.clone()
    out.check()
    return result


@dtypes
@pytest.mark.parametrize(
    "rows, inner, outer, left", [(1, 16, 32, 8), (16, 256, 32, 8), (37, 40, 72, 8), (20, 33, 45, 3)]
)
def test_an_error_of_one_rounding(dtype, rows, inner, outer, left):
    pooled, (weight, bias) = gelu(3 * torch.randn(rows, inner)), linear(outer, inner, dtype)
    for bias in (bias, None):
        exact = pooled.double() @ weight.double().T + (0 if bias is None else bias.double())
        error = (linear_2(pooled, weight, bias, left).double() - exact).abs()
        least = (exact.to(dtype).double() - exact).abs()
        assert error.max() <= 1.01 * least.max() and error.square().mean() <= 1.01 * least.square().mean()


@dtypes
def test_what_one_16_bit_number_does_not_hold(dtype):
    """Numbers that cancel in their first part; beyond float16's largest; a NaN and an infinity in their own rows."""
    weight = torch.zeros(32, 16, dtype=dtype)
    weight[:, 0], weight[:, 1] = 0.5, -0.5
    pooled = torch.zeros(5, 16)
    pooled[0, :2] = torch.tensor([1 + 2**-10, 1])
    pooled[1, :2] = torch.tensor([100000.0, 98976.0])
    pooled[2, 0], pooled[3, 0] = torch.nan, torch.inf
    out = linear_2(pooled, weight, None)
    assert out[0, 0] == 2**-11 and out[1, 0] == 512
    assert out[2].isnan().all() and (out[3] == torch.inf).all() and (out[4] == 0).all()


def test_no_rows():
    linear_2(torch.empty(0, 16), *linear(8, 16, torch.bfloat16))


@dtypes
@pytest.mark.parametrize("pool", ["spatial_1d_max_pool", "spatial_1d_avg_pool", "concat"])
@pytest.mark.parametrize("lengths", [(4,), (1, 3)], ids=str)
def test_project_and_aggregate_by_the_kernels(monkeypatch, dtype, pool, lengths):
    """What the package makes of them: equal to torch's operators but for one rounding."""
    layers = nn.Sequential(nn.Linear(32, INNER), nn.GELU(), nn.Linear(INNER, 24)).to(dtype).requires_grad_(False)
    hidden, config = normal((4, 37, 32), dtype)[:, 1:], SlowFastLayout(2, pool, (2, 2))
    ends = [0, *accumulate(lengths)]
    tokens = {}
    for fused in (False, True):
        monkeypatch.setattr(projector, "_is_fused", lambda *_: fused)
        monkeypatch.setattr(projector, "_multiplies", lambda *_: True)
        out = torch.full((config.plan(lengths, (6, 6)).offsets[-1], 40), torch.nan, dtype=dtype)[:, 8:32]
        call = {"mode": "commuted", "out": out, "frame_offsets": ends}
        tokens[fused], offsets = projector.project_and_aggregate(hidden, layers, config, **call)
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(tokens[True], tokens[False], rtol=near, atol=near)
    assert offsets[-1] == len(out)

"""The reference against the float64 oracle, and against PyTorch's own poolings."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench.paired.published import slowfast
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout
from sfllava_fast.ops.backends import reference

GRIDS = [(4, 4), (24, 24), (7, 5), (5, 6), (1, 8), (9, 1), (3, 3)]


def fits(pool: str, grid: tuple[int, int]) -> bool:
    return min(grid) > 1 if "2d" in pool else pool == "concat" or grid[0] * grid[1] > 1


pools = pytest.mark.parametrize("pool", SLOW_POOLS)
pools_on_grids = pytest.mark.parametrize(("pool", "grid"), [(p, g) for p in SLOW_POOLS for g in GRIDS if fits(p, g)])


def published(x: torch.Tensor, grid: tuple[int, int], slow: int, pool: str, fast: tuple[int, int]) -> torch.Tensor:
    """The plain eager form: transpose, pool with PyTorch, transpose back, in the dtype of x [T, N, D]."""
    return slowfast(slow, pool, fast)(x, grid, None)


@pools_on_grids
@pytest.mark.parametrize("fast", [(4, 4), (2, 3), (1, 1), (6, 9)])
def test_contract_in_float64(pool, grid, fast):
    frames = 3  # and 4 slow ones: a frame repeats
    x = torch.randn(frames, grid[0] * grid[1], 3, dtype=torch.float64)
    got = reference.aggregate(x, SlowFastLayout(4, pool, fast).plan(frames, grid))
    torch.testing.assert_close(got.numpy(), oracle.tokens(x.numpy(), grid, 4, pool, fast), rtol=1e-14, atol=1e-14)


@settings(max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 14),
    st.sampled_from(SLOW_POOLS),
    st.none() | st.tuples(st.integers(1, 10), st.integers(1, 10)),
)
def test_contract_on_any_layout(frames, height, width, slow, pool, fast):
    assume(slow or fast)
    assume(not slow or fits(pool, (height, width)))
    x = torch.randn(frames, height * width, 2, dtype=torch.float64)
    got = reference.aggregate(x, SlowFastLayout(slow, pool, fast).plan(frames, (height, width)))
    expected = oracle.tokens(x.numpy(), (height, width), slow, pool, fast)
    torch.testing.assert_close(got.numpy(), expected, rtol=1e-14, atol=1e-14)


@pools_on_grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_pytorchs_poolings_and_within_the_error_budget(pool, grid, dtype):
    x = torch.randn(6, grid[0] * grid[1], 5).to(dtype)
    plan = SlowFastLayout(4, pool, (3, 2)).plan(6, grid)
    got, eager = reference.aggregate(x, plan), published(x, grid, 4, pool, (3, 2))
    exact = torch.from_numpy(oracle.tokens(x.double().numpy(), grid, 4, pool, (3, 2)))
    slow = plan.tokens["slow"]
    assert got.dtype == dtype and got.shape == exact.shape
    assert torch.equal(got, eager)
    if pool == "concat" or "max" in pool:
        assert torch.equal(got[:slow].double(), exact[:slow])
    # Rounded once: half a unit in the last place, and the accumulation's own float32 error.
    unit = torch.finfo(dtype).eps / 2 + (8 * torch.finfo(torch.float32).eps)
    assert ((got.double() - exact).abs() <= unit * exact.abs() + 1e-7 + torch.finfo(dtype).tiny).all()
    assert (got.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_kept_in_16_bits(dtype):
    # 576 ones and one 1024: a 16-bit running sum would lose most of the ones.
    x = torch.ones(1, 576, 1, dtype=dtype)
    x[0, 0] = 1024
    got = reference.aggregate(x, SlowFastLayout(0, fast_grid=(1, 1)).plan(1, (24, 24)))
    assert got.item() == torch.tensor((1024 + 575) / 576, dtype=dtype).item()


def test_order_is_slow_then_fast_frame_by_frame():
    x = torch.arange(4 * 4.0).reshape(4, 4, 1)
    tokens = reference.aggregate(x, SlowFastLayout(2, "concat", (1, 2)).plan(4, (2, 2))).flatten().tolist()
    assert tokens == [0, 1, 2, 3, 8, 9, 10, 11, 1, 2, 5, 6, 9, 10, 13, 14]


def test_videos_follow_each_other():
    x = torch.randn(8, 6, 3)
    config = SlowFastLayout(2, "spatial_1d_avg_pool", (2, 2))
    apart = [reference.aggregate(part, config.plan(len(part), (2, 3))) for part in x.split((3, 1, 4))]
    assert torch.equal(reference.aggregate(x, config.plan((3, 1, 4), (2, 3))), torch.cat(apart))


@pools
def test_nan_infinity_and_signed_zero(pool):
    x = torch.tensor(
        [
            1.0,
            float("nan"),
            float("nan"),
            2.0,
            -0.0,
            0.0,
            0.0,
            -0.0,
            float("inf"),
            float("-inf"),
            -1.0,
            float("-inf"),
            float("-inf"),
            float("-inf"),
            1e-45,
            0.0,
        ]
    ).reshape(1, 16, 1)
    got = reference.aggregate(x, SlowFastLayout(1, pool, (2, 2)).plan(1, (4, 4)))
    assert torch.equal(got.nan_to_num(7), published(x, (4, 4), 1, pool, (2, 2)).nan_to_num(7))
    assert torch.equal(got.isnan(), published(x, (4, 4), 1, pool, (2, 2)).isnan())
    if pool == "spatial_1d_max_pool":
        assert got[2:4].signbit().flatten().tolist() == [True, False]  # of equals the first stays


@pools
@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
def test_gradient_is_pytorchs_ties_included(pool, grid):
    # Small integers tie often; slow frames repeat (3 frames, 5 slow) and bins overlap (5 and 7 into 3 and 2).
    x = torch.randint(-2, 3, (3, grid[0] * grid[1], 4)).double().requires_grad_()
    expected = published(x, grid, 5, pool, (3, 2))
    grad = torch.randn_like(expected)
    expected.backward(grad)
    got = reference.aggregate_backward(grad, x.detach(), SlowFastLayout(5, pool, (3, 2)).plan(3, grid))
    torch.testing.assert_close(got, x.grad, rtol=1e-13, atol=1e-13)


def test_gradient_of_nan_follows_pytorch():
    x = torch.randn(2, 16, 3).double()
    x[:, ::3] = float("nan")
    x.requires_grad_()
    expected = published(x, (4, 4), 2, "spatial_1d_max_pool", (2, 2))
    expected.backward(torch.ones_like(expected))
    plan = SlowFastLayout(2, fast_grid=(2, 2)).plan(2, (4, 4))
    torch.testing.assert_close(reference.aggregate_backward(torch.ones_like(expected), x.detach(), plan), x.grad)

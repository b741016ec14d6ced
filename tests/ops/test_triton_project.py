"""The projector's Triton kernels: interpreted, the order of the patches, compiled ahead of time, and on a device."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re

import pytest
import torch
from hypothesis import given
from kernel_cases import slowfast_calls
from projector_oracle import boxes, project
from triton_process import HERE, in_registers, interpret, run

from sfllava_fast.layouts.plan import Plan
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout
from sfllava_fast.ops.backends import registry

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

_TENSOR_CORES = {"80": "mma.sync", "90": "wgmma.mma_async", "100": "tcgen05.mma"}


def test_in_the_interpreter():
    interpret("triton_interpreted_project.py")


# --- the order of the patches


@pytest.fixture(autouse=True, scope="module")
def kernels():
    return registry.triton_kernels()


def order_of(plan: Plan, size: int = 256):
    return importlib.import_module("sfllava_fast._triton.project_order").project_order(plan, size)


def follow(plan: Plan, size: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled, kept) of x [T, N], as the table says, number by number."""
    order = order_of(plan, size)
    begins = [*order.table[:8].tolist(), len(order.table)]
    frames, patches, kept, tiles, segments, tokens, counts, sums = (
        order.table[begin:end] for begin, end in zip(begins, begins[1:])
    )
    units = size // order.unit
    rows = torch.full((order.tokens + order.parts,), torch.nan, dtype=x.dtype)
    kept_rows = torch.full((len(order.kept_frames) * x.shape[1],), torch.nan, dtype=x.dtype)
    for tile in range(order.tiles):
        slots = slice(tile * size, (tile + 1) * size)
        frame, patch = frames[slots].long(), patches[slots].long()
        values = x[torch.where(frame < 0, ~frame, frame), patch]
        first, last, any_kept, any_small = tiles[4 * tile : 4 * tile + 4].tolist()
        if any_kept:
            to = kept[slots].long()
            assert kept_rows[to[to >= 0]].isnan().all(), "a patch is stored twice"
            kept_rows[to[to >= 0]] = values[to >= 0]
        values = torch.where(frame < 0, 0, values)
        values = values.view(2, -1, 2).sum((0, 2)) if order.unit == 4 else values.view(-1, order.unit).sum(1)
        if any_small:
            to, count = (part[tile * units : (tile + 1) * units].long() for part in (tokens, counts))
            rows[to[to >= 0]] = (values / count)[to >= 0]
        for begin, end, row, count in segments[4 * first : 4 * last].view(-1, 4).tolist():
            rows[row] = values[begin:end].sum() / count
    for row, first, parts, count in sums[: 4 * order.sums].view(-1, 4).tolist():
        rows[row] = rows[first : first + parts].sum() / count
    return rows[: order.tokens], kept_rows.view(len(order.kept_frames), x.shape[1])


def check(plan: Plan, size: int) -> None:
    x = torch.rand(sum(plan.lengths), plan.grid[0] * plan.grid[1], dtype=torch.float64)
    pooled, kept = follow(plan, size, x)
    expected = torch.stack([x.new_zeros(()), *(x[frame, patches].mean() for frame, patches in boxes(plan, "mean"))])[1:]
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=0)
    assert torch.equal(kept, x[sorted({frame for frame, _ in boxes(plan, "max")})])


@given(slowfast_calls((1,), frames=4))
def test_any_layout(call):
    check(call[1], 16)


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("pool", SLOW_POOLS)
@pytest.mark.parametrize("grid, fast", [((24, 24), (4, 4)), ((27, 27), (4, 4)), ((24, 24), (5, 5)), ((24, 24), (1, 1))])
def test_layouts_of_real_size(size, pool, grid, fast):
    check(SlowFastLayout(3, pool, fast).plan((6, 2), grid), size)


@pytest.mark.parametrize("pool", SLOW_POOLS)
def test_no_patch_comes_twice_where_pathways_nest(pool):
    plan = SlowFastLayout(10, pool, (4, 4)).plan(50, (24, 24))
    order = order_of(plan)
    assert order.tiles == -(-50 * 576 // 256) and not order.padded
    assert order.unit == (2 if pool == "spatial_1d_avg_pool" else 4)


# --- compiled ahead of time


@pytest.fixture(scope="module", params=_TENSOR_CORES, ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton")
    file, cache = out / "kernels.json", out / "cache"
    run(str(HERE / "triton_ahead_project.py"), request.param, str(file), TRITON_CACHE_DIR=str(cache))
    return request.param, json.loads(file.read_text())


def test_compiled_kernels(compiled):
    """On tensor cores, in registers, fed 16 bytes at a time past the registers, with 16-byte stores of what is kept."""
    arch, kernels = compiled
    assert {kernel["kernel"] for kernel in kernels} == {"project_tiles", "project_rows"}
    for kernel in kernels:
        ptx, sass, name = kernel["ptx"], kernel["sass"], (kernel["kernel"], kernel["name"], kernel["tile"])
        assert _TENSOR_CORES[arch] in ptx, name
        assert in_registers(kernel), name
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
        assert copies and set(copies) == {"0x10"}, name
        assert "STG.E.128" in sass, name


def test_gelu_costs_one_exponential(compiled):
    for kernel in compiled[1]:
        if kernel["kernel"] == "project_tiles" and kernel["first"]:
            rows, channels, _, warps, _ = kernel["tile"]
            elements = rows * channels // (warps * 32)
            assert kernel["ptx"].count("ex2.approx") == elements and "tanh" not in kernel["ptx"]


# --- on a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", [0, 1], ids=["the first tile", "the second"])
@pytest.mark.parametrize("pool", SLOW_POOLS)
@pytest.mark.parametrize(
    "grid, fast, channels", [((24, 24), (4, 4), 1024), ((27, 27), (5, 5), 1001), ((8, 8), (8, 8), 64)]
)
def test_on_a_device(kernels, dtype, place, pool, grid, fast, channels):
    """Real sizes and odd ones against float64; the same bits twice. Tensor cores drop the last bits of long sums."""
    launch, inner, outer = kernels.project_launch, 4 * channels, 4 * channels
    plan = SlowFastLayout(3, pool, fast).plan((5, 2), grid)
    hidden = torch.randn(7, grid[0] * grid[1] + 1, channels, dtype=dtype, device="cuda")[:, 1:]
    weights = [(torch.randn(n, m, device="cuda") / m**0.5).to(dtype) for n, m in ((inner, channels), (outer, inner))]
    biases = [torch.randn(n, dtype=dtype, device="cuda") for n in (inner, outer)]
    tile = launch._tiles(launch.POOL_TILES, hidden)[place]
    pooled, kept = launch.project_pool(hidden, weights[0], biases[0], plan, tile)
    again = launch.project_pool(hidden, weights[0], biases[0], plan, tile)
    assert torch.equal(pooled, again[0]) and torch.equal(kept, again[1])
    tokens, patches = project(hidden, weights[0], biases[0], plan)
    torch.testing.assert_close(pooled.double(), tokens, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(kept.double(), patches, rtol=torch.finfo(dtype).eps * 0.51, atol=2e-5)

    out = torch.full((len(pooled) + 2, outer), torch.nan, dtype=dtype, device="cuda")
    tile = launch._tiles(launch.ROWS_TILES, out)[place]
    launch.project_pooled(pooled, weights[1], biases[1], out[1:-1], tile)
    exact = pooled.double() @ weights[1].double().T + biases[1].double()
    least = (exact.to(dtype).double() - exact).abs()
    assert (out[1:-1].double() - exact).abs().max() <= 1.05 * least.max()
    assert out[0].isnan().all() and out[-1].isnan().all()

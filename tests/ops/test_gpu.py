"""The GPU backends on a device: bit for bit the reference on the CPU, on any stream, in graphs, past 2^31 elements."""

from __future__ import annotations

import math

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

from sfllava_fast import slowfast_aggregate
from sfllava_fast.errors import BackendError, InputError
from sfllava_fast.layouts.layout import PLANS
from sfllava_fast.layouts.pathway_layout import Pathways
from sfllava_fast.layouts.plan import Plan
from sfllava_fast.layouts.presets import PRESETS
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import reference
from sfllava_fast.ops.backends.plan_table import plan_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found"),
    pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True),
]
CHANNELS = (1, 7, 8, 16, 33, 64, 256, 264, 1024)
PAPER = SlowFastLayout()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
directions = pytest.mark.parametrize("check", ["check_tokens", "check_gradient"], indirect=True)


@pytest.fixture
def backend(request):
    if reason := backends.BACKENDS[request.param].why_unavailable(None):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def check(request):
    return globals()[request.param]


@pytest.fixture
def gigabytes():
    """Skips where fewer are free; hands the memory back afterwards."""

    def need(count: int) -> None:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < count << 30:
            pytest.skip(f"the test needs {count} GB of GPU memory")

    yield need
    torch.cuda.empty_cache()


def on_gpu(make, dtype):
    return lambda shape: make(shape, dtype).cuda()


def check_tokens(backend: str, x: torch.Tensor, plan: Plan, left: int = 3, right: int = 2) -> None:
    """Equal to the reference on the CPU, and nothing written outside the tokens, `left` channels into their rows."""
    out = GuardedRows(plan.offsets[-1], x.shape[2], x.dtype, left, right, x.device)
    backends.BACKENDS[backend].run(x, plan, out.rows)
    expected = reference.aggregate(x.cpu(), plan)
    expected[rows_without_patches(plan)] = torch.nan  # as they were
    assert_same(out.rows.cpu(), expected)
    out.check()


def check_gradient(backend: str, x: torch.Tensor, plan: Plan, left: int = 3, right: int = 2) -> None:
    """The same of a backward; the tokens' gradient is what lies `left` channels into its rows."""
    frames, patches, channels = x.shape
    shape = plan.offsets[-1], left + channels + right
    grad = torch.where(torch.rand(shape) < 0.1, few_values(shape, x.dtype), normal(shape, x.dtype)).to(x.device)
    grad = grad[:, left : left + channels]
    grad[rows_without_patches(plan)] = torch.nan  # not to be read
    out = GuardedRows(frames * patches, channels, x.dtype, 0, 0, x.device)
    backends.BACKENDS[backend].run_backward(grad, x, plan, out.rows.view(x.shape))
    assert_same(out.rows.cpu().view(x.shape), reference.aggregate_backward(grad.cpu(), x.cpu(), plan))
    out.check()


# --- equal to the reference


@directions
@settings(max_examples=150)
@given(call=slowfast_calls(CHANNELS, device="cuda"))
def test_slowfast_layouts(backend, check, call):
    check(backend, *call)


@directions
@settings(max_examples=150)
@given(call=any_calls(CHANNELS, device="cuda"))
def test_any_pathways_of_packed_videos(backend, check, call):
    check(backend, *call)


@directions
@dtypes
@pytest.mark.parametrize("name", FIELD_LAYOUTS)
@pytest.mark.parametrize("channels", [264, 63])
def test_layouts_of_the_field(backend, check, dtype, name, channels):
    layout, lengths, grid = FIELD_LAYOUTS[name]
    plan = Pathways.parse(layout).plan(lengths, grid)
    check(backend, on_gpu(normal, dtype)((sum(lengths), plan.patches, channels)), plan, 8, 8)


@directions
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("grid", [(24, 24), (27, 27)], ids=str)
def test_presets(backend, check, name, grid):
    plan = PRESETS[name].layout.plan(8, grid)
    check(backend, on_gpu(normal, torch.bfloat16)((8, plan.patches, 264)), plan, 8, 8)


@directions
@dtypes
@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("pool", SLOW_POOLS)
@pytest.mark.parametrize("slow", [2, 8], ids=["some frames", "repeated frames"])
@pytest.mark.parametrize("frames", [5, (2, 3)], ids=["one video", "packed videos"])
def test_the_papers_grid(backend, check, dtype, make, pool, slow, frames):
    x = on_gpu(make, dtype)((5, 577, 264))[:, 1:]
    check(backend, x, SlowFastLayout(slow, pool).plan(frames, (24, 24)), 8, 8)


@directions
@dtypes
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (24, 24), (27, 27), (12, 36)], ids=str)
@pytest.mark.parametrize("pool", ["spatial_1d_max_pool", "spatial_2d_avg_pool"])
def test_grids_of_other_towers(backend, check, dtype, grid, pool):
    x = on_gpu(normal, dtype)((3, grid[0] * grid[1], 1152))
    check(backend, x, SlowFastLayout(2, pool).plan(3, grid), 0, 0)


@directions
@dtypes
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("grid", [(12, 12), (7, 7)], ids=["nested", "overlapping"])
@pytest.mark.parametrize("channels, left, right", [(64, 0, 0), (64, 8, 8), (64, 1, 2), (63, 0, 0)])
def test_views(backend, check, dtype, view, grid, channels, left, right):
    x = VIEWS[view](on_gpu(normal, dtype), 3, grid[0] * grid[1], channels)
    check(backend, x, SlowFastLayout(2).plan(3, grid), left, right)


@dtypes
@pytest.mark.parametrize("channels", [1024, 4096])
def test_the_papers_video(backend, dtype, channels):
    x = on_gpu(normal, dtype)((50, 577, channels))[:, 1:]
    tokens = slowfast_aggregate(x, backend=backend)
    assert tokens.shape == (3680, channels)
    assert_same(tokens.cpu(), reference.aggregate(x.cpu(), PAPER.plan(50, (24, 24))))


def test_videos_of_mixed_length(backend):
    lengths = [1 + 7 * i % 19 for i in range(32)]
    x = on_gpu(normal, torch.bfloat16)((sum(lengths), 576, 64))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens, token_offsets = slowfast_aggregate(x, PAPER, frame_offsets=offsets, backend=backend)
    for video, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        own = tokens[token_offsets[video] : token_offsets[video + 1]]
        assert torch.equal(own, slowfast_aggregate(x[start:stop], PAPER, backend=backend))


def test_one_frame_and_many(backend):
    for frames in (1, 2, 4096):
        check_tokens(backend, on_gpu(normal, torch.float16)((frames, 16, 8)), SlowFastLayout(3).plan(frames, (4, 4)))


def test_rows_of_a_larger_buffer(backend):
    x, buffer = on_gpu(normal, torch.bfloat16)((4, 576, 64)), torch.zeros(4000, 64, dtype=torch.bfloat16, device="cuda")
    tokens = PAPER.count_tokens(4, (24, 24))
    rows = buffer[35 : 35 + tokens]
    assert slowfast_aggregate(x, PAPER, out=rows, backend=backend) is rows
    assert torch.equal(rows, slowfast_aggregate(x, PAPER, backend=backend))
    assert not buffer[:35].any() and not buffer[35 + tokens :].any()


def test_no_channels(backend):
    assert slowfast_aggregate(torch.empty(4, 16, 0, device="cuda"), backend=backend).shape == (10 * 8 + 4 * 16, 0)


def test_same_bits_in_every_run(backend):
    x = on_gpu(normal, torch.float32)((20, 576, 512))
    first = bits(slowfast_aggregate(x, backend=backend))
    assert all(torch.equal(bits(slowfast_aggregate(x, backend=backend)), first) for _ in range(20))


def test_gradients_equal_the_cpus(backend):
    x = normal((4, 36, 16), torch.float32)
    gradients = []
    for device, name in (("cpu", "torch"), ("cuda", backend)):
        leaf = x.to(device).requires_grad_()
        slowfast_aggregate(leaf, SlowFastLayout(2, fast_grid=(2, 2)), backend=name).sin().sum().backward()
        gradients.append(leaf.grad.cpu())
    torch.testing.assert_close(*gradients)


@dtypes
def test_backward_of_the_papers_video(backend, dtype):
    check_gradient(backend, on_gpu(normal, dtype)((50, 577, 1024))[:, 1:], PAPER.plan(50, (24, 24)), 0, 0)


def test_compiled(backend):
    compiled = torch.compile(
        lambda x: slowfast_aggregate(x, PAPER, backend=backend) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for frames in (3, 5):
        x = on_gpu(normal, torch.bfloat16)((frames, 576, 32))
        assert torch.equal(compiled(x), slowfast_aggregate(x, PAPER, backend=backend) * 2)


# --- more than 2^31 elements


def test_features_and_tokens_past_2_to_the_31(backend, gigabytes):
    gigabytes(12)
    frames, config = 920, SlowFastLayout(0, fast_grid=(24, 24))  # every patch is a token: 2.17 billion elements
    x = torch.empty(frames, 577, 4096, dtype=torch.bfloat16, device="cuda")
    for frame in x:
        frame.normal_()
    tokens = slowfast_aggregate(x[:, 1:], config, backend=backend).view(frames, 576, 4096)
    assert tokens.numel() > 2**31
    assert all(torch.equal(tokens[frame], x[frame, 1:]) for frame in range(frames))


def test_the_default_layout_past_2_to_the_31(backend, gigabytes):
    gigabytes(8)
    frames = 920
    x = torch.empty(frames, 576, 4096, dtype=torch.bfloat16, device="cuda")
    for frame in x:
        frame.normal_()
    tokens = slowfast_aggregate(x, backend=backend)
    plan = PAPER.plan(frames, (24, 24))
    picked = x[plan.slow_frames].cpu()
    slow = reference.aggregate(picked, PAPER.only("slow").plan(10, (24, 24)))
    assert_same(tokens[:2880].cpu(), slow)
    last = reference.aggregate(x[-3:].cpu(), PAPER.only("fast").plan(3, (24, 24)))
    assert_same(tokens[-48:].cpu(), last)


def test_a_gradient_past_2_to_the_31(backend, gigabytes):
    gigabytes(12)
    frames = 920
    x = torch.zeros(frames, 576, 4096, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(PAPER.count_tokens(frames, (24, 24)), 4096, dtype=torch.bfloat16, device="cuda")
    gradient = torch.full_like(x, torch.nan)
    backends.BACKENDS[backend].run_backward(grad, x, PAPER.plan(frames, (24, 24)), gradient)
    assert not any(frame.isnan().any() for frame in gradient)
    fast = PAPER.only("fast").plan(3, (24, 24))  # the last frames are not slow ones
    assert_same(gradient[-3:].cpu(), reference.aggregate_backward(grad[-48:].cpu(), x[-3:].cpu(), fast))


@pytest.mark.parametrize("stride", [(2**31, 8, 1), (8, 2**27 + 2**24, 1)], ids=["far frames", "far patches"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=["nested", "overlapping"])
def test_far_strides(backend, gigabytes, stride, grid):
    gigabytes(12)
    patches = grid[0] * grid[1]
    buffer = torch.empty(2 * stride[0] + (patches - 1) * stride[1] + 8, dtype=torch.bfloat16, device="cuda")
    x = buffer.as_strided((3, patches, 8), stride)
    x.copy_(normal((3, patches, 8), torch.bfloat16))
    check_tokens(backend, x, SlowFastLayout(2, fast_grid=(2, 2)).plan(3, grid))


def test_far_tokens(backend, gigabytes):
    gigabytes(12)
    plan = SlowFastLayout(3, "concat", (1, 1)).plan(3, (4, 4))
    rows = plan.offsets[-1]
    out = torch.empty((rows - 1) * 2**26 + 8, dtype=torch.bfloat16, device="cuda").as_strided((rows, 8), (2**26, 1))
    x = on_gpu(normal, torch.bfloat16)((3, 16, 8))
    backends.BACKENDS[backend].run(x, plan, out)
    assert_same(out.cpu(), reference.aggregate(x.cpu(), plan))


# --- streams, graphs, memory


def test_the_current_stream(backend):
    x = torch.zeros(4, 576, 64, device="cuda")
    slowfast_aggregate(x, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # another stream would read the zeros meanwhile
        x.fill_(1)
        tokens = slowfast_aggregate(x, backend=backend)
        assert (tokens == 1).all()


def test_a_graph_replays_after_the_cache_has_forgotten_its_table(backend):
    x = on_gpu(normal, torch.bfloat16)((6, 576, 64))
    out = slowfast_aggregate(x, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slowfast_aggregate(x, out=out, backend=backend)
    PLANS.clear()
    garbage = [torch.full((2**k,), -1, dtype=torch.int32, device="cuda") for k in range(20)]
    for _ in range(3):
        x.normal_()
        out.fill_(7)
        graph.replay()
        assert torch.equal(out, slowfast_aggregate(x, backend="torch"))
    del garbage


def test_the_first_call_of_its_kind_cannot_be_captured(backend):
    x, config = on_gpu(normal, torch.float32)((7, 25, 8)), SlowFastLayout(4, "concat", (2, 3))
    PLANS.clear()
    with pytest.raises(BackendError, match="make it once before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        slowfast_aggregate(x, config, backend=backend)
    expected = reference.aggregate(x.cpu(), config.plan(7, (5, 5)))
    assert_same(slowfast_aggregate(x, config, backend=backend).cpu(), expected)


def test_a_call_neither_waits_nor_allocates(backend):
    x = on_gpu(normal, torch.bfloat16)((6, 576, 64))
    out = slowfast_aggregate(x, backend=backend)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        slowfast_aggregate(x, out=out, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_backward_neither_waits_nor_allocates_more_than_the_gradient(backend):
    x = on_gpu(normal, torch.bfloat16)((6, 576, 64)).requires_grad_()
    tokens = slowfast_aggregate(x, backend=backend)
    grad = torch.ones_like(tokens)
    tokens.backward(grad, retain_graph=True)
    x.grad = None
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens.backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1


def test_a_table_outlives_its_place_in_the_cache_on_other_streams(backend):
    x = torch.ones(6, 576, 64, device="cuda")
    out, numbers = torch.zeros_like(slowfast_aggregate(x, backend=backend)), plan_table(PAPER.plan(6, (24, 24))).numel()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        slowfast_aggregate(x, out=out, backend=backend)
    PLANS.clear()  # the only reference: its memory may be had for the asking, if nothing holds it
    garbage = [torch.full((numbers,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    assert (out == 1).all()
    del garbage


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend):
    x = normal((4, 576, 64), torch.bfloat16).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same(slowfast_aggregate(x, backend=backend).cpu(), reference.aggregate(x.cpu(), PAPER.plan(4, (24, 24))))
    assert torch.cuda.current_device() == 0


def test_auto_measures_who_is_faster_and_gets_the_same_tokens(backend):
    x = on_gpu(normal, torch.bfloat16)((6, 576, 64))
    backends._fastest_first.cache_clear()
    assert backends.choose("auto", x).name in ("cuda", "triton")
    for backward in (False, True):
        call = backends._Call(x.device, x.dtype, backward=backward)
        assert 0 < backends._time(backends.BACKENDS[backend], call) < math.inf
    assert torch.equal(slowfast_aggregate(x), slowfast_aggregate(x, backend=backend))


# --- bad input


def test_other_devices_are_refused(backend):
    x = torch.zeros(4, 16, 8, device="cuda")
    config, tokens = SlowFastLayout(2), 2 * 8 + 4 * 16
    with pytest.raises(InputError, match="out must be torch.float32 on cuda:0, not torch.float32 on cpu"):
        slowfast_aggregate(x, config, out=torch.zeros(tokens, 8), backend=backend)
    with pytest.raises(InputError, match="out must be torch.float32 on cpu, not torch.float32 on cuda:0"):
        slowfast_aggregate(x.cpu(), config, out=torch.zeros(tokens, 8, device="cuda"))
    with pytest.raises(InputError, match="overlaps"):
        buffer = torch.zeros(4 * 16 * 8 + tokens * 8, device="cuda")
        out = buffer[8 : 8 + tokens * 8].view(tokens, 8)
        slowfast_aggregate(buffer[: 4 * 16 * 8].view(4, 16, 8), config, out=out, backend=backend)
    with pytest.raises(BackendError, match="features are on cuda:0, not on the CPU"):
        slowfast_aggregate(x, config, backend="cpu")
    with pytest.raises(BackendError, match="not on a CUDA device"):
        slowfast_aggregate(x.cpu(), config, backend=backend)
    with pytest.raises(BackendError, match="float64"):
        slowfast_aggregate(x.double(), config, backend=backend)


PLAN = plan_table(SlowFastLayout(2).plan(4, (4, 4)))
BAD_KERNEL_CALLS = {
    "a table on the host": lambda x, out: (x, PLAN, PLAN, out),
    "a table of another type": lambda x, out: (x, PLAN, PLAN.cuda().long(), out),
    "a table cut short": lambda x, out: (x, PLAN, PLAN.cuda()[:-1], out),
    "a plan on the device": lambda x, out: (x, PLAN.cuda(), PLAN.cuda(), out),
    "a plan of another version": lambda x, out: (x, PLAN + (torch.arange(len(PLAN)) == 0), PLAN.cuda(), out),
    "fewer frames than the plan": lambda x, out: (x[1:], PLAN, PLAN.cuda(), out),
    "fewer tokens than the plan": lambda x, out: (x, PLAN, PLAN.cuda(), out[1:]),
    "features on the host": lambda x, out: (x.cpu(), PLAN, PLAN.cuda(), out),
    "out on the host": lambda x, out: (x, PLAN, PLAN.cuda(), out.cpu()),
    "another dtype": lambda x, out: (x, PLAN, PLAN.cuda(), out.half()),
    "float64": lambda x, out: (x.double(), PLAN, PLAN.cuda(), out.double()),
    "no unit stride": lambda x, out: (x.transpose(1, 2).contiguous().transpose(1, 2), PLAN, PLAN.cuda(), out),
}


@pytest.mark.parametrize("call", BAD_KERNEL_CALLS)
def test_the_cuda_kernel_itself_refuses_what_it_cannot_read(backend, call):
    if backend != "cuda":
        pytest.skip("Triton's kernels are behind no op of their own")
    out = torch.full((2 * 8 + 4 * 16, 8), 7.0, device="cuda")
    with pytest.raises(RuntimeError):
        torch.ops.sfllava_fast.pool_gpu(*BAD_KERNEL_CALLS[call](torch.zeros(4, 16, 8, device="cuda"), out))
    assert (out == 7).all()


def test_opcheck_of_the_kernels_own_op(backend):
    if backend != "cuda":
        pytest.skip("Triton's kernels are behind no op of their own")
    x, out = torch.zeros(4, 16, 8, device="cuda"), torch.empty(2 * 8 + 4 * 16, 8, device="cuda")
    torch.library.opcheck(torch.ops.sfllava_fast.pool_gpu.default, (x, PLAN, PLAN.cuda(), out))
    grads = torch.zeros_like(out), x, PLAN, PLAN.cuda(), torch.empty_like(x)
    torch.library.opcheck(torch.ops.sfllava_fast.pool_backward_gpu.default, grads)

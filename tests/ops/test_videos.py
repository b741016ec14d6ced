"""[B, T, N, D]: videos of one length in one call, against calls one by one."""

from __future__ import annotations

import pytest
import torch
from distributed_modules import make_projector
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sfllava_fast import (
    FusedProjectorAggregator,
    PathwayProjectors,
    SlowFastAggregator,
    aggregate_by_pathway,
    project_and_aggregate,
    slowfast_aggregate,
)
from sfllava_fast.errors import InputError
from sfllava_fast.ops.aggregate import resolve_plan
from sfllava_fast.ops.backends import aggregate as backends
from sfllava_fast.ops.backends import registry

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
LAYOUTS = [LAYOUT, "llava_next_video-bilinear", "pllava", "llava_video_slowfast-every_2", "video_chatgpt"]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
VIEWS = {
    "one after the other": lambda x: x[:, :, 1:],
    "with gaps between videos": lambda x: x[:, 1:, 1:],
    "frame-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1:],
    "every other frame": lambda x: x[:, ::2, 1:],
    "one video, expanded": lambda x: x[1:2, :, 1:].expand(4, -1, -1, -1),
    "one video": lambda x: x[1:2, :, 1:],
    "one frame each": lambda x: x[:, 2:3, 1:],
}


def one_by_one(x, layout=LAYOUT, **call):
    separators = call.get("separators")
    return torch.stack([slowfast_aggregate(video, layout, **call | {"separators": separators}) for video in x])


def separators(layout, x):
    return {"separators": torch.ones(1, x.shape[-1], dtype=x.dtype)} if "llava_video" in layout else {}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_batch_is_calls_one_by_one(view, layout, dtype):
    x = VIEWS[view](torch.randn(3, 7, 17, 12).to(dtype))
    call = separators(layout, x)
    tokens = slowfast_aggregate(x, layout, **call)
    assert tokens.dtype == dtype and torch.equal(tokens, one_by_one(x, layout, **call))


@pytest.mark.parametrize("view", VIEWS)
def test_its_gradients(view):
    leaf = torch.randn(3, 7, 17, 12, requires_grad=True)
    for layout in (LAYOUT, LAYOUTS[3]):
        newline = torch.randn(1, 12, requires_grad=True)
        call = {"separators": newline} if layout == LAYOUTS[3] else {}
        wanted = [leaf, *call.values()]
        got = torch.autograd.grad(slowfast_aggregate(VIEWS[view](leaf), layout, **call).sin().sum(), wanted)
        expected = torch.autograd.grad(one_by_one(VIEWS[view](leaf), layout, **call).sin().sum(), wanted)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.fixture
def counted(monkeypatch):
    launches = []
    backend = backends.choose("auto", torch.zeros(1, 1, 1))
    run = lambda features, plan, out: launches.append(plan) or backend.run(features, plan, out)  # noqa: E731
    counting = type(backend)(backend.name, backend.why_unavailable, backend.why_unfit, run, backend.run_backward)
    monkeypatch.setitem(backends.BACKENDS, backend.name, counting)
    return launches


def test_videos_that_adjoin_are_one_launch_and_no_copy(counted):
    hidden = torch.randn(4, 6, 17, 8)
    slowfast_aggregate(hidden[:, :, 1:], LAYOUT)
    assert len(counted) == 1
    rows = torch.zeros(4, 60, 8)[:, 5 : 5 + 3 * 8 + 6 * 4]  # of a language model's embeddings
    assert slowfast_aggregate(hidden[:, :, 1:], LAYOUT, out=rows) is rows
    assert len(counted) == 5 and torch.equal(rows, slowfast_aggregate(hidden[:, :, 1:], LAYOUT))


def test_nothing_is_copied():
    if reason := registry.load_library():
        pytest.skip(reason)
    for hidden in (torch.randn(2, 40, 577, 64)[:, :, 1:], torch.randn(2, 41, 577, 64)[:, 1:, 1:]):
        out = torch.empty(2, 40 + 3 * 288, 64)
        layout = "slowfast-slow_3frms_spatial_1d_max_pool-fast_1x1"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            slowfast_aggregate(hidden, layout, out=out)
        assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 1 << 17


def test_a_grid_and_parts():
    x = torch.randn(2, 5, 12, 8)
    assert torch.equal(slowfast_aggregate(x, LAYOUT, grid=(3, 4)), one_by_one(x, grid=(3, 4)))
    parts = aggregate_by_pathway(x, LAYOUT, grid=(3, 4))
    assert torch.equal(parts["fast"], one_by_one(x, "slowfast-fast_2x2", grid=(3, 4)))
    assert resolve_plan(x, LAYOUT, (3, 4)).lengths == (5, 5)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", [LAYOUT, "llava_next_video-bilinear", "video_chatgpt"])
def test_one_graph_for_every_number_of_videos_and_frames(layout, graphs):
    compiled = torch.compile(lambda x: slowfast_aggregate(x, layout) * 2, fullgraph=True, dynamic=True, backend=graphs)
    for videos, frames in ((3, 5), (2, 9), (5, 4)):
        x = torch.randn(videos, frames, 16, 8, requires_grad=True)
        expected = slowfast_aggregate(x, layout) * 2
        got = compiled(x)
        torch.testing.assert_close(got, expected)
        for ours, theirs in zip(*(torch.autograd.grad(tokens.sin().sum(), x) for tokens in (got, expected))):
            torch.testing.assert_close(ours, theirs)
    assert graphs.frame_count == 1


def test_exported_with_any_number_of_videos_and_frames():
    sizes = {0: torch.export.Dim("videos", min=1, max=64), 1: torch.export.Dim("frames", min=1, max=512)}
    call = (torch.randn(3, 6, 16, 8),)
    program = torch.export.export(SlowFastAggregator(LAYOUT), call, dynamic_shapes={"features": sizes})
    for videos, frames in ((1, 1), (2, 9)):
        x = torch.randn(videos, frames, 16, 8)
        assert torch.equal(program.module()(x), one_by_one(x))


def test_shapes_alone_and_vmap():
    assert slowfast_aggregate(torch.empty(2, 50, 576, 4096, device="meta")).shape == (2, 3680, 4096)
    x = torch.randn(4, 2, 5, 16, 8)
    assert torch.equal(torch.func.vmap(lambda x: slowfast_aggregate(x, LAYOUT))(x), torch.stack([*map(one_by_one, x)]))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["exact", "commuted", "auto"])
def test_the_projector(mode, view):
    projector, hidden = make_projector().requires_grad_(False), VIEWS[view](torch.randn(3, 7, 17, 24))
    expected = torch.stack([project_and_aggregate(video, projector, LAYOUT, mode=mode) for video in hidden])
    module = FusedProjectorAggregator(projector, LAYOUT, mode)
    torch.testing.assert_close(module(hidden), expected, rtol=1e-5, atol=1e-6)
    buffer = torch.zeros(len(expected), expected.shape[1] + 7, expected.shape[2])
    assert module(hidden, out=buffer[:, 3:-4]).data_ptr() == buffer[:, 3:-4].data_ptr()
    torch.testing.assert_close(buffer[:, 3:-4], expected, rtol=1e-5, atol=1e-6)
    assert not buffer[:, :3].any() and not buffer[:, -4:].any()


def test_a_layout_that_pools_first():
    projector, hidden = make_projector().requires_grad_(False), torch.randn(2, 5, 17, 24)
    call = {"separators": torch.randn(1, 40)}
    expected = torch.stack([project_and_aggregate(v, projector, "videollm_online-interval", **call) for v in hidden])
    torch.testing.assert_close(project_and_aggregate(hidden, projector, "videollm_online-interval", **call), expected)
    net = PathwayProjectors({"temporal": nn.Linear(24, 6), "spatial": nn.Linear(24, 6)})
    patches = hidden[:, :, 1:]
    torch.testing.assert_close(net(patches), torch.stack([net(video) for video in patches]))


def test_a_compiled_projector(graphs):
    module = FusedProjectorAggregator(make_projector().requires_grad_(False), LAYOUT, "commuted")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    for videos, frames in ((3, 5), (2, 9)):
        hidden = torch.randn(videos, frames, 16, 24)
        torch.testing.assert_close(compiled(hidden), module(hidden), rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: slowfast_aggregate(x, LAYOUT, frame_offsets=[0, 2, 4]), r"leave them out for \[B, T, N, D\]"),
        (lambda x: project_and_aggregate(x, nn.Identity(), LAYOUT, frame_offsets=[0, 4]), "leave them out"),
        (lambda x: slowfast_aggregate(x[:0], LAYOUT), "the batch holds no video"),
        (lambda x: slowfast_aggregate(x[:, :0], LAYOUT), "cannot lay out videos of"),
        (lambda x: slowfast_aggregate(x, LAYOUT, out=torch.zeros(80, 8)), r"out must be \[2, 40, 8\]"),
        (lambda x: slowfast_aggregate(x, LAYOUT, out=torch.zeros(2, 39, 8)), r"out must be \[2, 40, 8\]"),
        (lambda x: slowfast_aggregate(x, LAYOUT, out=torch.zeros(1, 40, 8).expand(2, -1, -1)), "do not overlap"),
        (lambda x: slowfast_aggregate(x, LAYOUT, out=torch.zeros(40, 2, 8).transpose(0, 1)), "follow one another"),
        (lambda x: slowfast_aggregate(x, LAYOUT, out=x.view(-1)[:640].view(2, 40, 8)), "overlaps the features"),
        (lambda x: slowfast_aggregate(x, LAYOUT, grid=(3, 4)), "grid 3x4 does not fit 16 patches"),
    ],
)
def test_batches_that_cannot_be_served(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.zeros(2, 4, 16, 8))

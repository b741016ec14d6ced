"""Every preset against the layout of its code base: counts, values in float64, and every way to call the op."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import GuardedRows, assert_same
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from bench.paired.published import LAYOUTS, bilinear, pooled
from sfllava_fast import aggregate_by_pathway, slowfast_aggregate
from sfllava_fast.errors import LayoutError
from sfllava_fast.layouts.presets import PRESETS, parse_layout
from sfllava_fast.ops.backends import registry
from sfllava_fast.video.canvas import compose_canvas

each_layout = pytest.mark.parametrize("text", LAYOUTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def patches(text: str, frames: int, grid: tuple[int, int], channels: int = 3, dtype=torch.float64) -> torch.Tensor:
    """Features [T, N, D] for a layout: with a class token where it reads one."""
    return torch.randn(frames, parse_layout(text).class_token + grid[0] * grid[1], channels).to(dtype)


def separators(text: str, channels: int = 3, dtype=torch.float64) -> torch.Tensor | None:
    count = len(parse_layout(text).separators)
    return torch.randn(count, channels).to(dtype) if count else None


# --- what was published: counts and values


PUBLISHED = {  # frames, grid, tokens
    "sf_llava": (50, (24, 24), 3680),
    "sf_llava_34b": (50, (24, 24), 3680),
    "slow_only": (50, (24, 24), 2880),
    "fast_only": (50, (24, 24), 800),
    "uniform": (6, (24, 24), 3456),
    "llava_next_image": (32, (24, 24), 4608),
    "llava_next_video": (32, (24, 24), 4608),
    "llava_video_slowfast": (64, (27, 27), 7 * 170 + 57 * 37),
    "pllava": (16, (24, 24), 2304),
    "video_chatgpt": (100, (16, 16), 356),
    "red_villm": (100, (16, 16), 356),
    "videollm_online": (50, (24, 24), 500),  # published: as many frames as there are
    "ig_vlm": (6, (24, 24), 576),  # in one picture
}
SHAPES = [
    *((name, *shape) for name, shape in PUBLISHED.items() if name != "ig_vlm"),
    ("llava_next_video-max-newline_frame", 32, (24, 24), 4640),
    ("llava_next_video-bilinear-newline_one", 32, (24, 24), 4609),
    ("llava_next_video-avg-newline_grid", 32, (24, 24), 4992),
    ("llava_next_video-bilinear-newline_grid", 64, (27, 27), 13440),  # LLaVA-Video
    ("llava_video_slowfast-newline_grid", 64, (27, 27), 7 * 183 + 57 * 43),  # as its code has them
    ("llava_video_slowfast-bilinear-newline_grid", 64, (27, 27), 7 * 211 + 57 * 57),
    ("pllava", 64, (24, 24), 2304),
    ("pllava", 4, (24, 24), 2304),
    ("video_chatgpt", 7, (16, 16), 356),
    ("video_chatgpt", 130, (16, 16), 386),
    ("red_villm", 100, (32, 32), 1124),  # with Qwen-VL's vision tower
    ("videollm_online", 1, (24, 24), 10),
    ("videollm_online-interval", 1200, (24, 24), 13199),
]


def test_every_preset_is_tested():
    assert set(PRESETS) <= set(LAYOUTS)


@pytest.mark.parametrize(("text", "frames", "grid", "tokens"), SHAPES)
def test_counts_as_published(text, frames, grid, tokens):
    x, vectors = patches(text, frames, grid, 1, torch.float32), separators(text, 1, torch.float32)
    assert slowfast_aggregate(x, text, grid=grid, separators=vectors).shape == (tokens, 1)
    assert parse_layout(text).count_tokens(frames, grid) == tokens


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_own_frames_and_grid_are_the_published_ones(name):
    preset = PRESETS[name]
    assert (preset.frames, preset.grid, preset.count_tokens()) == PUBLISHED[name]
    assert preset.layout == parse_layout(name)


@each_layout
def test_the_text_of_a_layout_is_the_layout(text):
    layout = parse_layout(text)
    assert parse_layout(str(layout)) == layout and parse_layout(layout) is layout


@pytest.mark.parametrize(
    "text",
    [
        "plava", "pllava-16", "llava_next_video-newline", "llava_next_video-newline_row", "llava_next_video-mean",
        "llava_video_slowfast-every_0", "videollm_online-interval-interval", "sf_llava ", "", None, 3,
    ],
)  # fmt: skip
def test_what_is_no_layout_is_said_in_a_line(text):
    with pytest.raises(LayoutError) as error:
        parse_layout(text)
    assert "\n" not in str(error.value)


def test_where_presets_pool():
    before = {name for name, preset in PRESETS.items() if preset.layout.stage == "before"}
    assert before == {"video_chatgpt", "red_villm", "videollm_online"}
    assert {name for name, preset in PRESETS.items() if preset.layout.canvas == (3, 2)} == {"ig_vlm"}


@each_layout
def test_values_in_float64(text):
    for frames, grid in itertools.product((1, 2, 9, 15, 17, 101), ((4, 4), (7, 9))):
        x, vectors = patches(text, frames, grid), separators(text)
        got = slowfast_aggregate(x, text, grid=grid, separators=vectors)
        torch.testing.assert_close(got, LAYOUTS[text](x, grid, vectors), **CLOSE)


@settings(max_examples=100)
@given(st.sampled_from(list(LAYOUTS)), st.integers(1, 130), st.integers(1, 14), st.integers(1, 14), st.integers(1, 3))
def test_values_in_float64_on_any_video(text, frames, height, width, channels):
    grid = height, width
    x, vectors = patches(text, frames, grid, channels), separators(text, channels)
    try:
        got = slowfast_aggregate(x, text, grid=grid, separators=vectors)
    except LayoutError:
        assume("stride" in str(parse_layout(text)))
        assert min(grid) < 4
        return
    torch.testing.assert_close(got, LAYOUTS[text](x, grid, vectors), **CLOSE)


def test_frames_may_be_averaged_between_which_patches_lie():
    x, grid = patches("uniform", 7, (9, 6)), (9, 6)
    got = slowfast_aggregate(x, "pool:adaptive3,linear2,linear2,mean", grid=grid)
    frames = torch.stack([x[start:stop].mean(0) for start, stop in ((0, 3), (2, 5), (4, 7))])
    torch.testing.assert_close(got, pooled(frames, grid, bilinear).flatten(0, 2), **CLOSE)


def test_ig_vlms_picture():
    frames = torch.randint(256, (5, 4, 6, 3), dtype=torch.uint8)
    white = np.full((4, 6, 3), 255, np.uint8)
    rows = [np.hstack(pair) for pair in zip(frames[::2].numpy(), [*frames[1::2].numpy(), white])]
    assert np.array_equal(compose_canvas(frames, 3, 2)[0].numpy(), np.vstack(rows))


def backend_names() -> list[str]:
    return ["torch"] + ["cpu"] * (registry.load_library() is None)


@each_layout
@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_more_than_twice_the_code_bases(text, backend, dtype):
    for frames, grid in ((101, (9, 9)), (17, (16, 16))):
        x, vectors = patches(text, frames, grid, 9, dtype), separators(text, 9, dtype)
        got = slowfast_aggregate(x, text, grid=grid, separators=vectors, backend=backend)
        eager = LAYOUTS[text](x, grid, vectors)
        exact = LAYOUTS[text](x.double(), grid, None if vectors is None else vectors.double())
        assert got.dtype == dtype
        # Sums are in float32: where a code base adds up in a better order than ours, that is how far they are apart.
        tiny = torch.finfo(torch.float32).eps
        assert (got.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + tiny


@pytest.mark.parametrize("text", [t for t in LAYOUTS if t in ("slow_only", "uniform", "ig_vlm") or "-max" in t])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_only_selects_is_exact(text, dtype):
    x, vectors = patches(text, 17, (9, 13), 5, dtype), separators(text, 5, dtype)
    got = slowfast_aggregate(x, text, grid=(9, 13), separators=vectors)
    assert torch.equal(got, LAYOUTS[text](x, (9, 13), vectors))


# --- who reads what


def test_pllava_of_15_frames_never_sees_the_last_seven():
    x = patches("pllava", 15, (4, 4))
    x[8:] = float("nan")
    assert slowfast_aggregate(x, "pllava").isfinite().all()


def test_padding_is_zero_whatever_the_features_are():
    x = torch.full((7, 16, 3), float("inf"))
    tokens = slowfast_aggregate(x, "video_chatgpt")
    assert tokens.isinf().nonzero()[:, 0].unique().tolist() == [*range(7), *range(100, 116)]
    assert not tokens[7:100].any()


def test_class_token_and_patches_are_kept_apart():
    x = patches("videollm_online", 3, (4, 4))
    x[:, 0] = float("nan")
    tokens = slowfast_aggregate(x, "videollm_online").unflatten(0, (3, 10))
    assert tokens[:, 0].isnan().all() and tokens[:, 1:].isfinite().all()


def test_parts_apart():
    x = patches("red_villm", 7, (5, 4))
    parts = aggregate_by_pathway(x, "red_villm", grid=(5, 4))
    assert list(parts) == ["temporal", "spatial"]
    torch.testing.assert_close(parts["temporal"][:7], x.mean(1))
    torch.testing.assert_close(parts["spatial"], x.mean(0))
    assert not parts["temporal"][7:].any() and len(parts["temporal"]) == 100


# --- every way to call the op


@each_layout
@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_a_buffer(text, backend, dtype):
    call = {"grid": (9, 7), "backend": backend, "separators": separators(text, 5, dtype)}
    x = patches(text, 11, (9, 7), 5, dtype)
    expected = slowfast_aggregate(x, text, **call)
    out = GuardedRows(len(expected), 5, dtype)
    assert slowfast_aggregate(x, text, out=out.rows, **call) is out.rows
    assert_same(out.rows, expected)
    out.check()


@each_layout
@pytest.mark.parametrize("backend", backend_names())
def test_packed_videos_equal_each_alone(text, backend):
    call = {"grid": (7, 5), "backend": backend, "separators": separators(text, 3, torch.float32)}
    lengths = (3, 1, 20, 101)
    x = patches(text, sum(lengths), (7, 5), 3, torch.float32)
    tokens, offsets = slowfast_aggregate(x, text, frame_offsets=[0, 3, 4, 24, 125], **call)
    alone = [slowfast_aggregate(video, text, **call) for video in x.split(lengths)]
    assert torch.equal(tokens, torch.cat(alone))
    assert offsets.diff().tolist() == [len(video) for video in alone]


@each_layout
@pytest.mark.parametrize("frames", [5, 17])
def test_gradients_are_pytorchs(text, frames):
    x, vectors = patches(text, frames, (9, 7)).requires_grad_(), separators(text)
    inputs = [x] if vectors is None else [x, vectors.requires_grad_()]
    expected = LAYOUTS[text](x, (9, 7), vectors)
    grad = torch.randn_like(expected)
    got = slowfast_aggregate(x, text, grid=(9, 7), separators=vectors)
    for got, expected in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(got, expected, **CLOSE)


DISTINCT = (  # each way to pool, to order and to separate
    "llava_next_video-bilinear-newline_one",
    "llava_video_slowfast-avg-every_3-newline_grid",
    "pllava",
    "video_chatgpt",
    "videollm_online-interval",
)
distinct = pytest.mark.parametrize("text", DISTINCT)


@distinct
def test_gradcheck(text):
    # 5 frames: repeated by PLLaVA, padded by Video-ChatGPT. 5 rows: what bilinear resizing weighs unevenly.
    x, vectors = patches(text, 5, (5, 4), 1).requires_grad_(), separators(text, 1)
    inputs = (x, vectors if vectors is None else vectors.requires_grad_())
    call = lambda x, vectors: slowfast_aggregate(x, text, grid=(5, 4), separators=vectors)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@distinct
def test_opcheck(text):
    dtype = torch.bfloat16
    x, vectors = patches(text, 7, (5, 4), 3, dtype), separators(text, 3, dtype)
    tokens = parse_layout(text).plan((1, 6), (5, 4)).offsets[-1]
    call, grad = (x, text, 5, 4, torch.tensor([0, 1, 7])), torch.randn(tokens, 3).to(dtype)
    op = torch.ops.sfllava_fast
    opcheck(op.aggregate.default, (*call, "auto", vectors))
    opcheck(op.aggregate_out.default, (*call, "auto", grad.clone(), vectors))
    opcheck(op.aggregate_backward.default, (grad, *call, "auto"))
    if vectors is not None:
        opcheck(op.separators_backward.default, (grad, *call, len(vectors)))


@distinct
def test_compile_once_for_every_number_of_frames(text):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    vectors = separators(text, 4, torch.float32)
    call = torch.compile(
        lambda x: slowfast_aggregate(x, text, grid=(9, 7), separators=vectors) * 2,
        fullgraph=True, dynamic=True, backend=graphs,
    )  # fmt: skip
    for frames in (5, 16, 101, 2):
        x = patches(text, frames, (9, 7), 4, torch.float32)
        assert torch.equal(call(x), slowfast_aggregate(x, text, grid=(9, 7), separators=vectors) * 2)
    assert graphs.frame_count == 1
    torch._dynamo.reset()


@distinct
def test_compiled_packed_videos(text):
    torch._dynamo.reset()
    vectors = separators(text, 4, torch.float32)
    call = torch.compile(
        lambda x, ends: slowfast_aggregate(x, text, grid=(9, 7), separators=vectors, frame_offsets=ends),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for ends in ([0, 2, 7], [0, 20, 21, 130]):
        x = patches(text, ends[-1], (9, 7), 4, torch.float32)
        tokens, offsets = call(x, torch.tensor(ends))
        expected, at = slowfast_aggregate(x, text, grid=(9, 7), separators=vectors, frame_offsets=ends)
        assert torch.equal(tokens, expected) and torch.equal(offsets, at)
    torch._dynamo.reset()


class Aggregate(torch.nn.Module):
    def __init__(self, text: str, vectors: torch.Tensor | None) -> None:
        super().__init__()
        self.text, self.vectors = text, vectors

    def forward(self, features):
        return slowfast_aggregate(features, self.text, grid=(9, 7), separators=self.vectors)


@distinct
def test_export_with_dynamic_frames(text):
    module = Aggregate(text, separators(text, 4, torch.float32))
    shapes = {"features": {0: torch.export.Dim("frames", min=1, max=512)}}
    program = torch.export.export(module, (patches(text, 6, (9, 7), 4, torch.float32),), dynamic_shapes=shapes)
    for frames in (1, 15, 101):
        x = patches(text, frames, (9, 7), 4, torch.float32)
        assert torch.equal(program.module()(x), module(x))


def test_a_presets_layout_has_its_frames():
    """Of a name alone: neither the text nor equality has them."""
    for name, preset in PRESETS.items():
        layout = parse_layout(name)
        assert layout.frames == preset.frames == PUBLISHED[name][0]
        assert parse_layout(str(layout)).frames is None
        assert layout == parse_layout(str(layout)) and hash(layout) == hash(parse_layout(str(layout)))
        assert layout.plan(20, (16, 16)) is parse_layout(str(layout)).plan(20, (16, 16))
    assert parse_layout("sf_llava").only("slow").frames is None

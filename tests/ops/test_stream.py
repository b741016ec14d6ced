"""Streams: the dyadic rule against a simulation that drops, tokens against the op on the frames kept, memory."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import live_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from sfllava_fast.errors import InputError, LayoutError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.ops.aggregate import slowfast_aggregate
from sfllava_fast.ops.stream import SlowFastStream, kept_frames

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (LAYOUT, "slowfast-fast_3x1", "pool:adaptive3,stride2,each,mean+last:each,adaptive1,adaptive3,max")


def drop(seen: int, most: int) -> list[int]:
    """Frames kept of a stream, by a list from which frames are dropped as they come."""
    held, stride = [], 1
    for frame in range(seen):
        if frame % stride == 0 and len(held) == most:
            held, stride = held[::2], 2 * stride
        if frame % stride == 0:
            held.append(frame)
    return held


def pieces(data, total: int, most: int) -> list[slice]:
    """Cuts of `total` frames, one to `most` a piece."""
    cuts = [0]
    while cuts[-1] < total:
        cuts.append(min(total, cuts[-1] + data.draw(st.integers(1, most))))
    return [slice(*cut) for cut in zip(cuts, cuts[1:])]


class Largest(TorchDispatchMode):
    """The most bytes that an operator allocated."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


def features(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(len(pixels), 16, 3).astype(np.float32)).sqrt()


class Tower:
    """Encodes uint8 pixels [r, 4, 4, 3] that carry their frame's number; remembers which it saw."""

    def __init__(self):
        self.encoded = []

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        assert not torch.is_grad_enabled()  # a graph would hold on to every frame
        self.encoded += (pixels[:, 0, 0].astype(int) @ [1, 256, 0]).tolist()
        return features(pixels)


def pixels(frames: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(frames) % 256, np.arange(frames) // 256
    return pixels


# --- the rule


@given(st.integers(1, 20))
def test_the_rule_is_what_dropping_every_other_frame_leaves(most):
    for seen in range(200):
        assert list(kept_frames(seen, most)) == drop(seen, most), seen


@given(st.integers(1, 10**9), st.integers(1, 1000))
def test_the_stride_is_the_smallest_power_of_two_that_leaves_at_most_so_many(seen, most):
    kept = kept_frames(seen, most)
    powers = [2**k for k in range(40) if -(-seen // 2**k) <= most]
    assert (kept.start, kept.stop, kept.step) == (0, seen, powers[0])
    assert seen < most or most / 2 < len(kept) <= most


# --- tokens


@given(st.data(), st.sampled_from(LAYOUTS), st.sampled_from(DTYPES))
def test_tokens_are_those_of_the_frames_kept(data, layout, dtype):
    most, total = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 80))
    x = torch.randn(total, 15, 8)[..., ::2].to(dtype)
    stream = SlowFastStream(layout, most, grid=(5, 3))
    for piece in pieces(data, total, 40):
        stream.push(x[piece])
        kept = drop(piece.stop, most)
        expected = slowfast_aggregate(x[kept].contiguous(), layout, grid=(5, 3))
        assert torch.equal(stream.tokens(), expected)
        assert stream.count_tokens() == len(expected) == stream.plan.tokens["total"]
        assert list(stream.frames) == kept and stream.seen == piece.stop
        assert stream.stride == (kept[1] if len(kept) > 1 else stream.frames.step)
        out = torch.full_like(expected, torch.nan)
        assert stream.tokens(out=out) is out and torch.equal(out, expected)


@pytest.mark.parametrize(
    "layout",
    [
        "llava_next_video-bilinear-newline_frame",
        "llava_video_slowfast-every_3-newline_grid",
        "pllava",
        "video_chatgpt",
        "videollm_online-interval",
    ],
)
def test_every_layout_of_the_field_streams(layout):
    parsed = parse_layout(layout)
    x = torch.randn(60, parsed.class_token + 16, 6)
    separators = torch.randn(len(parsed.separators), 6) if parsed.separators else None
    stream = SlowFastStream(layout, 7)
    for start in range(0, 60, 5):
        stream.push(x[start : start + 5])
        expected = slowfast_aggregate(x[drop(start + 5, 7)], layout, separators=separators)
        assert torch.equal(stream.tokens(separators=separators), expected) and stream.count_tokens() == len(expected)


def test_tokens_are_those_of_the_contract():
    x = torch.randn(300, 16, 6, dtype=torch.float64)
    stream = SlowFastStream(LAYOUT, 50)
    for frame in x:
        stream.push(frame[None])
    expected = oracle.tokens(x.numpy()[drop(300, 50)], (4, 4), 3, "spatial_1d_max_pool", (2, 2))
    np.testing.assert_allclose(stream.tokens().numpy(), expected, rtol=1e-14, atol=1e-14)


def test_nan_stays_in_its_channel():
    x = torch.randn(9, 16, 6)
    x[4, :, 2] = torch.nan
    stream = SlowFastStream(LAYOUT, 5)
    stream.push(x)  # keeps 0, 2, 4, 6, 8
    tokens, expected = stream.tokens(), slowfast_aggregate(x[::2], LAYOUT)
    assert torch.equal(tokens.isnan(), expected.isnan())
    assert tokens[:, 2].isnan().any() and not tokens[:, [0, 1, 3, 4, 5]].isnan().any()


@given(st.data(), st.integers(1, 9))
def test_a_frame_is_encoded_once_and_only_where_it_is_kept(data, most):
    x, tower = pixels(300), Tower()
    stream = SlowFastStream(LAYOUT, most, encode=tower)
    expected = []
    for piece in pieces(data, 300, 60):
        stream.push(x[piece])
        expected += [frame for frame in drop(piece.stop, most) if frame >= piece.start]
        assert tower.encoded == expected
    assert torch.equal(stream.tokens(), slowfast_aggregate(features(x[drop(300, most)]), LAYOUT))


def test_a_list_of_frames_serves_where_encode_takes_one():
    x = pixels(20)
    stream = SlowFastStream(LAYOUT, 4, encode=lambda frames: Tower()(np.stack(frames)))
    stream.push(list(x))
    assert torch.equal(stream.tokens(), slowfast_aggregate(features(x[::8]), LAYOUT))


def test_a_stream_begun_in_inference_mode_goes_on_outside_it():
    x = torch.randn(9, 16, 6)
    stream = SlowFastStream(LAYOUT, 4)
    with torch.inference_mode():
        stream.push(x[:3] * 1)
    stream.push((x[3:] * 1).requires_grad_())
    assert torch.equal(stream.tokens(), slowfast_aggregate(x[::4], LAYOUT))
    assert not stream.tokens().requires_grad


# --- memory


def test_memory_does_not_grow_with_the_stream(monkeypatch):
    import sfllava_fast.ops.stream

    x, read = torch.randn(1, 16, 64), []
    monkeypatch.setattr(
        sfllava_fast.ops.stream, "slowfast_aggregate", lambda features, *_, **__: read.append(features.data_ptr())
    )
    stream = SlowFastStream(LAYOUT, 12)
    assert stream.nbytes == 0
    before = live_bytes()
    with Largest() as allocated:
        stream.push(x)
    assert allocated.nbytes == stream.nbytes == 12 * x.nbytes
    with Largest() as allocated:
        for _ in range(999):
            stream.push(x)
            stream.tokens()
    for _ in range(9_000):
        stream.push(x)
    stream.tokens()
    assert len(set(read)) == 1  # the buffer never moves
    assert allocated.nbytes <= x.nbytes  # and there is no second one
    assert live_bytes() - before == stream.nbytes == 12 * x.nbytes
    assert stream.seen == 10_000 and stream.stride == 1024


# --- what fails


def test_a_push_that_fails_leaves_the_stream_as_it_was():
    x, tower, broken = pixels(100), Tower(), True

    def encode(frames):
        if broken:
            raise RuntimeError("out of memory")
        return tower(frames)

    stream = SlowFastStream(LAYOUT, 6, encode=encode)
    for start in range(0, 100, 5):
        for broken in (True, False):
            before = stream.seen, stream.nbytes, stream.tokens() if stream.seen else None
            if broken and any(frame >= start for frame in drop(start + 5, 6)):
                with pytest.raises(RuntimeError, match="out of memory"):
                    stream.push(x[start : start + 5])
                assert (stream.seen, stream.nbytes) == before[:2]
                assert not stream.seen or torch.equal(stream.tokens(), before[2])
        stream.push(x[start : start + 5])
    assert torch.equal(stream.tokens(), slowfast_aggregate(features(x[drop(100, 6)]), LAYOUT))


def test_an_interrupt_while_frames_move_is_never_taken_for_a_stream(monkeypatch):
    x, copy, copies = torch.randn(9, 16, 6), torch.Tensor.copy_, []

    def interrupted(self, source):
        copies.append(source)
        if len(copies) == 3:
            raise KeyboardInterrupt
        return copy(self, source)

    stream = SlowFastStream(LAYOUT, 8)
    stream.push(x[:8])
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.push(x[8:])
    monkeypatch.undo()
    for use in (stream.tokens, stream.count_tokens, lambda: stream.push(x)):
        with pytest.raises(InputError, match="interrupted.*open another"):
            use()


@pytest.mark.parametrize(
    "frames, says",
    [
        (torch.randn(0, 16, 6), "push one frame or more"),
        (torch.tensor(1.0), "without a length"),
        (torch.randn(16, 6), r"not \[\d+, 6\]"),
        (torch.randn(2, 16, 5), r"are \[16, 6\] torch.float32 on cpu, not \[16, 5\] .* open another stream"),
        (torch.randn(2, 9, 6), r"not \[9, 6\]"),
        (torch.randn(2, 16, 6).half(), "not .* torch.float16"),
        (torch.randn(2, 16, 6, device="meta"), "on meta"),
        (torch.ones(2, 16, 6, dtype=torch.uint8), "floating point"),
        (np.zeros((2, 16, 6)), "torch.Tensor, not ndarray"),
    ],
)
@pytest.mark.parametrize("dropped", [False, True], ids=["kept", "dropped"])
def test_frames_of_another_kind_are_told(frames, says, dropped):
    x = torch.randn(33, 16, 6)
    stream = SlowFastStream(LAYOUT, 2)
    stream.push(x if dropped else x[:2])  # the next one kept is frame 64, or 2
    before = stream.tokens()
    with pytest.raises(InputError, match=says) as error:
        stream.push(frames)
    assert "\n" not in str(error.value)
    assert torch.equal(stream.tokens(), before) and stream.seen == (33 if dropped else 2)


def test_encode_must_return_a_row_a_frame():
    stream = SlowFastStream(LAYOUT, encode=lambda frames: torch.zeros(1, 16, 6))
    with pytest.raises(InputError, match="of 2 frames"):
        stream.push(np.zeros((2, 4, 4, 3), np.uint8))
    assert stream.seen == 0


def test_nothing_is_kept_of_frames_that_the_layout_does_not_fit():
    stream = SlowFastStream("slowfast-slow_1frms_spatial_2d_max_pool")
    with pytest.raises(LayoutError, match="leaves no token of a 1x1 grid"):
        stream.push(torch.randn(1, 1, 6))
    with pytest.raises(InputError, match="15 patches are not a square grid"):
        stream.push(torch.randn(1, 15, 6))
    assert stream.nbytes == stream.seen == 0
    stream.push(torch.randn(1, 16, 4))
    assert stream.tokens().shape == (4, 4)


def test_a_layout_may_need_more_frames_than_the_first_push_brings():
    layout, x = "pool:stride2,each,each,mean", torch.randn(4, 16, 6)
    stream = SlowFastStream(layout)
    stream.push(x[:1])
    with pytest.raises(LayoutError, match="give it more frames"):
        stream.tokens()
    stream.push(x[1:])
    assert torch.equal(stream.tokens(), slowfast_aggregate(x, layout))


def test_before_the_first_frame():
    stream = SlowFastStream(LAYOUT)
    assert (list(stream.frames), stream.seen, stream.stride, stream.nbytes) == ([], 0, 1, 0)
    for use in (stream.tokens, stream.count_tokens, lambda: stream.plan):
        with pytest.raises(InputError, match="no frames yet"):
            use()


@pytest.mark.parametrize("most", [0, -1, 2.5, "50", None])
def test_most_must_be_a_count(most):
    with pytest.raises(InputError, match="most must be an integer of at least 1"):
        SlowFastStream(LAYOUT, most)

"""Streams with a memory, against a float64 simulation that keeps every frame and counts squared errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import live_bytes

from sfllava_fast.errors import InputError, LayoutError
from sfllava_fast.ops.aggregate import slowfast_aggregate
from sfllava_fast.ops.memory_stream import MemoryStream

RECENT = "slowfast-slow_2frms_spatial_1d_max_pool-fast_2x2"
CLIP = "clip:adaptive1,adaptive2,adaptive2,mean"
SMALL = dict(recent_frames=5, clip_frames=3, held_clips=6, shown_clips=4)


def memory_stream(**settings) -> MemoryStream:
    return MemoryStream(RECENT, CLIP, **(SMALL | settings))


def begin_of_recent(seen: int, recent: int) -> int:
    return max(0, seen - recent)


def condensed(x: np.ndarray, clip: int) -> np.ndarray:
    """Tokens [clips, 4, D] of frames [T, 16, D], each 4 x 4 patches: the quarters' means over every `clip` frames."""
    whole = x[: len(x) // clip * clip]
    return whole.reshape(-1, clip, 2, 2, 2, 2, x.shape[-1]).mean((1, 3, 5)).reshape(-1, 4, x.shape[-1])


def clips_of(x: np.ndarray, recent: int, clip: int, held: int) -> list[range]:
    """The clips held after all of x, pair after pair merged whose union has the least squared error more."""
    clips = []
    for first in range(0, begin_of_recent(len(x), recent), clip):
        clips = merged(x, [*clips, range(first, first + clip)], clip, held)
    return clips


def merged(x: np.ndarray, clips: list[range], clip: int, most: int) -> list[range]:
    tokens = condensed(x, clip)

    def error(frames: range) -> float:
        """Squared distance of the clips as they were condensed from their mean, once for each frame."""
        parts = tokens[frames.start // clip : frames.stop // clip]
        return clip * float(np.square(parts - parts.mean(0)).sum())

    while len(clips) > most:
        unions = [range(a.start, b.stop) for a, b in zip(clips, clips[1:])]
        costs = [error(union) - error(a) - error(b) for union, a, b in zip(unions, clips, clips[1:])]
        best = int(np.argmin(costs))
        clips = [*clips[:best], unions[best], *clips[best + 2 :]]
    return clips


def frames_of(clips) -> list[range]:
    return [clip.frames for clip in clips]


# --- what is remembered


@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 4), st.integers(1, 6), st.integers(0, 99))
def test_clips_are_those_that_least_squared_error_merges(total, clip, more, held, seed):
    x = np.random.default_rng(seed).normal(size=(total, 16, 3))
    stream = memory_stream(recent_frames=clip + more, clip_frames=clip, held_clips=held, shown_clips=held)
    stream.push(torch.from_numpy(x))
    assert frames_of(stream.clips) == clips_of(x, clip + more, clip, held)
    for part in stream.clips:
        mean = condensed(x[part.frames], len(part.frames))[0]
        assert part.tokens.dtype == torch.float64
        np.testing.assert_allclose(part.tokens.numpy(), mean, rtol=1e-12, atol=1e-13)


@given(st.lists(st.integers(1, 40), max_size=12))
def test_every_frame_is_in_one_clip_or_recent_however_it_came(pushes):
    x = torch.randn(sum(pushes) + 1, 16, 4, generator=torch.Generator().manual_seed(0))
    at_once, in_pieces = memory_stream(), memory_stream()
    at_once.push(x)
    start = 0
    for count in [*pushes, 1]:
        in_pieces.push(x[start : start + count])
        start += count
        covered = sum(len(clip.frames) for clip in in_pieces.clips)
        assert [frame for clip in in_pieces.clips for frame in clip.frames] == list(range(covered))
        assert in_pieces.frames == range(begin_of_recent(start, 5), start) and in_pieces.seen == start
        assert in_pieces.frames.start <= covered < in_pieces.frames.start + 3
    assert frames_of(at_once.clips) == frames_of(in_pieces.clips)
    assert torch.equal(at_once.tokens(), in_pieces.tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_are_the_clips_in_order_and_the_recent_frames_by_their_layout(dtype):
    x = torch.randn(17, 16, 6).to(dtype)
    stream = memory_stream()
    stream.push(x)
    clips = [slowfast_aggregate(x[first : first + 3], CLIP) for first in (0, 3, 6, 9)]
    recent = slowfast_aggregate(x[12:], RECENT)
    expected = torch.cat([*clips, recent])
    assert torch.equal(stream.tokens(), expected) and stream.count_tokens() == len(expected)
    assert stream.plan.tokens["total"] == len(recent)
    out = torch.full_like(expected, torch.nan)
    assert stream.tokens(out=out) is out and torch.equal(out, expected)


def test_merged_tokens_are_rounded_once():
    x = torch.randn(600, 16, 6).bfloat16()
    stream = memory_stream(held_clips=2, shown_clips=2)
    stream.push(x)
    parts = [slowfast_aggregate(x[first : first + 3], CLIP).double() for first in range(0, 597, 3)]
    for i, clip in enumerate(stream.clips):
        mean = torch.stack([parts[first // 3] for first in clip.frames[::3]]).mean(0)
        shown = stream.tokens()[4 * i : 4 * i + 4].double()
        assert torch.all((shown - mean).abs() <= mean.abs() * 2**-8 + 1e-7)  # half a unit of bfloat16
    assert any(len(clip.frames) > 100 for clip in stream.clips)


def test_a_picture_that_stands_still_stays_what_it_is():
    x = torch.randn(1, 16, 6)
    stream = memory_stream()
    for _ in range(300):
        stream.push(x)
    tokens = slowfast_aggregate(x.expand(3, -1, -1), CLIP)
    assert all(torch.equal(clip.tokens, tokens) for clip in stream.clips)
    assert [len(clip.frames) for clip in stream.clips] == [297 - 15, 3, 3, 3, 3, 3]  # of equals the oldest are merged


def test_a_change_of_scene_stays_between_clips():
    rng = np.random.default_rng(0)
    lengths = 3 * rng.integers(2, 12, 20)
    scenes = 2 * rng.normal(size=(1, 16, 8)) + rng.normal(size=(20, 16, 8))
    x = np.concatenate([np.repeat(scene[None], n, 0) for scene, n in zip(scenes, lengths)])
    stream = memory_stream(held_clips=24, shown_clips=20)
    stream.push(torch.from_numpy(x + 2 * rng.normal(size=x.shape)))  # merged by cosine, 4 of the 19 changes are lost
    begins = {int(begin) for begin in np.cumsum(lengths)[:-1]}
    assert begins <= {clip.frames.start for clip in stream.clips}


def test_memory_does_not_grow_with_the_stream():
    x, settings = torch.randn(1, 16, 64).half(), dict(held_clips=8, recent_frames=6)
    memory_stream(**settings).push(x.expand(100, -1, -1))  # plans that are cached are no part of the stream
    stream, before, tokens = memory_stream(**settings), live_bytes(), set()
    for _ in range(100):
        stream.push(x)
    full = live_bytes() - before
    assert full == stream.nbytes == 6 * x.nbytes + 8 * 4 * 64 * 4
    for i in range(9_900):
        stream.push(x)
        tokens.add(stream.count_tokens())
    assert live_bytes() - before == stream.nbytes == full
    assert tokens == {len(stream.tokens())} == {4 * 4 + 2 * 8 + 6 * 4}


def test_nan_stays_in_its_clip():
    x = torch.randn(200, 16, 6)
    x[31, :, 2] = torch.nan
    stream = memory_stream()
    stream.push(x)
    (marred,) = [clip for clip in stream.clips if clip.tokens.isnan().any()]
    assert marred.frames == range(30, 33)
    assert not stream.tokens(question=torch.ones(6)).isnan().any()


# --- what is shown


def stream_of(values: list[float]) -> MemoryStream:
    """A clip of one frame for each value, which is that of all its tokens' first channel, and a recent frame."""
    x = torch.zeros(len(values) + 1, 16, 2)
    x[:-1, :, 0], x[:-1, :, 1] = torch.tensor(values)[:, None], 1
    stream = memory_stream(recent_frames=1, clip_frames=1, held_clips=len(values), shown_clips=min(3, len(values)))
    stream.push(x)
    return stream


def shown(stream: MemoryStream, **how) -> list[float]:
    """First channels of the clips' tokens, after checking that `tokens` are what `select` says, in temporal order."""
    clips = stream.select(**how)
    starts = [clip.frames.start for clip in clips]
    assert starts == sorted(starts)
    tokens = stream.tokens(**how)
    assert len(tokens) == stream.count_tokens()
    assert torch.equal(tokens[: 4 * len(clips)], torch.cat([clip.tokens for clip in clips]))
    return [clip.tokens[0, 0].item() for clip in clips]


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([5, 1, 4, 2, 3], [10, 30, 50]),
        (torch.tensor([0.0, 9, 0, 9, 9]), [20, 40, 50]),
        (torch.zeros(5).half(), [10, 20, 30]),
        ([-torch.inf, 0, torch.inf, -1, -2], [20, 30, 40]),
    ],
)
def test_scores_select_and_time_orders(scores, expected):
    stream = stream_of([10, 20, 30, 40, 50])
    assert shown(stream, scores=scores) == expected
    assert len(stream.clips) == 5


def test_a_question_selects_by_cosine():
    stream = stream_of([1, 0, 8, -1, 4, -8])  # the angle of (value, 1) to (1, 0) falls as the value grows
    assert shown(stream, question=torch.tensor([3.0, 0])) == [1, 8, 4]
    assert shown(stream, question=torch.tensor([-3.0, 0]).double()) == [0, -1, -8]
    assert shown(stream, question=torch.tensor([0.0, 2])) == [1, 0, -1]


def test_with_neither_neighbours_are_merged_for_the_call():
    stream = stream_of([0, 10, 11, 50, 51, 51.5])
    assert shown(stream) == [0, 10.5, torch.tensor([50, 51, 51.5]).double().mean().float()]
    assert shown(stream) == shown(stream) and len(stream.clips) == 6


def test_clips_shown_are_merged_as_clips_held_are():
    x = np.random.default_rng(0).normal(size=(80, 16, 3))
    stream = memory_stream(held_clips=12, shown_clips=5)
    stream.push(torch.from_numpy(x))
    assert frames_of(stream.select()) == merged(x, clips_of(x, 5, 3, 12), 3, 5)


# --- frames


def test_a_frame_is_encoded_once_and_its_features_may_be_overwritten():
    x, encoded, buffer = torch.randn(100, 16, 6), [], torch.empty(3, 16, 6)

    def encode(numbers):
        assert len(numbers) <= 3 and not torch.is_grad_enabled()
        encoded.extend(numbers.tolist())
        buffer[: len(numbers)] = x[numbers]
        return buffer[: len(numbers)]

    stream, expected = memory_stream(encode=encode), memory_stream()
    for numbers in torch.arange(100).split([1, 2, 30, 7, 60]):
        stream.push(numbers.numpy())
        expected.push(x[numbers])
        assert torch.equal(stream.tokens(), expected.tokens())
    assert encoded == list(range(100))


def test_a_push_that_fails_leaves_the_stream_as_it_was():
    x, calls = torch.randn(60, 16, 6), []

    def encode(frames):
        calls.append(len(frames))
        if len(calls) == 12:  # in the midst of the second push
            raise RuntimeError("out of memory")
        return frames

    stream, expected = memory_stream(encode=encode), memory_stream()
    stream.push(x[:30])
    before = stream.tokens()
    with pytest.raises(RuntimeError, match="out of memory"):
        stream.push(x[30:])
    assert torch.equal(stream.tokens(), before) and stream.seen == 30
    stream.push(x[30:])
    expected.push(x)
    assert torch.equal(stream.tokens(), expected.tokens()) and frames_of(stream.clips) == frames_of(expected.clips)


def test_a_stream_begun_in_inference_mode_goes_on_outside_it():
    x = torch.randn(60, 16, 6)
    stream, expected = memory_stream(), memory_stream()
    with torch.inference_mode():
        stream.push(x[:30] * 1)
    stream.push((x[30:] * 1).requires_grad_())
    expected.push(x)
    tokens = stream.tokens(question=torch.ones(6, requires_grad=True))
    assert torch.equal(tokens, expected.tokens(question=torch.ones(6))) and not tokens.requires_grad


@pytest.mark.parametrize(
    "frames, says",
    [
        (torch.randn(0, 16, 6), "push one frame or more"),
        (3, "without a length"),
        (torch.randn(16, 6), "frames, patches, channels"),
        (torch.randn(2, 16, 5), "open another stream"),
        (torch.randn(2, 16, 6).half(), "open another stream"),
        (np.zeros((2, 16, 6)), "torch.Tensor, not ndarray"),
    ],
)
def test_frames_of_another_kind_are_told(frames, says):
    stream = memory_stream()
    stream.push(torch.randn(20, 16, 6))
    before = stream.tokens()
    with pytest.raises(InputError, match=says) as error:
        stream.push(frames)
    assert "\n" not in str(error.value) and torch.equal(stream.tokens(), before)


@pytest.mark.parametrize(
    "how, says",
    [
        (dict(scores=[1, 2]), "scores must be 6 numbers"),
        (dict(scores=torch.zeros(6, 1)), "scores must be 6 numbers"),
        (dict(scores=np.zeros(6) + 1j), "scores must be 6 numbers"),
        (dict(scores=[*np.zeros(6, np.complex64)]), "scores must be 6 numbers"),
        (dict(scores=torch.zeros(6) + 1j), "scores must be 6 numbers"),
        (dict(scores=[0, 0, 0, 0, 0, torch.nan]), "none of them NaN"),
        (dict(question=torch.ones(5)), r"must be \[6\], not \[5\]"),
        (dict(question=torch.ones(1, 6)), r"must be \[6\], not \[1, 6\]"),
        (dict(scores=[0] * 6, question=torch.ones(6)), "pass one of them"),
        (dict(out=torch.empty(3, 6)), "out must be"),
        (dict(out=torch.empty(52, 6).half()), "out must be torch.float32"),
    ],
)
def test_what_cannot_be_shown_is_told(how, says):
    stream = memory_stream()
    stream.push(torch.randn(60, 16, 6))
    with pytest.raises(InputError, match=says):
        stream.tokens(**how)


def test_before_the_first_frame():
    stream = memory_stream()
    assert (stream.clips, list(stream.frames), stream.seen, stream.nbytes, stream.select()) == ((), [], 0, 0, ())
    for use in (stream.tokens, stream.count_tokens, lambda: stream.plan, lambda: stream.select(question=torch.ones(6))):
        with pytest.raises(InputError, match="no frames yet"):
            use()


def test_before_the_first_clip():
    x = torch.randn(5, 16, 6)
    stream = memory_stream()
    stream.push(x)
    for how in ({}, dict(scores=[]), dict(question=torch.ones(6))):
        assert torch.equal(stream.tokens(**how), slowfast_aggregate(x, RECENT))


def test_nothing_is_kept_of_frames_that_a_layout_does_not_fit():
    stream = MemoryStream(RECENT, "clip:adaptive1,stride8,stride8,mean")
    with pytest.raises(LayoutError, match="clip pooling .* leaves no token of a 4x4 grid"):
        stream.push(torch.randn(1, 16, 6))
    assert stream.seen == 0


@pytest.mark.parametrize("layout", ["ig_vlm", "videollm_online", "llava_next_video-newline_one"])
def test_layouts_of_more_than_patches_are_told(layout):
    for layouts in ((layout, CLIP), (RECENT, layout)):
        with pytest.raises(LayoutError, match=f"{layout} needs"):
            MemoryStream(*layouts)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(recent_frames=0), "recent_frames must be an integer of at least 1"),
        (dict(clip_frames=2.5), "clip_frames must be"),
        (dict(held_clips="6"), "held_clips must be"),
        (dict(shown_clips=-1), "shown_clips must be"),
        (dict(recent_frames=2), "less than clip_frames=3.*keep 3 or more"),
        (dict(shown_clips=7), "only 6 clips are held: show at most 6, not 7"),
    ],
)
def test_settings_that_contradict_are_told(settings, says):
    with pytest.raises(InputError, match=says):
        memory_stream(**settings)


def test_the_defaults_fit_where_the_published_layout_fits():
    stream = MemoryStream()
    frame = torch.empty(1, 576, 1).expand(16 + 64 * 8, -1, -1)
    stream.push(frame)
    assert stream.count_tokens() == 2560 + 1024 <= 3680

"""Videos that are damaged: what ffmpeg can decode is used, whatever is asked, and what is missing is told once."""

from __future__ import annotations

import importlib
import sys
import threading
from fractions import Fraction
from types import ModuleType

import clips
import numpy as np
import pytest

from sfllava_fast import sample_frames
from sfllava_fast.video import open_live, open_video

av = pytest.importorskip("av")
WRONG_LENGTH = b"\x7f\xff\xff\xff"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


def spoil(source, path, *numbers):
    """A copy in which the first NAL unit of these packets claims more bytes than there are."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [packet.pos for packet in container.demux(video=0) if packet.size]
    for number in numbers:
        data[packets[number] : packets[number] + 4] = WRONG_LENGTH
    path.write_bytes(data)
    return path


@pytest.fixture
def spoilt(folder, tmp_path):
    """Key frames at 0, 25 and 50; the packets named are bad."""
    return lambda *numbers: spoil(clips.make(folder, "plain.mp4"), tmp_path / "bad.mp4", *numbers)


def near(got, frames):
    return np.abs(got.astype(int) - frames).mean() < 2


@pytest.mark.parametrize("bad", [(0,), (12,), (25,), (10, 20, 30), (59,), (40, 59)], ids=str)
def test_what_ffmpeg_decodes_is_used_whatever_is_asked(bad, spoilt, folder, caplog):
    path = spoilt(*bad)
    truth, whole = clips.truth(path), clips.truth(clips.make(folder, "plain.mp4"))
    assert 0 < len(truth) < len(whole)
    for count in (1, 4, 5, 16, 60):
        caplog.clear()
        video = open_video(path)
        numbers = sample_frames(video.total, count)
        frames = video.arrays(numbers)
        assert len(frames) == min(count, video.total)
        # Each is one of ffmpeg's frames, and they go on in its order.
        found = [
            int(np.abs(truth[:, ::2, ::2].astype(int) - f[::2, ::2]).mean(axis=(1, 2, 3)).argmin()) for f in frames
        ]
        assert found == sorted(found) and all(near(frame, truth[at]) for frame, at in zip(frames, found))
        assert caplog.messages == ([f"{path} is damaged: {video.damage}"] if video.damage else [])
    assert video.damage and str(len(truth)) in video.damage
    if bad != (0,):  # each number keeps its moment
        assert video.total == len(whole)


def test_frames_before_the_first_that_decodes_do_not_exist(spoilt, folder, caplog):
    video, whole = open_video(spoilt(0)), clips.truth(clips.make(folder, "plain.mp4"))
    assert video.total == 35 and near(video.arrays(range(35)), whole[25:])
    assert caplog.messages == [f"{video.path} is damaged: 1 of its packets cannot be decoded, 35 frames can"]


def test_a_missing_frame_is_the_next_one_or_the_last(spoilt, folder):
    path = spoilt(12, 59)
    with av.open(str(clips.make(folder, "plain.mp4"))) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    lost = sorted(sorted(stamps).index(stamps[number]) for number in (12, 59))  # by number, not as they are in the file
    kept = [number for number in range(60) if number not in lost]
    truth = clips.truth(path)
    assert len(truth) == len(kept)
    for number, frame in enumerate(open_video(path).arrays(range(60))):
        expected = min((at for at, one in enumerate(kept) if one >= number), default=len(kept) - 1)
        assert near(frame, truth[expected])


def test_frames_of_other_threads_are_not_lost(folder, tmp_path):
    whole = clips.make(folder, "plain.mp4")
    raw = tmp_path / "raw.h264"
    clips.ffmpeg("-i", whole, "-c", "copy", raw)
    data = bytearray(raw.read_bytes())
    start = [i for i in range(len(data) - 4) if data[i : i + 4] == b"\0\0\0\1"][-3]
    data[start + 5 : start + 9] = b"\0\0\2\xff"  # no slice header
    raw.write_bytes(data)
    truth = clips.truth(raw)
    video = open_video(raw)
    assert video.total == len(truth) and near(video.arrays(range(video.total)), truth)
    with open_live(raw, 25) as live:
        assert len(list(live.arrays())) == len(truth)


@pytest.mark.parametrize("size", [200_000, 1_000_000])
def test_a_transport_stream_goes_on_behind_a_gap(size, folder, tmp_path, caplog):
    """FFmpeg says "again" for each 64 KiB without a packet."""
    data = clips.make(folder, "open_gop.ts").read_bytes()
    at = len(data) // 188 * 3 // 10 * 188
    path = tmp_path / "gap.ts"
    path.write_bytes(data[:at] + bytes(size) + data[at:])
    video = open_video(path)
    assert video.total == clips.FRAMES and near(video.arrays([50]), clips.truth(clips.make(folder, "open_gop.ts"))[50])
    with open_live(path, 25) as live:
        assert len(list(live.arrays())) == clips.FRAMES
    assert caplog.text == ""


def lose(data, first, count):
    """Without these packets of a transport stream."""
    return data[: first * 188] + data[(first + count) * 188 :]


@pytest.mark.parametrize("name", ["open_gop.ts", "hevc.ts", "mpeg2.ts", "intra_refresh.ts"])
def test_what_a_gap_lost_is_told_once(name, folder, tmp_path, caplog):
    data, path = clips.make(folder, name).read_bytes(), tmp_path / "lost.ts"
    path.write_bytes(lose(data, 100, 100))
    left = sum(packet.size > 0 for packet in av.open(str(path)).demux(video=0))
    video = open_video(path)
    frames = video.arrays(range(video.total))
    assert near(frames[:4], clips.truth(path)[:4])  # of those behind a gap, each FFmpeg gives others
    assert video.damage == f"about {(clips.FRAMES - left) / 25:.2f} s of it are missing"
    assert caplog.messages == [f"{path} is damaged: {video.damage}"]


@pytest.mark.parametrize("offset", [None, 0, 2.4, 1000])
@pytest.mark.parametrize("name", ["open_gop.ts", "hevc.ts", "mpeg2.ts", "variable_rate.mp4"])
def test_joined_files_and_rates_that_vary_have_no_gap(name, offset, folder, tmp_path, caplog):
    """The second file's clock: there is no second, as the first, where the first ends, far ahead."""
    plain, path = tmp_path / "plain.ts", tmp_path / "joined.ts"
    clips.ffmpeg("-i", clips.make(folder, name), "-c", "copy", plain)
    data = plain.read_bytes()
    if offset is not None:
        clips.ffmpeg("-i", plain, "-c", "copy", "-output_ts_offset", offset, path)
        data += path.read_bytes()
    path.write_bytes(data)
    assert open_video(path).damage is None and not caplog.messages


@pytest.mark.parametrize(
    ("steps", "corrupt", "seconds"),
    [
        ([1, 1, 1, 9, 1, 1], {3}, 8),
        ([1, 1, 1, 9, 1, 1], {2}, 8),
        ([1, 1, 1, 9, 1, 1], {0, 6}, 0),
        ([1, 1, 1, 9, 1, 1], set(), 0),
        ([1, 1, 1, 301, 1, 1], {3}, 0),
        ([1, 1, 1, -9, 1, 1], {3}, 0),
        ([2, 2, 2, 2, 4, 2, 6], {4, 6}, 6),
        ([1, 1, 1], {0, 1, 2, 3}, 0),
        ([], {0}, 0),
    ],
)
def test_seconds_that_gaps_lost(steps, corrupt, seconds):
    from sfllava_fast.video.pyav import _lost

    stamps = np.cumsum([5, *steps]).tolist()
    packets = [(stamp * 30, number in corrupt) for number, stamp in enumerate(stamps)]
    assert _lost(packets, Fraction(1, 30)) == seconds
    assert _lost([(None, True), *packets, (None, True)], Fraction(1, 30)) == seconds
    assert _lost([(None, True)], Fraction(1, 30)) == 0


def test_a_stream_that_is_never_anything_but_gaps_ends(folder, monkeypatch):
    from sfllava_fast.video import container

    class Gaps:
        asked = 0

        def demux(self, stream):
            self.asked += 1
            raise BlockingIOError(11, "again")
            yield

    monkeypatch.setattr(container, "_GAPS", 20)
    gaps = Gaps()
    with pytest.raises(BlockingIOError):
        list(container.demux(gaps, None))
    assert gaps.asked == 21


def test_damage_of_a_video_that_vllm_is_sent_is_logged_once(spoilt, monkeypatch, caplog):
    """With a stand-in for the one class of vLLM's that the loader knows."""
    pytest.importorskip("torch")
    stand_in = ModuleType("vllm.multimodal.video")
    stand_in.VideoLoader = object
    for name in ("vllm", "vllm.multimodal"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.delitem(sys.modules, "sfllava_fast.serving.vllm_video", raising=False)
    loader = importlib.import_module("sfllava_fast.serving.vllm_video").SlowFastVideoLoader
    monkeypatch.delitem(sys.modules, "sfllava_fast.serving.vllm_video")
    for bad, told in (((12,), "59 of its 60 frames can be decoded"), ((0,), "35 frames can"), ((), None)):
        caplog.clear()
        frames, _ = loader.load_bytes(spoilt(*bad).read_bytes(), num_frames=60)
        assert len(frames) in (35, 60)
        assert len(caplog.messages) == bool(told)
        assert all(told in message and "vllm-request" in message for message in caplog.messages)


def test_a_read_that_is_stopped_while_it_counts_changes_nothing(spoilt):
    path = spoilt(12)
    video, stop, whole = open_video(path), threading.Event(), open_video(path).arrays(range(60))
    plain = video.decode_all
    video.decode_all = lambda tally: (stop.set(), plain(tally))[1]
    assert len(list(video.stream_arrays(range(60), stop))) < 60
    del video.decode_all
    assert np.array_equal(video.arrays(range(60)), whole)

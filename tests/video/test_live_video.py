"""Live video from files, pipes, servers and a stand-in device: which frames come, when, and what is survived."""

from __future__ import annotations

import contextlib
import functools
import http.server
import math
import os
import re
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import clips
import numpy as np
import pytest

from sfllava_fast.errors import BackendError, InputError, VideoError
from sfllava_fast.video import live as live_video
from sfllava_fast.video import open_live

av = pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("deadline")

H264 = (*clips.H264, "-bf", "0")
FRAGMENTED = ("-movflags", "frag_keyframe+empty_moov+default_base_moof")
PIPED = {
    "matroska": ("clip.mkv", (*H264, "-live", "1")),
    "mpegts": ("clip.ts", H264),
    "fragmented mp4": ("clip.mp4", (*H264, *FRAGMENTED)),
    "y4m": ("clip.y4m", ("-pix_fmt", "yuv420p")),
    "h264": ("clip.h264", H264),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture
def clip(folder):
    """A container's clip of 60 frames at 25 a second, encoded on first use."""

    def make(container):
        name, arguments = PIPED[container]
        if not (folder / name).exists():
            clips.ffmpeg(*clips.SOURCE, *arguments, "-threads", "1", folder / name)
        return folder / name

    return make


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "sfllava-live"]
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def writer(tmp_path):
    """A named pipe, and what its writer does as a list of bytes to write and functions to call in between."""
    threads = []

    def make(*steps):
        path = tmp_path / f"pipe{len(threads)}"
        os.mkfifo(path)

        def write():
            with contextlib.suppress(BrokenPipeError), path.open("wb", buffering=0) as file:
                for step in steps:
                    step() if callable(step) else file.write(step)

        threads.append(threading.Thread(target=write, daemon=True))
        threads[-1].start()
        return path

    yield make
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@functools.cache
def true_frames(path, size=(clips.HEIGHT, clips.WIDTH)):
    return clips.truth(path, size)


def due(times, rate):
    """The numbers of the frames to sample, by the words of the rule: each moment's first frame at or after it."""
    wanted, moment = [], Fraction(0)
    while moment <= times[-1]:
        wanted.append(next(number for number, shown in enumerate(times) if shown >= moment))
        moment += 1 / Fraction(str(rate))
    return sorted(set(wanted))


def assert_frames(got, numbers, truth, times=None):
    """Each frame next to equal to ffmpeg's frame of its number and nearest to it, at the seconds it is shown."""
    times = [Fraction(number, 25) for number in range(len(truth))] if times is None else times
    assert [seconds for seconds, _ in got] == pytest.approx([float(times[n]) for n in numbers], abs=1e-3)
    for (_, frame), number in zip(got, numbers):
        distance = np.abs(truth[:, ::2, ::2].astype(np.int16) - frame[::2, ::2]).mean(axis=(1, 2, 3))
        assert distance.argmin() == number and distance[number] < 2


# --- which frames


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        *(("plain.mp4", rate) for rate in (0.1, 0.7, 2, 10, 25, 100)),
        *((name, 7.5) for name in ("open_gop.mkv", "hevc.ts", "edit_list.mp4", "vp9.webm")),
    ],
)
def test_the_first_frame_at_or_after_each_moment(name, rate, folder, caplog):
    path = clips.make(folder, name)
    truth = true_frames(path)
    times = [Fraction(number, 25) for number in range(len(truth))]
    with open_live(path, rate) as live:
        got = list(live.arrays())
    assert not live.live and live.dropped == live.damaged == 0 and caplog.text == ""
    assert_frames(got, due(times, rate), truth)


def test_frames_missing_in_the_source_are_served_by_the_next(folder):
    path = folder / "gaps.mkv"
    gaps = "select='lt(n,7)+between(n,20,22)+gt(n,50)'"
    clips.ffmpeg(*clips.SOURCE, "-vf", gaps, "-fps_mode", "vfr", *H264, path)
    times = [Fraction(n, 25) for n in (*range(7), 20, 21, 22, *range(51, 60))]
    numbers = due(times, 5)
    assert [float(times[n]) for n in numbers] == [0, 0.2, 0.8, 2.04, 2.2]
    with open_live(path, 5) as live:
        assert_frames(list(live.arrays()), numbers, true_frames(path), times)


def test_frames_are_turned_upright(folder):
    path = clips.make(folder, "rotated.mp4")
    truth = true_frames(path, (clips.WIDTH, clips.HEIGHT))
    with open_live(path, 5) as live:
        assert_frames(list(live.arrays()), range(0, 60, 5), truth)


def test_frames_without_time_stamps_count_by_the_average_rate(clip, caplog):
    path = clip("h264")
    with open_live(path, 5) as live:
        assert_frames(list(live.arrays()), range(0, 60, 5), true_frames(path))
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} has frames without time stamps: they count as 25 per second"
    ]


def test_a_stream_may_change_its_size(folder, tmp_path):
    small, large = folder / "small.ts", folder / "large.ts"
    clips.ffmpeg(*clips.SOURCE, *H264, "-t", "1.2", small)
    clips.ffmpeg(*clips.SOURCE, "-vf", "scale=160:120", *H264, "-t", "1.2", large)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    with open_live(both, 25) as live:
        shapes = [tuple(frame.shape) for _, frame in live.arrays()]
    assert shapes == [(96, 128, 3)] * 30 + [(120, 160, 3)] * 30


# --- time stamps that cannot be believed


@pytest.mark.parametrize("offset", [0, 5000])
def test_a_clock_that_is_set_does_not_move_the_stream(offset, clip, folder, tmp_path, caplog):
    other = folder / f"offset{offset}.ts"
    clips.ffmpeg("-i", clip("mpegts"), "-c", "copy", "-output_ts_offset", offset, other)
    path = tmp_path / "set.ts"
    path.write_bytes(clip("mpegts").read_bytes() + other.read_bytes())
    truth = true_frames(clip("mpegts"))
    with caplog.at_level("INFO"), open_live(path, 25) as live:
        got = list(live.arrays())
    # The last frame before a break of the clock is 1/25 s long too.
    assert [seconds for seconds, _ in got] == pytest.approx([n / 25 for n in range(120)], abs=1e-3)
    for part in (got[:60], [(seconds - 2.4, frame) for seconds, frame in got[60:]]):
        assert_frames(part, range(60), truth)
    jumps = [r.getMessage() for r in caplog.records]
    assert len(jumps) == 1 and "its clock jumps by" in jumps[0] and f"by {'-' if offset == 0 else '499'}" in jumps[0]


def ticks(*stamps):
    clock = live_video._Clock(SimpleNamespace(time_base=Fraction(1, 10), average_rate=Fraction(5)), "x")
    return [float(clock.tick(stamp)) for stamp in stamps], clock.jumps


@pytest.mark.parametrize(
    ("stamps", "seconds", "jumps"),
    [
        ((70, 72, 74), [0, 0.2, 0.4], 0),
        ((70, 3069), [0, 299.9], 0),  # a gap
        ((70, 3071, 3073), [0, 0.2, 0.4], 1),  # a clock that was set ahead, by five minutes
        ((70, 90, 85, 92), [0, 2, 2, 2.2], 0),  # frames whose stamps are those of others
        ((70, 90, 79, 81), [0, 2, 2.2, 2.4], 1),  # back by more than a second
        ((None, None, 70, 72), [0, 0.2, 0.4, 0.6], 0),
        ((70, None, 74, None), [0, 0.2, 0.4, 0.6], 0),
    ],
)
def test_seconds_of_time_stamps(stamps, seconds, jumps):
    assert ticks(*stamps) == (pytest.approx(seconds), jumps)


# --- pipes


@pytest.mark.parametrize("container", PIPED)
def test_a_pipe_gives_what_the_file_gives(container, clip, writer):
    path = clip(container)
    with open_live(writer(path.read_bytes()), 5) as live:
        assert_frames(list(live.arrays()), range(0, 60, 5), true_frames(path))
    assert not live.live and live.dropped == live.damaged == 0


@pytest.fixture
def stdin(monkeypatch):
    """Puts a file object in the place of standard input."""
    with contextlib.ExitStack() as files:
        yield lambda file: monkeypatch.setattr(sys, "stdin", files.enter_context(file))


def test_standard_input(clip, stdin):
    reader, end = os.pipe()
    path = clip("matroska")
    data = path.read_bytes()
    thread = threading.Thread(target=lambda: (os.write(end, data), os.close(end)))
    thread.start()
    stdin(os.fdopen(reader))
    with open_live("-", 5) as live:
        assert_frames(list(live.arrays()), range(0, 60, 5), true_frames(path))
    thread.join()


def test_standard_input_from_a_file_may_be_any_container(folder, stdin):
    path = clips.make(folder, "plain.mp4")  # its index stands at its end
    stdin(path.open())
    with open_live("-", 5) as live:
        assert_frames(list(live.arrays()), range(0, 60, 5), true_frames(path))


@pytest.mark.parametrize("container", PIPED)
def test_frames_come_while_the_writer_stalls(container, clip, writer, caplog, monkeypatch):
    monkeypatch.setattr(live_video, "_STALL", 0.05)
    data, more = clip(container).read_bytes(), threading.Event()
    half = data[: len(data) // 2], data[len(data) // 2 :]
    with open_live(writer(half[0], more.wait, half[1]), 25) as live:
        before = []
        with pytest.raises(TimeoutError, match=r"pipe0: no frame for 0\.3 s"):
            while True:
                before.append(live.next_array(timeout=0.3))
        with pytest.raises(TimeoutError):
            live.next_array(timeout=0.1)
        stalls = [r.getMessage() for r in caplog.records if "no frame" in r.getMessage()]
        assert stalls == [f"{live.name}: no frame for 0.05 s, still waiting"]
        more.set()
        after = list(live.arrays())
    # A decoder holds a few frames back, and a demuxer the packet that may not be whole.
    assert 20 < len(before) < 50
    assert_frames(before + after, range(60), true_frames(clip(container)))


def test_a_slow_stream_is_not_held_back_to_learn_its_rate(folder, writer):
    path = folder / "slow.mkv"
    clips.ffmpeg("-f", "lavfi", "-i", "testsrc2=size=128x96:rate=1:duration=20", *H264, "-live", "1", path)
    data, more = path.read_bytes(), threading.Event()
    with open_live(writer(data[: len(data) // 4], more.wait, data[len(data) // 4 :]), 1) as live:
        first = [live.next_array(timeout=10)[0] for _ in range(2)]
        more.set()
        assert first + [seconds for seconds, _ in live.arrays()] == list(range(20))


def test_a_stall_is_told_once_and_waited_out(clip, writer, caplog, monkeypatch):
    monkeypatch.setattr(live_video, "_STALL", 0.05)
    data = clip("mpegts").read_bytes()
    with open_live(writer(data[:9400], lambda: time.sleep(0.5), data[9400:]), 25) as live:
        assert len(list(live.arrays())) == 60
    assert ["no frame for" in r.getMessage() for r in caplog.records].count(True) == 1


@pytest.mark.parametrize("sent", [0, 9400])
def test_closing_ends_a_thread_that_waits_for_bytes(sent, clip, writer):
    more = threading.Event()
    path = writer(clip("mpegts").read_bytes()[:sent], more.wait)
    if sent:
        with open_live(path, 2) as live:
            assert live.next_array()[0] == 0
            thread = live._thread
            assert thread.is_alive()
    else:
        live = live_video.LiveVideo(av, live_video._Source(str(path)), Fraction(2))
        thread = live._thread
        assert thread.is_alive()
        live.close()
    assert not thread.is_alive()
    more.set()


def test_closing_ends_a_thread_that_waits_for_room(folder):
    with open_live(clips.make(folder, "plain.mp4"), 25) as live:
        until(lambda: len(live._ready) == 8)
    assert not live._thread.is_alive()
    assert live.next_array() is None


def test_a_pipe_without_a_writer_can_be_left(tmp_path, monkeypatch):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    interrupted = []

    def wait(self, ready, timeout):
        interrupted.append(self._thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(live_video.LiveVideo, "_wait", wait)
    with pytest.raises(KeyboardInterrupt):
        open_live(path)
    assert not interrupted[0].is_alive()


def test_a_file_waits_for_the_consumer(folder):
    path = clips.make(folder, "plain.mp4")
    with open_live(path, 25) as live:
        until(lambda: len(live._ready) == 8)
        time.sleep(0.2)
        assert len(live._ready) == 8
        assert_frames(list(live.arrays()), range(60), true_frames(path))
    assert live.dropped == 0


@pytest.mark.parametrize(("room", "waiting"), [(1, 1), (3, 3), (3.9, 3), (8, 8), (100, 8)])
def test_frames_that_wait_are_bounded_in_bytes(room, waiting, folder, camera, monkeypatch):
    """Of a file, which waits then, and of a device, which drops the oldest."""
    frame = clips.HEIGHT * clips.WIDTH * 3
    monkeypatch.setattr(live_video, "_AHEAD_BYTES", int(room * frame))
    with open_live(camera.path, 25) as live:
        live._thread.join(20)
        assert len(live._ready) == waiting and live.dropped == clips.FRAMES - waiting
    monkeypatch.undo()
    monkeypatch.setattr(live_video, "_AHEAD_BYTES", int(room * frame))
    with open_live(clips.make(folder, "plain.mp4"), 25) as live:
        until(lambda: len(live._ready) == waiting)
        time.sleep(0.1)
        assert len(live._ready) == waiting
        assert len(list(live.arrays())) == clips.FRAMES and live.dropped == 0


def test_a_frame_larger_than_what_may_wait_is_taken(folder, monkeypatch):
    monkeypatch.setattr(live_video, "_AHEAD_BYTES", 1)
    with open_live(clips.make(folder, "plain.mp4"), 25) as live:
        assert len(list(live.arrays())) == clips.FRAMES


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- damage


def test_a_stream_that_starts_within_a_group_begins_at_the_first_whole_frame(clip, writer):
    data = clip("mpegts").read_bytes()
    truth = true_frames(clip("mpegts"))
    with open_live(writer(data[188 * 20 :]), 25) as live:
        got = list(live.arrays())
    assert_frames([(seconds + 1, frame) for seconds, frame in got], range(25, 60), truth)


@pytest.mark.parametrize("container", ["matroska", "mpegts"])
def test_damage_is_stepped_over_and_counted(container, clip, writer, caplog):
    data = bytearray(clip(container).read_bytes())
    if container == "mpegts":
        del data[188 * 60 : 188 * 63]
    else:
        at = len(data) // 2
        data[at : at + 2000] = bytes(2000)
    with open_live(writer(bytes(data)), 25) as live:
        got = list(live.arrays())
    assert live.damaged and 30 < len(got) < 60
    assert f"{live.name} is damaged: {live.damaged} packets or frames could not be decoded" in caplog.text
    # A group of frames that was not touched is as it was.
    last = [(seconds, frame) for seconds, frame in got if seconds >= 2]
    assert_frames(last, range(60 - len(last), 60), true_frames(clip(container)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fast_start.mp4", r"ends at \d\.\d of 2\.4 s: it may be cut short"),
        ("vp9.webm", r"ends at \d\.\d of 2\.4 s: it may be cut short"),
        ("mpeg2.ts", None),  # does not say how long it is
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_what_is_cut_short_ends_with_what_there_was(name, told, piped, folder, writer, tmp_path, caplog):
    whole = clips.make(folder, name)
    data = whole.read_bytes()
    data = data[: len(data) // 2]
    (tmp_path / name).write_bytes(data)
    with open_live(writer(data) if piped else tmp_path / name, 25) as live:
        got = list(live.arrays())
        assert live.next_array() is None
    assert 10 < len(got) < 50
    assert_frames(got[:-1], range(len(got) - 1), true_frames(whole))
    assert told is None or re.search(told, caplog.text)


def test_a_source_that_is_closed_gives_no_warning(folder, caplog):
    with open_live(clips.make(folder, "plain.mp4"), 25) as live:
        live.next_array()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: its writer wrote nothing"),
        (b"no video\n" * 500, "is not a readable video: .*; a pipe may carry Matroska"),
        ("sound", "has only sound"),
        ("plain.mp4", "none of its frames can be decoded: Invalid data .*; a pipe may carry .* fragmented MP4"),
    ],
)
def test_a_pipe_without_video_is_one_line(content, message, folder, writer):
    if content == "sound":
        content = clips.ffmpeg("-f", "lavfi", "-i", "sine=duration=0.3", "-f", "matroska", "-")
    elif isinstance(content, str):
        content = clips.make(folder, content).read_bytes()
    one_line(message, writer(content))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "clip.mp4 does not exist"),
        ("empty", "clip.mp4 is empty"),
        ("text", "clip.mp4 is not a readable video"),
        ("folder", "clip.mp4 is a folder"),
        ("headers", "none of its frames can be decoded"),
    ],
)
def test_a_file_without_video_is_one_line(kind, message, folder, tmp_path):
    path = tmp_path / "clip.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        data = clips.make(folder, "fast_start.mp4").read_bytes()
        contents = {"empty": b"", "text": b"no video\n", "headers": data[: data.index(b"mdat") + 100]}
        path.write_bytes(contents[kind])
    one_line(message, path)


def one_line(message, source):
    with pytest.raises(VideoError, match=message) as caught, open_live(source) as live:
        list(live.arrays())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["closed", "terminal"])
def test_standard_input_without_a_pipe_is_one_line(kind, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None if kind == "closed" else SimpleNamespace(isatty=lambda: True))
    one_line("no video on standard input", "-")


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan, "2", None])
def test_rates_that_are_none(rate, folder):
    with pytest.raises(InputError, match="rate must be a number of frames per second above 0, not"):
        open_live(clips.make(folder, "plain.mp4"), rate)


def test_pyav_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendError, match=r"pip install av"):
        open_live("clip.mp4")


def test_a_bug_in_the_thread_reaches_the_consumer(folder, monkeypatch):
    monkeypatch.setattr(live_video, "orientation", lambda *frame: 1 / 0)
    # At once or with the first frame: the thread may come upon it before the consumer waits.
    with pytest.raises(ZeroDivisionError), open_live(clips.make(folder, "plain.mp4")) as live:
        live.next_array()


# --- devices and URLs


@pytest.fixture
def camera(monkeypatch):
    """What opens as a video device: /dev/zero, with frames drawn by lavfi."""
    whole, asked = av.open, []

    def open_instead(file, **options):
        asked.append((file, options["format"]))
        return whole("testsrc2=size=128x96:rate=25:duration=2.4", **options | {"format": "lavfi", "options": {}})

    monkeypatch.setattr(av, "open", open_instead)
    return SimpleNamespace(path="/dev/zero", asked=asked)


def test_a_device_drops_the_oldest_frames(camera, caplog):
    with open_live(camera.path, 25) as live:
        live._thread.join(20)
        got = list(live.arrays())
    assert camera.asked == [("/dev/zero", "v4l2")]
    assert live.live and live.dropped == 52
    assert [seconds for seconds, _ in got] == pytest.approx([n / 25 for n in range(52, 60)])
    assert caplog.messages == ["/dev/zero: 52 frames were dropped: they arrived faster than they were read"]


def test_a_device_whose_frames_are_taken_drops_none(camera, folder):
    with open_live(camera.path, 2) as live:
        assert len(list(live.arrays())) == 5
    assert live.dropped == 0


@pytest.fixture
def serve():
    """A URL at which a server sends what the steps say, with or without telling its length."""
    servers = []

    def make(*steps, length=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                with contextlib.suppress(OSError):
                    for step in steps:
                        step() if callable(step) else self.wfile.write(step)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/stream"

    yield make
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_live_url_drops_what_nobody_takes(clip, serve):
    data = clip("mpegts").read_bytes()
    with open_live(serve(data), 25) as live:
        live._thread.join(20)
        got = list(live.arrays())
    assert live.live and live.dropped == 52
    assert_frames(got, range(52, 60), true_frames(clip("mpegts")))


def test_a_url_that_says_its_length_waits(folder, serve):
    path = clips.make(folder, "fast_start.mp4")
    data = path.read_bytes()
    with open_live(serve(data, length=len(data)), 25) as live:
        until(lambda: len(live._ready) == 8)
        assert_frames(list(live.arrays()), range(60), true_frames(path))
    assert not live.live and live.dropped == 0


def test_a_url_that_goes_silent_ends(clip, serve, caplog, monkeypatch):
    monkeypatch.setattr(live_video, "_URL_TIMEOUTS", (20.0, 0.3))
    more = threading.Event()
    with open_live(serve(clip("mpegts").read_bytes()[:9400], more.wait), 2) as live:
        assert list(live.arrays())
    more.set()
    assert f"{live.name} broke off: no data for 0.3 s" in caplog.text


def test_a_list_behind_a_url_is_refused(clip, serve):
    files = serve(clip("mpegts").read_bytes())
    data = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{files}\n#EXT-X-ENDLIST\n".encode()
    one_line("is in no format of videos or images that is read here", serve(data, length=len(data)) + ".m3u8")


def test_a_password_in_a_url_is_not_repeated(caplog):
    with pytest.raises(VideoError, match=r"\Ahttp://127\.0\.0\.1:9/x is not") as caught:
        open_live("http://user:secret@127.0.0.1:9/x")
    assert "secret" not in str(caught.value) + caplog.text


def test_a_url_that_cannot_be_opened_is_one_line():
    one_line("http://127.0.0.1:9/x is not a readable video: Connection refused", "http://127.0.0.1:9/x")

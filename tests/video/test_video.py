"""Each decoder against ffmpeg's own frames, and one line for everything that is not a video."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import clips
import numpy as np
import pytest

from sfllava_fast import sample_frames
from sfllava_fast.errors import BackendError, InputError, RenumberedError, VideoError
from sfllava_fast.video import as_frames, base, open_live, open_video, pyav

EVERY_CLIP = [*clips.ENCODED, *clips.COPIED]
DECORD_CLIPS = ["plain.mp4", "fast_start.mp4", "variable_rate.mp4", "vp9.webm"]
ASKS = {
    "all": lambda n: list(range(n)),
    "one": lambda n: [n - 1],
    "sampled": lambda n: sample_frames(n, 7),
    "backwards, twice": lambda n: [n - 1, 0, n // 2, 3, 3, n - 2],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="session")
def true_frames(folder):
    cache = {}

    def frames(name):
        if name not in cache:
            size = (clips.WIDTH, clips.HEIGHT) if name == "rotated.mp4" else (clips.HEIGHT, clips.WIDTH)
            cache[name] = clips.truth(clips.make(folder, name), size)
        return cache[name]

    return frames


def assert_same_frames(got: np.ndarray, indices: list[int], truth: np.ndarray) -> None:
    """Every frame is nearest to ffmpeg's frame of its number, and next to equal to it."""
    assert got.dtype == np.uint8 and got.shape == (len(indices), *truth.shape[1:])
    truth = truth.astype(np.int16)
    for frame, index in zip(got, indices):
        distance = np.abs(truth - frame).mean(axis=(1, 2, 3))
        assert distance.argmin() == index
        assert distance[index] < 2, f"frame {index} differs by {distance[index]} on average"


@pytest.mark.parametrize("name", EVERY_CLIP)
def test_pyav_gives_the_frames_of_ffmpeg(name, folder, true_frames):
    pytest.importorskip("av")
    truth = true_frames(name)
    video = open_video(clips.make(folder, name))
    assert video.total == len(truth)
    assert (video.decoder, video.size) == ("pyav", truth.shape[1:3])
    for ask in ASKS.values():
        indices = ask(video.total)
        assert_same_frames(video.arrays(indices), indices, truth)


def assert_streams(video, truth: np.ndarray) -> None:
    """Each frame once, in the order shown, and good for as long as it is held."""
    for ask in ASKS.values():
        numbers, frames = zip(*video.stream_arrays(ask(video.total)))
        assert list(numbers) == sorted(set(ask(video.total)))
        assert_same_frames(np.stack(frames), numbers, truth)
        assert np.array_equal(np.stack(frames), video.arrays(numbers))


@pytest.mark.parametrize("name", EVERY_CLIP)
def test_pyav_streams_the_frames_of_ffmpeg(name, folder, true_frames):
    pytest.importorskip("av")
    assert_streams(open_video(clips.make(folder, name)), true_frames(name))


@pytest.mark.parametrize("name", DECORD_CLIPS)
def test_decord_streams_the_frames_of_ffmpeg(name, folder, true_frames):
    pytest.importorskip("decord")
    assert_streams(open_video(clips.make(folder, name), "decord"), true_frames(name))


@pytest.fixture
def closed(monkeypatch):
    """Paths of the containers that were closed."""
    seen, whole = [], pyav.open_stream

    @contextmanager
    def count(av, path, *threads):
        try:
            with whole(av, path, *threads) as opened:
                yield opened
        finally:
            seen.append(path)

    monkeypatch.setattr(pyav, "open_stream", count)
    return seen


@pytest.mark.parametrize("name", ["plain.mp4", "raw.h264"])
def test_closing_a_stream_early_frees_the_decoder(name, folder, closed):
    frames = open_video(clips.make(folder, name)).stream_arrays(range(50))
    closed.clear()
    assert [next(frames)[0], next(frames)[0]] == [0, 1] and not closed
    frames.close()
    assert len(closed) == 1


@pytest.mark.parametrize("name", ["plain.mp4", "raw.h264"])
def test_a_stream_that_is_stopped_ends(name, folder, closed):
    stop = threading.Event()
    frames = open_video(clips.make(folder, name)).stream_arrays([0, 1, 50], stop)
    closed.clear()
    assert next(frames)[0] == 0
    stop.set()
    assert len(list(frames)) <= 1 and len(closed) == 1


def test_a_folder_stops_reading_ahead_when_its_stream_is_closed(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for value in range(30):
        Image.new("RGB", (6, 4), (value, 0, 0)).save(tmp_path / f"{value}.png")
    before = threading.enumerate()
    video = open_video(tmp_path)
    assert [frame[0, 0, 0].item() for _, frame in video.stream_arrays(range(30))] == list(range(30))
    frames = video.stream_arrays(range(30))
    next(frames)
    frames.close()
    assert threading.enumerate() == before


def misindexed(path, drop=()):
    """A video whose packets announce frame 30 at a time it has not, and leave out frames."""
    video = open_video(path)
    index = video._index
    index.pts[30] += 1
    for column in (index.pts, index.packet, index.start):
        for number in drop:
            del column[number]
    return video


def test_a_stream_goes_on_where_the_index_fails(folder, true_frames):
    numbers = [0, 10, 30, 50]
    video = misindexed(clips.make(folder, "plain.mp4"))
    got, frames = zip(*video.stream_arrays(numbers))
    assert list(got) == numbers and video._index is None
    assert_same_frames(np.stack(frames), numbers, true_frames("plain.mp4"))
    again = misindexed(clips.make(folder, "plain.mp4")).arrays(numbers)
    assert np.array_equal(np.stack(frames), again)


def test_a_stream_says_when_what_it_gave_has_other_numbers(folder, true_frames):
    numbers, given = [0, 10, 29, 50], []
    video = misindexed(clips.make(folder, "plain.mp4"), drop=[5])
    with pytest.raises(RenumberedError, match="read it again"):
        for number, _ in video.stream_arrays(numbers):
            given.append(number)
    assert given == [0, 10]
    got, frames = zip(*video.stream_arrays(numbers))
    assert list(got) == numbers
    assert_same_frames(np.stack(frames), numbers, true_frames("plain.mp4"))
    whole = misindexed(clips.make(folder, "plain.mp4"), drop=[5]).arrays(numbers)
    assert_same_frames(whole, numbers, true_frames("plain.mp4"))


@pytest.mark.parametrize("name", DECORD_CLIPS)
def test_decord_gives_the_frames_of_ffmpeg(name, folder, true_frames):
    pytest.importorskip("decord")
    truth = true_frames(name)
    video = open_video(clips.make(folder, name), decoder="decord")
    assert (video.total, video.decoder, video.size) == (len(truth), "decord", truth.shape[1:3])
    for ask in ASKS.values():
        indices = ask(video.total)
        assert_same_frames(video.arrays(indices), indices, truth)


def test_pyav_and_decord_agree_bit_for_bit(folder):
    pytest.importorskip("decord")
    path = clips.make(folder, "plain.mp4")
    indices = sample_frames(clips.FRAMES, 9)
    assert np.array_equal(open_video(path).arrays(indices), open_video(path, "decord").arrays(indices))


@pytest.mark.parametrize(
    ("name", "indexed"),
    [
        ("plain.mp4", True),
        ("open_gop.mp4", True),
        ("edit_list.mp4", True),
        ("raw.h264", False),
        ("h264.avi", False),
    ],
)
def test_only_clips_without_presentation_times_are_decoded_whole(name, indexed, folder):
    assert (open_video(clips.make(folder, name))._index is not None) == indexed


def test_decodes_only_the_groups_that_hold_a_wanted_frame(folder, monkeypatch):
    video = open_video(clips.make(folder, "plain.mp4"))  # key frames at 0, 25 and 50
    decoded = []
    whole = pyav.PyavVideo._decode_segments

    def count(self, *arguments):
        for start, frames in whole(self, *arguments):
            decoded.extend(frames := list(frames))
            yield start, frames

    monkeypatch.setattr(pyav.PyavVideo, "_decode_segments", count)
    video.arrays([25, 51])
    assert len(decoded) <= 6


@pytest.mark.parametrize("name", EVERY_CLIP)
def test_reading_by_the_index_is_decoding_everything_bit_for_bit(name, folder):
    pytest.importorskip("av")
    video, whole = open_video(clips.make(folder, name)), open_video(clips.make(folder, name))
    whole._index = None
    every = whole.arrays(range(whole.total))
    for step in (1, 2, 3, 5, 7):
        indices = range(step // 2, video.total, step)
        assert np.array_equal(video.arrays(indices), every[list(indices)])


def test_frames_that_nobody_needs_are_not_decoded(folder, monkeypatch):
    context = pytest.importorskip("av").codec.context.CodecContext.create("h264", "r")
    if not hasattr(context, "field_order"):
        pytest.skip("this PyAV does not tell progressive frames from fields")
    video, decoded = open_video(clips.make(folder, "plain.mp4")), 0
    whole = pyav.PyavVideo._decode_segments

    def count(self, *arguments):
        nonlocal decoded
        for start, frames in whole(self, *arguments):
            decoded += len(frames)
            yield start, frames

    monkeypatch.setattr(pyav.PyavVideo, "_decode_segments", count)
    video.arrays(range(clips.FRAMES))
    assert decoded == clips.FRAMES
    decoded = 0
    video.arrays(range(4, clips.FRAMES, 5))
    assert clips.FRAMES / 5 < decoded < clips.FRAMES * 0.8


def test_times_follow_the_clock_of_the_file(folder):
    regular = open_video(clips.make(folder, "plain.mp4"))
    assert regular.fps == 25
    assert regular.times([0, 1, 50]) == pytest.approx([0, 0.04, 2.0])
    kept = [n for n in range(clips.FRAMES) if n % 3 == 0 or n % 7 == 0]
    irregular = open_video(clips.make(folder, "variable_rate.mp4"))
    assert irregular.times(range(irregular.total)) == pytest.approx([n / 25 for n in kept], abs=1e-3)
    assert open_video(clips.make(folder, "edit_list.mp4")).times([0, 10]) == pytest.approx([0, 0.4])
    assert open_video(clips.make(folder, "raw.h264")).times([0, 10]) == pytest.approx([0, 0.4])


def test_a_stream_cut_in_the_middle_of_a_group_counts_as_ffmpeg_does(folder, tmp_path):
    whole = clips.make(folder, "mpeg2.ts").read_bytes()
    path = tmp_path / "late.ts"
    path.write_bytes(whole[: 188 * 3] + whole[188 * 40 :])  # tables kept, the first packets gone
    truth = clips.truth(path)
    video = open_video(path)
    assert 0 < video.total == len(truth) < clips.FRAMES
    assert_same_frames(video.arrays([0, video.total - 1]), [0, video.total - 1], truth)


def test_a_damaged_file_says_how_many_frames_are_left(folder, tmp_path, caplog):
    data = bytearray(clips.make(folder, "fast_start.mp4").read_bytes())
    at = data.index(b"mdat") + 4
    data[at + (len(data) - at) * 6 // 10 :] = bytes(len(data) - at - (len(data) - at) * 6 // 10)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    truth = clips.truth(path)
    video = open_video(path)
    assert video.damage is None
    last = video.arrays([0, len(truth) - 1, clips.FRAMES - 1])
    assert_same_frames(last[:2], [0, len(truth) - 1], truth)
    assert np.array_equal(last[1], last[2])
    assert video.damage.startswith(f"{len(truth)} of its 60 frames can be decoded")
    assert caplog.messages == [f"{path} is damaged: {video.damage}"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain.mp4", "no frame can be decoded"),
        ("fast_start.mp4", r"\d\d of 60 frames can be decoded"),
        ("open_gop.mkv", r"\d\d of 60 frames"),
        ("vp9.webm", r"\d\d of 60 frames"),
        ("mpeg4.avi", r"\d\d of 60 frames"),
    ],
)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_truncated(name, message, decoder, folder, tmp_path):
    data = clips.make(folder, name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) * 6 // 10])
    one_line(f"cut short.*{message}", path, decoder)


@pytest.fixture
def bad_file(tmp_path):
    def make(kind):
        path = tmp_path / "clip.mp4"
        if kind == "directory":
            path.mkdir()
        elif kind == "sound":
            clips.ffmpeg("-f", "lavfi", "-i", "sine=duration=0.3", path)
        elif kind == "sound with a cover":
            path = tmp_path / "song.m4a"
            clips.ffmpeg(
                "-f",
                "lavfi",
                "-i",
                "sine=duration=0.3",
                *clips.SOURCE,
                "-map",
                "0",
                "-map",
                "1",
                "-frames:v",
                "1",
                "-c:v",
                "mjpeg",
                "-pix_fmt",
                "yuvj420p",
                "-disposition:v",
                "attached_pic",
                path,
            )
        elif kind == "unknown codec":
            data = clips.make(tmp_path, "plain.mp4").read_bytes()
            path.write_bytes(data.replace(b"avc1", b"zzzz"))
        elif kind != "missing":
            path.write_bytes({"empty": b"", "text": b"no video\n" * 50, "noise": bytes(range(256)) * 20}[kind])
        return path

    return make


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("directory", "no image frames"),
        ("empty", "is empty"),
        ("text", "not a readable video"),
        ("noise", "not a readable video"),
        ("sound", "only sound"),
        ("sound with a cover", "only sound"),
        ("unknown codec", "cannot decode"),
    ],
)
def test_bad_files(kind, message, decoder, bad_file, capfd):
    one_line(message, bad_file(kind), decoder)
    assert capfd.readouterr() == ("", "")


def one_line(message, path, decoder):
    pytest.importorskip({"pyav": "av", "decord": "decord"}[decoder])
    with pytest.raises(VideoError, match=message) as caught:
        open_video(path, decoder)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_unknown_decoder(tmp_path):
    with pytest.raises(BackendError, match="unknown decoder 'vlc': choose one of pyav, decord"):
        open_video(tmp_path, decoder="vlc")


@pytest.mark.parametrize(("decoder", "module"), [("pyav", "av"), ("decord", "decord"), ("decord", "av")])
def test_decoder_that_is_not_installed(decoder, module, tmp_path, monkeypatch):
    if (decoder, module) == ("decord", "av"):
        pytest.importorskip("decord")
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"anything")
    real = base.importlib.import_module

    def absent(name):
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(base.importlib, "import_module", absent)
    with pytest.raises(BackendError, match=f"pip install {module}"):
        open_video(path, decoder)
    if module == "av":
        path.write_bytes(struct.pack(">I4s", 1000, b"ftyp"))  # cut short, which is looked at with PyAV
        with pytest.raises(BackendError, match="pip install av"):
            open_video(path, decoder)


@pytest.mark.parametrize("indices", [3, ["a"], [0.5]])
def test_frames_are_named_by_their_numbers(indices, folder):
    with pytest.raises(InputError, match="must be (a list of integers|an integer), not"):
        open_video(clips.make(folder, "plain.mp4")).arrays(indices)


def test_a_wrong_setting_is_not_the_videos_fault(folder, monkeypatch):
    monkeypatch.setenv("SFLLAVA_FAST_MAX_PIXELS", "ab")
    with pytest.raises(InputError, match="^SFLLAVA_FAST_MAX_PIXELS must be a number of pixels"):
        open_video(clips.make(folder, "plain.mp4"))


@pytest.mark.parametrize("index", [-1, clips.FRAMES])
def test_frame_numbers_outside_the_video(index, folder):
    with pytest.raises(InputError, match=f"frame {index} does not exist.*0 to 59"):
        open_video(clips.make(folder, "plain.mp4")).arrays([0, index])


def test_no_frames_asked(folder):
    assert open_video(clips.make(folder, "plain.mp4")).arrays([]).shape == (0, clips.HEIGHT, clips.WIDTH, 3)


@pytest.mark.parametrize("decoder, values", [("pyav", [1, 2, 10]), ("decord", [1, 10, 2])])
def test_folder_of_frames_in_natural_order_or_by_name(decoder, values, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for value in (10, 2, 1):
        Image.new("RGB", (6, 4), (value, 0, 255)).save(tmp_path / f"frame{value}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = open_video(tmp_path, decoder)
    assert (video.total, video.fps, video.size, video.decoder) == (3, None, (4, 6), "images")
    assert video.arrays([2, 0, 1, 1])[:, 0, 0, 0].tolist() == [values[i] for i in (2, 0, 1, 1)]
    assert video.times([0]) is None


def test_folder_of_frames_of_two_sizes_or_unreadable(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (6, 4)).save(tmp_path / "1.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "2.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    video = open_video(tmp_path)
    with pytest.raises(VideoError, match=r"2\.png is 8x4, the first frame 6x4"):
        video.arrays([0, 1])
    with pytest.raises(VideoError, match=r"cannot read the frame .*3\.png"):
        video.arrays([2])


def test_one_image_is_a_video_of_one_frame(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (32, 16), (200, 10, 30)).save(tmp_path / "one.png")
    video = open_video(tmp_path / "one.png")
    assert video.total == 1
    assert video.arrays([0])[0, 8, 8].tolist() == [200, 10, 30]


# --- frames in memory


@pytest.mark.parametrize("kind", ["tensor", "array", "reversed array"])
def test_frames_in_memory(kind):
    frames = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    frames = frames[::-1] if kind == "reversed array" else frames
    given = frames
    if kind == "tensor":
        given = pytest.importorskip("torch").from_numpy(frames)
    video = open_video(given)
    assert (video.total, video.size, video.decoder, video.times([1])) == (5, (4, 6), "memory", None)
    assert np.array_equal(video.arrays([4, 0, 4]), frames[[4, 0, 4]])
    assert open_video(video) is video
    with pytest.raises(InputError, match="frame 5 does not exist"):
        video.arrays([5])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 4, 6, 3), "float32"), ((2, 3, 4, 6), "uint8"), ((0, 4, 6, 3), "uint8"), ((4, 6, 3), "uint8")],
)
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_frames_of_another_kind(kind, shape, dtype):
    frames = np.zeros(shape, dtype)
    if kind == "tensor":
        frames = pytest.importorskip("torch").from_numpy(frames)
    found = re.escape(f"{dtype} {list(shape)}")
    with pytest.raises(InputError, match=rf"\Aframes must be uint8 RGB \[T, H, W, 3\], not {found}\Z"):
        open_video(frames)


def test_tensors_share_the_memory_of_arrays(folder, monkeypatch):
    pytest.importorskip("torch")
    made, plain = [], base.as_tensor
    monkeypatch.setattr(base, "as_tensor", lambda array: made.append(array) or plain(array))
    video = open_video(clips.make(folder, "plain.mp4"))
    for tensor in (video.frames([3, 1]), *(frame for _, frame in video.stream([3, 1]))):
        array = made.pop(0)
        assert tensor.data_ptr() == array.ctypes.data and tuple(tensor.shape) == array.shape


def test_decoding_needs_no_torch(folder, tmp_path):
    """In a process that cannot import torch: a file and frames in memory, by number and as they come."""
    path, script = clips.make(folder, "plain.mp4"), tmp_path / "script.py"
    script.write_text(
        "import sys; sys.modules['torch'] = None\n"
        "from sfllava_fast.video import open_live, open_video\n"
        "video = open_video(sys.argv[1])\n"
        "frames = video.arrays(range(video.total))\n"
        "with open_live(sys.argv[1], 1) as live:\n"
        "    watched = list(live.arrays())\n"
        "assert all((frame == frames[round(seconds * 25)]).all() for seconds, frame in watched)\n"
        "assert (open_video(frames).arrays([5]) == frames[[5]]).all()\n"
        "print(frames.shape, len(watched))"
    )
    root = str(Path(base.__file__).parents[2])
    command = [sys.executable, script, path]
    done = subprocess.run(command, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(60, 96, 128, 3) 3\n", "")


def test_tensors_without_torch_are_one_line(folder, monkeypatch):
    path = clips.make(folder, "plain.mp4")
    video = open_video(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(video, "_stream", lambda *_: pytest.fail("something was decoded"))
    said = "^tensors of frames need the package torch, which cannot be imported .*pip install torch, or take arrays"
    with open_live(path) as live:
        for use in (lambda: video.frames([0]), lambda: video.stream([0]), live.next_frame, lambda: next(iter(live))):
            with pytest.raises(BackendError, match=said) as caught:
                use()
            assert "\n" not in str(caught.value)
        assert len(list(live.arrays())) == 5
    with pytest.raises(BackendError, match=said):
        as_frames(np.zeros((1, 2, 2, 3), np.uint8))


def test_what_is_no_video():
    with pytest.raises(InputError, match="a video is a file, a folder or frames .*, not list"):
        open_video([1, 2])

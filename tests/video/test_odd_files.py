"""Files that are good though they look odd, and what is refused in one line before anything is read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import zlib

import clips
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllava_fast.errors import InputError, VideoError
from sfllava_fast.video import FORMATS, FramesVideo, headers, open_live, open_video

av = pytest.importorskip("av")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("odd")


def one_line(message, source, opening=open_video, **options):
    with pytest.raises(VideoError, match=message) as caught:
        opening(source, **options)
    assert "\n" not in str(caught.value)


# --- good files


def too_long_mdat(data):
    at = data.index(b"mdat") - 4
    return data[:at] + struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + 8) + data[at + 4 :]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fast_start.mp4", too_long_mdat),
        ("plain.mp4", lambda data: data + b"<html>a page that was sent along</html>"),
        ("plain.mp4", lambda data: data + b"TAG" + bytes(125)),
        ("plain.mp4", lambda data: data + bytes(1000)),
        ("mpeg4.avi", lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:]),
        ("mpeg4.avi", lambda data: data[:4] + bytes(4) + data[8:]),
    ],
)
def test_a_header_that_is_wrong_does_not_make_a_video_bad(name, change, decoder, folder, tmp_path):
    pytest.importorskip({"pyav": "av"}.get(decoder, decoder))
    path = tmp_path / name
    path.write_bytes(change(clips.make(folder, name).read_bytes()))
    assert open_video(path, decoder).total == clips.FRAMES


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "concat:1.mp4", "data:,x.mp4", "file:clip.mp4", "2024-05-01T12:30:00.mp4"]
)
def test_a_name_like_a_protocol(name, folder, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(clips.make(folder, "plain.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert open_video(name).total == clips.FRAMES
    with open_live(name, 1) as live:
        assert len(list(live.arrays())) == 3


def test_a_name_that_is_not_utf8(folder, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    with open(name, "wb") as file:
        file.write(clips.make(folder, "plain.mp4").read_bytes())
    assert open_video(os.fsdecode(name)).total == clips.FRAMES
    with open_live(os.fsdecode(name), 1) as live:
        assert len(list(live.arrays())) == 3


def test_decord_refuses_a_name_that_is_not_utf8(folder, tmp_path):
    pytest.importorskip("decord")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    with open(name, "wb") as file:
        file.write(clips.make(folder, "plain.mp4").read_bytes())
    one_line("decord cannot read .*, a name that is not UTF-8; try --decoder pyav", name, decoder="decord")


@pytest.mark.parametrize(("beyond", "reads"), [(0, True), (1, False), (2**20, False)])
def test_decord_is_given_no_header_of_more_frames_than_the_file_has_bytes(beyond, reads, folder, tmp_path, monkeypatch):
    """It takes memory for as many: the counts here are harmless, and decord is kept from those refused."""
    decord = pytest.importorskip("decord")
    path = tmp_path / "many.avi"
    data = bytearray(clips.make(folder, "mpeg4.avi").read_bytes())
    at = data.index(b"strh") + 40  # the stream's length in frames
    data[at : at + 4] = struct.pack("<I", len(data) + beyond)
    path.write_bytes(data)
    assert open_video(path).total == clips.FRAMES
    if reads:
        assert open_video(path, "decord").total == clips.FRAMES
        return
    monkeypatch.setattr(decord, "VideoReader", lambda *_, **__: pytest.fail("decord was given the file"))
    one_line(
        f"decord cannot read {path}: its header has {len(data) + beyond} frames, .* try --decoder pyav",
        path,
        decoder="decord",
    )


def test_whatever_decord_raises_is_one_line(folder, monkeypatch):
    decord = pytest.importorskip("decord")
    path = clips.make(folder, "plain.mp4")
    video = open_video(path, "decord")

    def fail(*_, **__):
        raise ctypes.ArgumentError("argument 1:\nwrong type")

    monkeypatch.setattr(video._reader, "get_batch", fail)
    one_line("decord cannot decode .*wrong type; try --decoder pyav", [0], video.arrays)
    monkeypatch.setattr(decord, "VideoReader", fail)
    one_line("decord cannot read .*wrong type; try --decoder pyav", path, decoder="decord")


def test_the_default_stream_is_the_video_not_a_larger_thumbnail(folder, tmp_path):
    path = tmp_path / "two.mp4"
    thumbnail = tmp_path / "thumbnail.mp4"
    clips.ffmpeg("-f", "lavfi", "-i", "testsrc2=size=320x240", "-frames:v", "1", thumbnail)
    kinds = ("-c", "copy", "-disposition:v:0", "0", "-disposition:v:1", "default")
    clips.ffmpeg("-i", thumbnail, "-i", clips.make(folder, "plain.mp4"), "-map", "0", "-map", "1", *kinds, path)
    video = open_video(path)
    assert (video.total, video.size) == (clips.FRAMES, (clips.HEIGHT, clips.WIDTH))
    with open_live(path, 25) as live:
        assert len(list(live.arrays())) == clips.FRAMES


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ten.mp4", ("-c:v", "libx264", "-pix_fmt", "yuv420p10le")),
        (
            "bt2020.mp4",
            ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le", "-colorspace", "bt2020nc"),
        ),
        ("422.mp4", ("-c:v", "libx264", "-pix_fmt", "yuv422p")),
        ("422_10.mov", ("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le")),
        ("444.mp4", ("-c:v", "libx264", "-pix_fmt", "yuv444p")),
        ("odd.mkv", ("-vf", "scale=127:95", "-c:v", "ffv1", "-pix_fmt", "yuv420p")),
        ("grey.mkv", ("-c:v", "ffv1", "-pix_fmt", "gray10le")),
        ("full.mp4", (*clips.H264, "-pix_fmt", "yuvj420p", "-color_range", "pc", "-colorspace", "bt709")),
        ("fields.mp4", ("-vf", "setfield=tff", "-c:v", "libx264", "-flags", "+ilme+ildct", "-pix_fmt", "yuv420p")),
        ("fields.ts", ("-vf", "setfield=tff", "-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-b:v", "3M")),
        ("dv.avi", ("-vf", "scale=720:576", "-c:v", "dvvideo", "-pix_fmt", "yuv420p")),
    ],
)
def test_colours_are_those_of_ffmpeg(name, arguments, tmp_path):
    path = tmp_path / name
    clips.ffmpeg(*clips.SOURCE, "-frames:v", "5", *arguments, "-threads", "1", path)
    video = open_video(path)
    frames, truth = video.arrays(range(4)).astype(int), clips.truth(path, video.size)[:4]
    assert np.abs(frames - truth).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_keep_their_values(suffix, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    grey = np.array([[0, 257, 2570, 25700], [128, 129, 65535, 32896]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"1.{suffix}")
    frame = open_video(tmp_path).arrays([0])[0]
    assert frame[..., 0].tolist() == [[0, 1, 10, 100], [0, 1, 255, 128]]
    assert (frame == frame[..., :1]).all()


def test_images_of_other_numbers_are_refused(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "1.tif")
    one_line(r"cannot read the frame .*1\.tif: its values are not of 8 or 16 bits \(mode F\)", tmp_path)


# --- times


def test_times_of_avi_with_b_frames_go_on(folder):
    video = open_video(clips.make(folder, "h264.avi"))
    assert video.times(range(video.total)) == pytest.approx([n / 25 for n in range(clips.FRAMES)])


@pytest.mark.parametrize("offset", [0, 100])
def test_times_of_joined_files_go_on(offset, folder, tmp_path):
    """The second part's clock stands at that of the first, or behind it."""
    plain = clips.make(folder, "open_gop.ts")
    ahead = tmp_path / "ahead.ts"
    clips.ffmpeg("-i", plain, "-c", "copy", "-output_ts_offset", offset, ahead)
    path = tmp_path / "joined.ts"
    path.write_bytes(ahead.read_bytes() + plain.read_bytes())
    video, truth = open_video(path), clips.truth(path)
    assert video.total == len(truth)
    times = video.times(range(video.total))
    assert times == sorted(times) and times[-1] == pytest.approx((len(truth) - 1) / 25, rel=0.1)
    assert np.abs(video.arrays([5, 70]).astype(int) - truth[[5, 70]]).mean() < 2


# --- lists of other files


def hls(clip):
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{clip.name}\n#EXT-X-ENDLIST\n"


def concat(clip):
    return f"ffconcat version 1.0\nfile {clip.name}\n"


@pytest.mark.parametrize("suffix", ["m3u8", "mp4", "txt"])
@pytest.mark.parametrize("write", [hls, concat])
def test_a_list_of_other_files_is_no_video(write, suffix, folder, tmp_path):
    clip = tmp_path / "plain.ts"
    clips.ffmpeg("-i", clips.make(folder, "plain.mp4"), "-c", "copy", clip)
    path = tmp_path / f"list.{suffix}"
    path.write_text(write(clip))
    if suffix == "m3u8" and write is hls:  # FFmpeg itself follows it
        assert len(clips.truth(path)) == clips.FRAMES
    one_line("list.* is not a readable video", path)
    one_line("list.* is not a readable video", path, lambda source: open_live(source).close())


def test_a_pattern_of_names_is_no_video(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for number in (0, 1):
        Image.new("RGB", (32, 16)).save(tmp_path / f"{number}.png")
    one_line("does not exist", tmp_path / "%d.png")
    (tmp_path / "%d.png").write_bytes((tmp_path / "0.png").read_bytes())
    one_line("is in no format of videos or images that is read here", tmp_path / "%d.png")


def test_no_format_that_is_allowed_reads_other_files_or_devices():
    for name in [
        "concat",
        "hls",
        "dash",
        "image2",
        "image2pipe",
        "lavfi",
        "sdp",
        "rtsp",
        "imf",
        "webm_dash_manifest",
        "v4l2",
        "x11grab",
        "tty",
        "sap",
    ]:
        assert name not in FORMATS.split(",")


# --- refused at once


def test_a_pipe_is_refused_without_waiting(tmp_path, deadline):
    os.mkfifo(tmp_path / "clip.mp4")
    one_line("clip.mp4 is a pipe: name a video file; `watch` reads pipes", tmp_path / "clip.mp4")
    one_line("/dev/null is a device", "/dev/null")


def test_a_url(tmp_path):
    for url in ("http://host/clip.mp4", "rtsp://user:secret@host/stream"):
        with pytest.raises(VideoError, match=r"://host/\w+.* is a URL: use `watch`, or download it") as caught:
            open_video(url)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("opening", [open_video, open_live])
def test_names_of_files_that_are_not_there(opening, folder, tmp_path):
    (tmp_path / "IMG_0001.MOV").write_bytes(b"x")
    one_line(r"IMG_0001 does not exist: there is IMG_0001\.MOV", tmp_path / "IMG_0001", opening)
    one_line("IMG_1 does not exist: check the path", tmp_path / "IMG_1", opening)
    one_line("does not exist: check the path", tmp_path / "none" / "clip.mp4", opening)
    one_line("cannot be opened: File name too long", tmp_path / f"{'x' * 300}.mp4", opening)


# --- limits


def bomb(width, height):
    """A GIF of one pixel on a canvas of this size."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + bytes([0x80, 0, 0, 0, 0, 0, 255, 255, 255])
    return head + b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\2\2\x44\1\0\x3b"


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("make", [bomb, png])
def test_frames_of_too_many_pixels_are_not_decoded(make, tmp_path, monkeypatch):
    """The limit is lowered, so that what it refuses would be harmless."""
    path = tmp_path / "big.png"
    path.write_bytes(make(300, 200))
    assert open_video(path).size == (200, 300)
    monkeypatch.setenv("SFLLAVA_FAST_MAX_PIXELS", "59999")
    decoded = []
    monkeypatch.setattr("sfllava_fast.video.pyav.rgb_converter", lambda av: decoded.append)
    one_line("none of its frames can be decoded.*SFLLAVA_FAST_MAX_PIXELS.*than 59999 pixels", path)
    one_line("SFLLAVA_FAST_MAX_PIXELS.*than 59999 pixels", path, lambda source: list(open_live(source).arrays()))
    if make is png:
        one_line("frames of 300x200, more than 59999 pixels: .*SFLLAVA_FAST_MAX_PIXELS", tmp_path)
    assert not decoded


def test_videos_of_too_many_pixels_are_not_decoded(folder, monkeypatch):
    path = clips.make(folder, "plain.mp4")
    video = open_video(path)
    monkeypatch.setenv("SFLLAVA_FAST_MAX_PIXELS", str(clips.HEIGHT * clips.WIDTH - 1))
    one_line("has frames of 128x96, more than 12287 pixels", path)
    one_line("has frames of 128x96", path, lambda source: open_live(source).close())
    monkeypatch.setenv("SFLLAVA_FAST_MAX_PIXELS", str(clips.HEIGHT * clips.WIDTH))
    assert len(video.arrays([0] * 32)) == 32
    monkeypatch.setattr(video, "_stream", lambda *_: pytest.fail("something was decoded"))
    one_line("33 frames of 128x96 from .* are more than 393216 pixels at once", [0] * 33, video.arrays)

    monkeypatch.setenv("SFLLAVA_FAST_MAX_TOTAL_PIXELS", str(3 * clips.HEIGHT * clips.WIDTH))
    one_line("4 frames .* more than 36864 pixels at once: .* SFLLAVA_FAST_MAX_TOTAL_PIXELS", [0] * 4, video.arrays)
    monkeypatch.undo()
    monkeypatch.setenv("SFLLAVA_FAST_MAX_TOTAL_PIXELS", str(3 * clips.HEIGHT * clips.WIDTH))
    assert len(video.arrays([0] * 3)) == 3


@pytest.mark.parametrize("limit", [1500, 100], ids=["beyond which Pillow warns", "twice of which it raises at"])
def test_pillow_has_no_limit_of_its_own(limit, tmp_path, monkeypatch, recwarn):
    Image = pytest.importorskip("PIL.Image")
    for suffix in ("png", "jpg", "bmp"):
        (tmp_path / suffix).mkdir()
        Image.new("RGB", (64, 32), "white").save(tmp_path / suffix / f"0.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for suffix in ("png", "jpg", "bmp"):
        assert (open_video(tmp_path / suffix).arrays([0]) == 255).all()
    monkeypatch.setenv("SFLLAVA_FAST_MAX_PIXELS", "2047")
    for suffix in ("png", "jpg", "bmp"):
        one_line("frames of 64x32, more than 2047 pixels: .*SFLLAVA_FAST_MAX_PIXELS", tmp_path / suffix)
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize("name", ["WebP", "Tiff"])
def test_a_limit_that_pillow_has_for_some_formats_is_one_line(name, tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    plugin = pytest.importorskip(f"PIL.{name}ImagePlugin")
    Image.new("RGB", (64, 32)).save(tmp_path / f"0.{name.lower()}")

    def refuse(*_):
        raise Image.DecompressionBombError("DOS attack")

    monkeypatch.setattr(getattr(plugin, f"{name}ImageFile"), "_open", refuse)
    one_line(f"0.{name.lower()} has more pixels than Pillow's own limit, [0-9]+$", tmp_path)


def test_a_limit_that_is_no_number(folder, monkeypatch):
    monkeypatch.setenv("SFLLAVA_FAST_MAX_TOTAL_PIXELS", "-1")
    for opening in (open_video, open_live):
        with pytest.raises(InputError, match="^SFLLAVA_FAST_MAX_TOTAL_PIXELS must be a number .*, not '-1'"):
            opening(clips.make(folder, "plain.mp4"))
    monkeypatch.setenv("SFLLAVA_FAST_MAX_PIXELS", "8k")
    with pytest.raises(InputError, match="SFLLAVA_FAST_MAX_PIXELS must be a number of pixels of at least 1, not '8k'"):
        FramesVideo(np.zeros((1, 2, 2, 3), np.uint8)).arrays([0])


# --- headers


@pytest.mark.parametrize(
    "head",
    [
        b"\x1aE\xdf\xa3",
        b"\x1aE\xdf\xa3\x01",
        b"\x1aE\xdf\xa3\x00",
        b"\x1aE\xdf\xa3\x01" + b"\xff" * 7,
        b"\x1aE\xdf\xa3\xbf" + bytes(58),
    ],
)
def test_matroska_headers_that_make_no_sense(head, tmp_path):
    path = tmp_path / "four.mkv"
    path.write_bytes(head)
    assert headers.declared_bytes(path) == 0
    one_line("four.mkv is not a readable video", path)


@given(st.sampled_from([b"\x1aE\xdf\xa3", b"\0\0\0\x10ftyp", b"RIFF", b""]), st.binary(max_size=80))
def test_any_header_is_read_without_an_error(tmp_path, start, rest):
    path = tmp_path / "any"
    path.write_bytes(start + rest)
    assert headers.declared_bytes(path) >= 0


def box(kind, size, wide=None):
    return struct.pack(">I4s", size, kind) + (b"" if wide is None else struct.pack(">Q", wide))


def test_boxes_of_a_header_are_bounded(tmp_path):
    path = tmp_path / "boxes.mp4"
    path.write_bytes(box(b"ftyp", 8) + box(b"free", 8) * 200_000)
    reads = []

    class Counted:
        def __init__(self, file):
            self.seek, self._read = file.seek, file.read

        def read(self, size):
            reads.append(size)
            return self._read(size)

    with path.open("rb") as file:
        assert headers._mp4_bytes(Counted(file)) == 0
    assert len(reads) == 100_000
    one_line("is not a readable video|no video stream", path)


@pytest.mark.parametrize("size", [2**32, 2**62, 2**63, 2**64 - 1])
def test_sizes_of_64_bits(size, tmp_path):
    path = tmp_path / "wide.mp4"
    path.write_bytes(box(b"ftyp", 16) + bytes(8) + box(b"mdat", 1, size))
    assert headers.declared_bytes(path) == (16 + size if size == 2**32 else 16)
    one_line("wide.mp4 is", path)


def test_an_animated_webp_is_read_or_named(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "anim.webp"
    pictures = [Image.new("RGB", (32, 16), (value, 0, 0)) for value in (10, 90, 200)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True)
    if int(av.__version__.split(".")[0]) >= 19:
        assert open_video(path).arrays(range(3))[:, 0, 0, 0].tolist() == [10, 90, 200]
    else:
        one_line("none of its frames can be decoded: this FFmpeg cannot read animated WebP; convert it to GIF", path)


def test_a_pipe_among_the_frames_of_a_folder_is_refused_without_waiting(tmp_path, deadline):
    pytest.importorskip("PIL.Image")
    os.mkfifo(tmp_path / "0.jpg")
    with pytest.raises(VideoError, match=f"^{tmp_path}/0.jpg is a pipe: name a video file"):
        open_video(tmp_path)


def test_a_frame_is_of_the_formats_that_are_read_whatever_its_name(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg", format="GIF")
    with pytest.raises(VideoError, match="cannot read the frame .*0.jpg"):
        open_video(tmp_path)


def test_decord_is_given_what_begins_as_a_container(tmp_path):
    for head, known in ((b"\0\0\0\x18ftypisom", True), (b"\x1aE\xdf\xa3", True), (b"ffconcat version 1.0", False)):
        (tmp_path / "clip").write_bytes(head)
        refused = pytest.raises(VideoError, match="is not a container that decord reads")
        with contextlib.nullcontext() if known else refused:
            headers.check_container(tmp_path / "clip")

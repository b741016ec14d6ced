"""Small clips written by ffmpeg, and the frames that ffmpeg itself decodes from them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

HEIGHT, WIDTH, FRAMES = 96, 128, 60
SOURCE = ("-f", "lavfi", "-i", f"testsrc2=size={WIDTH}x{HEIGHT}:rate=25:duration={FRAMES / 25}")
OPEN_GOP = ("-c:v", "libx264", "-x264-params", "open-gop=1:keyint=12:bframes=3", "-pix_fmt", "yuv420p")
HEVC = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=15:open-gop=1", "-pix_fmt", "yuv420p")
H264 = ("-c:v", "libx264", "-g", "25", "-pix_fmt", "yuv420p")
IRREGULAR = ("-vf", "select='not(mod(n,3))+not(mod(n,7))'", "-fps_mode", "vfr")

# name -> arguments that follow the drawn source
ENCODED = {
    "plain.mp4": H264,
    "open_gop.mp4": OPEN_GOP,
    "open_gop.ts": OPEN_GOP,
    "open_gop.mkv": OPEN_GOP,
    "variable_rate.mp4": (*IRREGULAR, *H264),
    "intra_refresh.ts": ("-c:v", "libx264", "-intra-refresh", "1", "-g", "20", "-pix_fmt", "yuv420p"),
    "h264.avi": H264,
    "mpeg4.avi": ("-c:v", "mpeg4", "-bf", "2"),
    "mpeg2.ts": ("-c:v", "mpeg2video", "-bf", "2", "-g", "12"),
    "hevc.mp4": HEVC,
    "hevc.ts": HEVC,
    "vp8.webm": ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-b:v", "200k"),
    "vp9.webm": (
        "-c:v",
        "libvpx-vp9",
        "-auto-alt-ref",
        "1",
        "-lag-in-frames",
        "16",
        "-b:v",
        "200k",
        "-cpu-used",
        "8",
    ),
    "raw.h264": OPEN_GOP,
    "bt709_full.mp4": (*H264, "-color_range", "pc", "-colorspace", "bt709"),
}
# name -> (clip it is copied from, input arguments, output arguments)
COPIED = {
    "edit_list.mp4": ("open_gop.mp4", ("-ss", "1.1"), ()),
    "rotated.mp4": ("plain.mp4", ("-display_rotation", "90"), ()),
    "fast_start.mp4": ("plain.mp4", (), ("-movflags", "+faststart")),
}


def ffmpeg(*arguments: str | Path) -> bytes:
    """Standard output of one run of ffmpeg; skips the test if there is no binary."""
    binary = pytest.importorskip("imageio_ffmpeg", reason="needs the ffmpeg of imageio-ffmpeg").get_ffmpeg_exe()
    command = [binary, "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout


def make(folder: Path, name: str) -> Path:
    """The clip of that name, written on first use."""
    path = folder / name
    if path.exists():
        return path
    if name in COPIED:
        source, before, after = COPIED[name]
        ffmpeg(*before, "-i", make(folder, source), "-c", "copy", *after, path)
    else:
        ffmpeg(*SOURCE, *ENCODED[name], "-threads", "1", path)
    return path


def truth(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """What ffmpeg decodes: uint8 RGB [frames, H, W, 3]."""
    out = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(out, np.uint8).reshape(-1, *size, 3)

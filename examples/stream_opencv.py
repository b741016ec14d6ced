"""Questions about a stream while it runs: a camera through OpenCV, or the sample video if there is none.

    python examples/stream_opencv.py [CAMERA_NUMBER]

Without OpenCV (`pip install opencv-python-headless`) or without a camera the frames are those of the sample video,
read by PyAV. Needs the extras [video] and [llava].
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from sfllava_fast import SlowFastLlava
from sfllava_fast.embedded import sample_video
from sfllava_fast.video import open_video

RATE = 2  # frames a second that are pushed
EVERY = 4  # frames from one question to the next
SECONDS = 20  # of a camera


def camera_frames(number: int) -> Iterator[np.ndarray]:
    """uint8 RGB [H, W, 3] of a camera; nothing without OpenCV or without the camera."""
    try:
        import cv2
    except ImportError:
        return
    camera = cv2.VideoCapture(number)
    try:
        started = time.monotonic()
        pushed = 0
        while camera.isOpened() and time.monotonic() - started < SECONDS:
            read, frame = camera.read()  # as fast as the camera gives frames, so that none of them is old
            if not read:
                return
            if (time.monotonic() - started) * RATE >= pushed:
                pushed += 1
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        camera.release()


def sample_frames() -> Iterator[np.ndarray]:
    """The sample video at RATE frames a second."""
    video = open_video(sample_video())
    for _, frame in video.stream_arrays(range(0, video.total, round(video.fps / RATE))):
        yield frame


model = SlowFastLlava.from_pretrained()
# slowfast keeps at most 8 evenly spaced frames of all that were pushed, however long the stream runs.
with model.open_stream("slowfast", frames=8) as stream:
    for source, frames in (
        ("camera", camera_frames(int(sys.argv[1]) if sys.argv[1:] else 0)),
        ("sample", sample_frames()),
    ):
        for frame in frames:
            stream.push(torch.from_numpy(frame)[None])  # [1, H, W, 3]
            if stream.seen % EVERY == 0:
                answer = stream.ask("what appears first?")
                print(f"{source}, {stream.seen} frames: frames {answer.frames} kept, {answer.text}")
        if stream.seen:
            break

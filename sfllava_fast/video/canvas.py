"""Several frames as one picture, for layouts that compose frames before the vision tower (IG-VLM, arXiv 2403.18406)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Numbered, Video

_WHITE = 255


def compose_canvas(frames: Tensor, rows: int, columns: int) -> Tensor:
    """Compose frames into pictures, row by row. Missing frames of the last picture are white.

    Args:
        frames: uint8 RGB [t, H, W, 3].
        rows: Rows of frames in a picture.
        columns: Columns of frames in a picture.

    Returns:
        uint8 RGB [ceil(t / (rows * columns)), rows * H, columns * W, 3].
    """
    lacking = -len(frames) % (rows * columns)
    if lacking:
        frames = torch.cat([frames, frames.new_full((lacking, *frames.shape[1:]), _WHITE)])
    pictures = frames.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # [p, rows, H, columns, W, 3]
    return pictures.flatten(3, 4).flatten(1, 2)


class CanvasVideo(Video):
    """Frames of a video, composed into pictures of `rows` x `columns` frames."""

    def __init__(self, video: Video, frames: Sequence[int], rows: int, columns: int) -> None:
        super().__init__(video.path)
        self.decoder, self.fps = video.decoder, None
        self._video, self._frames, self._shape = video, list(frames), (rows, columns)
        self.total = -(-len(self._frames) // (rows * columns))
        self.size = rows * video.size[0], columns * video.size[1]

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        each = self._shape[0] * self._shape[1]
        for picture in unique:
            if stop.is_set():
                return
            frames = self._video.frames(self._frames[picture * each : (picture + 1) * each])
            yield picture, compose_canvas(frames, *self._shape)[0].numpy()

"""Decoding with decord, as in the published pipeline."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ..errors import VideoError
from .base import Numbered, Video, check_file, check_pixels, import_package, reason
from .container import open_stream
from .headers import check_container
from .rgb import orientation

_BATCH = 8


class DecordVideo(Video):
    """A video file that decord decodes.

    Frames are exact for plain files, but not with edit lists, open GOPs, HEVC, .ts or .avi. Times assume a constant
    rate.
    """

    decoder = "decord"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        decord = import_package("decord", "decord")
        decord.logging.set_level(decord.logging.QUIET)
        _check_first(import_package("av", "decord"), path)
        check_container(path)
        try:
            self._reader = decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0))
            self.total = len(self._reader)
            self.fps = float(self._reader.get_avg_fps())
            height, width, _ = self._reader[0].shape
        except UnicodeEncodeError as error:
            raise VideoError(f"decord cannot read {path}, a name that is not UTF-8; try --decoder pyav") from error
        except Exception as error:  # decord and ctypes raise many types
            raise VideoError(f"decord cannot read {path}: {reason(error)}; try --decoder pyav") from error
        self.size = (height, width)

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        for start in range(0, len(unique), _BATCH):
            numbers = unique[start : start + _BATCH]
            try:
                frames = self._reader.get_batch(numbers).asnumpy()
            except Exception as error:
                raise VideoError(f"decord cannot decode {self.path}: {reason(error)}; try --decoder pyav") from error
            if stop.is_set():
                return
            yield from zip(numbers, frames)


def _check_first(av: Any, path: Path) -> None:
    """Raise VideoError, with PyAV, for a file that decord cannot read.

    decord would print several lines to stderr, at any log level, or end the process.
    """
    size = check_file(path)
    with open_stream(av, path) as (container, stream):
        # decord allocates memory for the number of frames in the header, of any of the streams.
        for count in (s.frames for s in container.streams.video):
            if not 0 <= count <= size:
                raise VideoError(
                    f"decord cannot read {path}: its header has {count} frames, and {size} bytes hold fewer; "
                    "try --decoder pyav"
                )
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise VideoError(f"decord cannot read {path}: {reason(error)}; try --decoder pyav") from error
        if frame is None:
            raise VideoError(f"decord cannot read {path}: it has no frame; try --decoder pyav")
        check_pixels(path, (frame.height, frame.width))
        if sum(orientation(av, frame)) % 2:
            raise VideoError(f"decord does not mirror frames, which {path} requires; use --decoder pyav")

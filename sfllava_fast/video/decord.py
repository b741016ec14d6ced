"""Reading with decord, the published pipeline's decoder."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from ..errors import BackendError, VideoError
from .base import Numbered, Video, import_package, reason
from .headers import check_container
from .pyav import open_stream, orientation

_BATCH = 8


class DecordVideo(Video):
    """Reading with decord, the published pipeline's decoder.

    Exact on plain files, not on edit lists, open GOPs, HEVC, .ts or .avi; times assume a constant rate.
    """

    decoder = "decord"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        decord = import_package("decord", "decord")
        decord.logging.set_level(decord.logging.QUIET)
        # PyAV says in one line what is wrong with a file; decord prints several, on stderr, at any level.
        with contextlib.suppress(BackendError):
            av = import_package("av", "decord")
            with open_stream(av, path) as (container, stream):
                try:
                    first = next(container.decode(stream), None)
                except av.FFmpegError as error:
                    raise VideoError(f"decord cannot read {path}: {reason(error)}; try --decoder pyav") from error
                _check_upright(av, path, first)
        check_container(path)
        try:
            self._reader = decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0))
            self.total = len(self._reader)
            self.fps = float(self._reader.get_avg_fps())
            height, width, _ = self._reader[0].shape
        except UnicodeEncodeError as error:
            raise VideoError(f"decord cannot read {path}, a name that is not UTF-8; try --decoder pyav") from error
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise VideoError(f"decord cannot read {path}: {reason(error)}; try --decoder pyav") from error
        self.size = (height, width)
        self._error = decord.DECORDError

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        for start in range(0, len(unique), _BATCH):
            numbers = unique[start : start + _BATCH]
            try:
                frames = self._reader.get_batch(numbers).asnumpy()
            except (self._error, RuntimeError) as error:
                raise VideoError(
                    f"decord cannot decode {self.path}: {reason(error)}; try --decoder pyav"
                ) from error
            if stop.is_set():
                return
            yield from zip(numbers, frames)


def _check_upright(av: Any, path: Path, frame: Any) -> None:
    """VideoError for a video that is to be mirrored, which decord does not do."""
    if frame is not None:
        mirrored = sum(orientation(av, frame)) % 2
        if mirrored:
            raise VideoError(f"decord does not mirror frames, as {path} asks for; use --decoder pyav")

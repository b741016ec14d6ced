"""The base class of videos, and the checks and messages that all readers share.

Frames are numbered from 0 in the order in which they are shown.
"""

from __future__ import annotations

import importlib
import logging
import operator
import os
import re
import stat
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError, InputError, RenumberedError, VideoError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("sfllava_fast")

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")

_MAX_PIXELS = 8192 * 4096
_MOST_PIXELS = 2**31 - 1  # FFmpeg has no larger limit
_FRAMES_AT_ONCE = 32  # of the largest size, by default
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)

Numbered = Generator[tuple[int, np.ndarray], None, None]  # (number, frame) from `Video.stream_arrays`


class Video:
    """A readable video.

    Attributes:
        path: The file or folder.
        decoder: Name of the decoder in `DECODERS`, "images" for a folder, "memory" for frames in memory.
        total: Number of frames.
        fps: Frames per second, None without a clock.
        size: (height, width) of the upright frames, in coded pixels: a sample aspect ratio other than 1:1 is not
            applied.
        damage: Description of the frames that are known to be missing so far, or None.
    """

    decoder: str
    total: int
    fps: float | None
    size: tuple[int, int]
    damage: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def frames(self, indices: Iterable[int]) -> Tensor:
        """`arrays(indices)` as a tensor that shares its memory. Raises BackendError without torch."""
        import_torch()
        return as_tensor(self.arrays(indices))

    def arrays(self, indices: Iterable[int]) -> np.ndarray:
        """Frames by number. Needs no torch.

        Args:
            indices: Numbers of frames, in any order; numbers may repeat.

        Returns:
            uint8 RGB [n, H, W, 3], in the order of `indices`.

        Raises:
            InputError: If a number is not within 0 to total - 1.
            VideoError: If decoding fails, or if the frames have more pixels than `check_pixels` allows.
        """
        wanted = [self._check(i) for i in _each(indices)]
        check_pixels(self.path, self.size, len(wanted))
        rows = np.empty((len(wanted), *self.size, 3), np.uint8)
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(wanted):
            rows_of.setdefault(number, []).append(row)
        try:
            self._fill(rows, rows_of)
        except RenumberedError:
            self._fill(rows, rows_of)
        return rows

    def stream(
        self, indices: Iterable[int], stop: threading.Event | None = None
    ) -> Generator[tuple[int, Tensor], None, None]:
        """`stream_arrays` with tensors that share the arrays' memory. Raises BackendError without torch."""
        import_torch()
        return _tensors(self.stream_arrays(indices, stop))

    def stream_arrays(self, indices: Iterable[int], stop: threading.Event | None = None) -> Numbered:
        """Yield (number, frame) for each distinct number, ascending, as soon as it is decoded. Needs no torch.

        Closing the iterator frees the decoder.

        Args:
            indices: Numbers of frames, in any order.
            stop: Ends the iterator at the next packet once it is set, from any thread.

        Yields:
            The number, and the frame as uint8 RGB [H, W, 3]. Do not write to it: the decoder may own its memory.

        Raises:
            InputError: At the call, if a number is not within 0 to total - 1.
            VideoError: If decoding fails.
            RenumberedError: If damage shows that frames that were yielded have other numbers: stream again.
        """
        unique = sorted({self._check(i) for i in _each(indices)})
        return self._stream(unique, stop or threading.Event())

    def times(self, indices: Iterable[int]) -> list[float] | None:
        """Seconds from the first frame to each of these frames, never decreasing; None without a clock."""
        return [self._time(self._check(i)) for i in indices] if self.fps else None

    def _check(self, index: int) -> int:
        try:
            index = operator.index(index)
        except TypeError:
            raise InputError(f"the number of a frame must be an integer, not {index!r}") from None
        if not 0 <= index < self.total:
            raise InputError(f"frame {index} does not exist: {self.path} has frames 0 to {self.total - 1}")
        return index

    def _fill(self, rows: np.ndarray, rows_of: dict[int, list[int]]) -> None:
        for number, frame in self.stream_arrays(rows_of):
            for row in rows_of[number]:
                rows[row] = frame

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        """`stream_arrays` for distinct ascending numbers that exist. Every reader implements it."""
        raise NotImplementedError

    def _time(self, index: int) -> float:
        assert self.fps
        return index / self.fps


def _each(indices: Iterable[int]) -> Iterable[int]:
    if not isinstance(indices, Iterable):
        raise InputError(f"the numbers of frames must be a list of integers, not {indices!r}")
    return indices


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor that shares its memory."""
    return import_torch().from_numpy(array)


def import_torch() -> Any:
    """The module torch. Raises BackendError if it cannot be imported."""
    try:
        import torch
    except ImportError as error:
        raise BackendError(
            f"tensors of frames need the package torch, which cannot be imported ({one_line(error)}): pip install "
            "torch, or take arrays (`arrays`, `stream_arrays`)"
        ) from error
    return torch


def _tensors(arrays: Numbered) -> Generator[tuple[int, Tensor], None, None]:
    with closing(arrays):
        for number, frame in arrays:
            yield number, as_tensor(frame)


def max_pixels() -> int:
    """Maximum pixels of a frame: SFLLAVA_FAST_MAX_PIXELS. Raises InputError if that is not a number."""
    return min(_pixels("SFLLAVA_FAST_MAX_PIXELS", _MAX_PIXELS), _MOST_PIXELS)


def max_total_pixels() -> int:
    """Maximum pixels of all frames of a call: SFLLAVA_FAST_MAX_TOTAL_PIXELS, else 32 times `max_pixels`."""
    return _pixels("SFLLAVA_FAST_MAX_TOTAL_PIXELS", _FRAMES_AT_ONCE * max_pixels())


def _pixels(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
        raise InputError(f"{name} must be a number of pixels of at least 1, not {text!r}")
    return int(text)


def check_limits() -> None:
    """Raise InputError, before a video is opened, if an environment variable with a limit is not a number."""
    max_pixels()
    max_total_pixels()


def check_pixels(name: object, size: Sequence[int], frames: int = 1) -> None:
    """Raise VideoError if a frame exceeds `max_pixels`, or all frames together `max_total_pixels`.

    Args:
        name: Of the video, for the message.
        size: (height, width) of a frame.
        frames: Number of frames.
    """
    limit = max_pixels()
    if size[0] * size[1] > limit:
        raise VideoError(
            f"{name} has frames of {wide(size)}, more than {limit} pixels: reduce them, or set SFLLAVA_FAST_MAX_PIXELS"
        )
    if frames * size[0] * size[1] > (total := max_total_pixels()):
        raise VideoError(
            f"{frames} frames of {wide(size)} from {name} are more than {total} pixels at once: "
            "ask for fewer, or set SFLLAVA_FAST_MAX_TOTAL_PIXELS"
        )


def wide(size: Sequence[int]) -> str:
    """(height, width) as text, WxH."""
    return f"{size[1]}x{size[0]}"


def check_file(path: Path) -> int:
    """The size in bytes of a regular, readable file that is not empty. Raises VideoError for any other, at once."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            what = next((name for test, name in _KINDS if test(kind)), "no file")
            raise VideoError(f"{path} is {what}: name a video file; `watch` reads pipes and devices")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
    except VideoError:
        raise
    except FileNotFoundError as error:
        raise VideoError(f"{path} does not exist: {_instead_of(path)}") from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{path} cannot be opened: {reason(error)}") from error
    if not size:
        raise VideoError(f"{path} is empty (0 bytes): copy or download it again")
    return size


def _instead_of(path: Path) -> str:
    """Remedy for a missing file: the name of one with a suffix, if there is one."""
    try:
        found = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file() and entry.stem == path.name)
    except OSError:
        found = []
    return f"there is {found[0]}" if found else "check the path of the video"


def hide_password(url: str) -> str:
    """A URL without its user, password, query and fragment, which may be secret. Other names are returned unchanged."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    before, _, place = rest.rpartition("@")
    # With ? or # before an @, it is unclear whether a password or a query ends there.
    return scheme + mark + ("..." if re.search("[?#]", before) else re.split("[?#]", place)[0])


def is_url(text: str) -> bool:
    return bool(_URL.match(text))


def import_package(module: str, decoder: str) -> Any:
    """A package that a decoder needs. Raises BackendError if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"decoder {decoder} needs the package {module}, which cannot be imported "
            f"({one_line(error)}): pip install {module}"
        ) from error


def reason(error: Exception) -> str:
    """The readable part of a decoder's error."""
    return getattr(error, "strerror", None) or one_line(error)


def one_line(error: Exception) -> str:
    """An error's message with its lines joined, at most 200 characters: a decoder's first line may have no content."""
    return " ".join(str(error).split())[:200] or type(error).__name__

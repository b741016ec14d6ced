"""What every video has: frames by their number, as arrays or as tensors; and the checks and messages all readers share.

Frames are numbered in the order they are shown, from 0.
"""

from __future__ import annotations

import importlib
import logging
import operator
import os
import threading
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError, InputError, RenumberedError, VideoError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("sfllava_fast")

Numbered = Generator[tuple[int, np.ndarray], None, None]  # (number, frame), as `Video.stream_arrays` gives them


class Video:
    """A readable video.

    total: number of frames. fps: frames per second, None without a clock. size: (height, width) as shown.
    decoder: the registry name of what reads it ("images" for a folder).
    """

    decoder: str
    total: int
    fps: float | None
    size: tuple[int, int]

    def __init__(self, path: Path) -> None:
        self.path = path

    def frames(self, indices: Iterable[int]) -> Tensor:
        """The tensor of `arrays(indices)`, which it shares memory with."""
        return as_tensor(self.arrays(indices))

    def arrays(self, indices: Iterable[int]) -> np.ndarray:
        """uint8 RGB [n, H, W, 3], in the order asked; numbers may repeat. Needs no torch.

        Raises InputError for a number outside 0 .. total - 1, VideoError where decoding fails.
        """
        wanted = [self._check(i) for i in indices]
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
        """The frames of `stream_arrays` as tensors, which share memory with them."""
        return _tensors(self.stream_arrays(indices, stop))

    def stream_arrays(self, indices: Iterable[int], stop: threading.Event | None = None) -> Numbered:
        """(number, frame) of each number asked, once, in ascending order, as soon as it is decoded.

        A frame is uint8 RGB [H, W, 3], to be read and not written: its memory may be the decoder's. Closing the
        iterator frees the decoder; setting `stop`, from any thread, ends it at the next packet. Needs no torch.

        Raises InputError, at once, for a number outside 0 .. total - 1; VideoError where decoding fails;
        RenumberedError where damage shows that frames already given go by other numbers: stream again.
        """
        unique = sorted({self._check(i) for i in indices})
        return self._stream(unique, stop or threading.Event())

    def times(self, indices: Iterable[int]) -> list[float] | None:
        """Seconds from the first frame at which these frames are shown; None without a clock."""
        return [self._time(self._check(i)) for i in indices] if self.fps else None

    def _check(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.total:
            raise InputError(f"frame {index} does not exist: {self.path} has frames 0 to {self.total - 1}")
        return index

    def _fill(self, rows: np.ndarray, rows_of: dict[int, list[int]]) -> None:
        for number, frame in self.stream_arrays(rows_of):
            for row in rows_of[number]:
                rows[row] = frame

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        """`stream_arrays` of numbers that exist, ascending: what a reader has to implement."""
        raise NotImplementedError

    def _time(self, index: int) -> float:
        return index / self.fps


def as_tensor(array: np.ndarray) -> Tensor:
    """The tensor that shares an array's memory."""
    import torch

    return torch.from_numpy(array)


def _tensors(arrays: Numbered) -> Generator[tuple[int, Tensor], None, None]:
    with closing(arrays):
        for number, frame in arrays:
            yield number, as_tensor(frame)


def check_file(path: Path) -> int:
    """Bytes of a file that can be read and holds some. Raises VideoError for any other."""
    if not path.exists():
        raise VideoError(f"{path} does not exist: check the path of the video")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise VideoError(f"{path} cannot be opened: {error.strerror}") from error
    if not size:
        raise VideoError(f"{path} is empty (0 bytes): copy or download it again")
    return size


def import_package(module: str, decoder: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"decoder {decoder} needs the package {module}, which cannot be imported "
            f"({one_line(error)}): pip install 'sfllava_fast[video]'"
        ) from error


def reason(error: Exception) -> str:
    """The readable half of a decoder's message."""
    return getattr(error, "strerror", None) or one_line(error)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""From a video to the vision tower's input, in threads of its own: while the tower computes, frames are decoded,
resized and normalised one by one, never all at once in memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from .preprocess import PreprocessSpec, empty_pixels, write_pixels

if TYPE_CHECKING:
    from .base import Video

_WORKERS = 4  # threads that preprocess, at most: more than one decoder keeps busy
_BATCHES_AHEAD = 2


def load_pixels(
    video: Video,
    indices: Iterable[int],
    spec: PreprocessSpec = PreprocessSpec(),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch: int = 8,
) -> PixelLoader:
    """Batches [b, 3, h, w] of the frames asked, as `preprocess(video.frames(indices), ...)` makes them.

    b is `batch` for all but the last. Iterate once, best inside `with`: threads start there and have ended
    behind it, however it is left. At most two batches, and a few frames, are made ahead of the consumer
    (more where indices do not ascend). On CUDA the work is enqueued on the stream current at this call.

    Raises InputError here, VideoError while iterating; RenumberedError (see `Video.stream`) where the pixels
    already given belong to other frames: load them again.
    """
    return PixelLoader(video, indices, spec, dtype, device, batch)


class PixelLoader:
    """What `load_pixels` returns: an iterable of batches, a context manager, and its clocks.

    decode_seconds: that decoding took. preprocess_seconds: that resizing and normalising took, summed over
    threads; on CUDA, enqueuing them. wait_seconds: that the consumer waited for batches.
    """

    def __init__(
        self,
        video: Video,
        indices: Iterable[int],
        spec: PreprocessSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        batch: int,
    ) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch must be a number of frames of at least 1, not {batch!r}")
        self.decode_seconds = self.preprocess_seconds = self.wait_seconds = 0.0
        self._spec, self._dtype, self._batch = spec, dtype, batch
        self._device = torch.device(device)
        self._stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._shape = spec.made(*video.size)
        self._rows: dict[int, list[int]] = {}
        for row, number in enumerate(indices):
            self._rows.setdefault(number, []).append(row)
        total = sum(map(len, self._rows.values()))
        sizes = [min(batch, total - start) for start in range(0, total, batch)]
        self._undecoded, self._unmade = sizes[:], sizes[:]  # frames, by batch
        self._buffers: dict[int, torch.Tensor] = {}
        self._stop = threading.Event()
        self._frames = video.stream(self._rows, self._stop)
        self._given = 0  # batches
        self._ahead = 0  # rows decoded and not given
        self._in_work = 0  # frames decoded and not made
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._workers = min(_WORKERS, torch.get_num_threads())
        self._thread = threading.Thread(target=self._decode, name="sfllava-decode", daemon=True)

    def __enter__(self) -> PixelLoader:
        if self._thread.ident is None:
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[torch.Tensor]:
        with self:
            while self._given < len(self._unmade):
                yield self._next()

    def close(self) -> None:
        """Stop the threads, wait for their end, and drop what nobody took."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._buffers.clear()

    def _next(self) -> torch.Tensor:
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._unmade[self._given] or self._stop.is_set())
            self.wait_seconds += time.perf_counter() - start
            if self._error:
                raise self._error
            if self._stop.is_set():
                raise InputError("these pixels are closed: call load_pixels again")
            pixels = self._buffers.pop(self._given)
            self._given += 1
            self._ahead -= len(pixels)
            self._changed.notify_all()
        return pixels

    def _decode(self) -> None:
        """The decoding thread: frames to the workers, as fast as batches are taken."""
        try:
            with closing(self._frames), ThreadPoolExecutor(self._workers, "sfllava-preprocess") as pool:
                for _ in self._rows:
                    if not self._wait_for_room():
                        return
                    start = time.perf_counter()
                    number, frame = next(self._frames)
                    self.decode_seconds += time.perf_counter() - start
                    self._count(number, self._undecoded, ahead=len(self._rows[number]), in_work=1)
                    pool.submit(self._make, number, frame)
        except BaseException as error:
            self._fail(error)

    def _wait_for_room(self) -> bool:
        """Wait until another frame may be decoded; False where none is wanted any more."""

        def room() -> bool:
            if self._stop.is_set() or self._error:
                return True
            # The batch that the consumer waits for may need frames from anywhere: it comes first.
            enough = self._ahead >= _BATCHES_AHEAD * self._batch and not self._undecoded[self._given]
            return self._in_work <= self._workers and not enough

        with self._changed:
            self._changed.wait_for(room)
            return not (self._stop.is_set() or self._error)

    def _make(self, number: int, frame: torch.Tensor) -> None:
        try:
            if self._stop.is_set():
                return
            start = time.perf_counter()
            with torch.cuda.stream(self._stream):
                first, *others = (self._row(row) for row in self._rows[number])
                write_pixels(frame, self._spec, first)
                for other in others:
                    other.copy_(first)
            self._count(number, self._unmade, in_work=-1, seconds=time.perf_counter() - start)
        except BaseException as error:
            self._fail(error)

    def _row(self, row: int) -> torch.Tensor:
        index, at = divmod(row, self._batch)
        with self._changed:
            if index not in self._buffers:
                count = self._unmade[index]
                self._buffers[index] = empty_pixels(count, *self._shape, self._dtype, self._device)
            return self._buffers[index][at]

    def _count(self, number: int, left: list[int], ahead: int = 0, in_work: int = 0, seconds: float = 0.0) -> None:
        with self._changed:
            for row in self._rows[number]:
                left[row // self._batch] -= 1
            self._ahead += ahead
            self._in_work += in_work
            self.preprocess_seconds += seconds
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

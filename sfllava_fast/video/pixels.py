"""A video as input of the vision tower: threads decode and preprocess frames while the tower computes."""

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

_WORKERS = 4  # maximum number of preprocessing threads: one decoder cannot keep more busy
_BATCHES_AHEAD = 2
_DEFAULT_SPEC = PreprocessSpec()


def load_pixels(
    video: Video,
    indices: Iterable[int],
    spec: PreprocessSpec = _DEFAULT_SPEC,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch: int = 8,
) -> PixelLoader:
    """Batches of `preprocess(video.frames(indices), spec, dtype, device)`, made in threads.

    Iterate once, preferably in a `with` block: the threads start there and have ended after it. At most two batches and
    a few frames are made ahead of the consumer, more if `indices` do not ascend. On CUDA the work is enqueued on the
    stream that is current at this call.

    Args:
        video: The video.
        indices: Numbers of frames, in any order; numbers may repeat.
        spec: The preprocessing.
        dtype: Of the pixels.
        device: Where frames are preprocessed.
        batch: Frames of each batch but the last.

    Returns:
        An iterable of pixels [b, 3, h, w].

    Raises:
        InputError: At the call, for wrong arguments.
        VideoError: While iterating, if decoding fails.
        RenumberedError: While iterating, if damage shows that earlier pixels belong to other frames: load them again.
    """
    return PixelLoader(video, indices, spec, dtype, device, batch)


class PixelLoader:
    """The result of `load_pixels`: an iterable of batches and a context manager.

    Attributes:
        decode_seconds: Seconds of decoding.
        preprocess_seconds: Seconds of resizing and normalising, summed over threads; on CUDA, of enqueuing them.
        wait_seconds: Seconds that the consumer waited for batches.
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
            raise InputError(f"batch must be an integer of at least 1, not {batch!r}")
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
        self._undecoded, self._unmade = sizes[:], sizes[:]  # number of frames, by batch
        self._buffers: dict[int, torch.Tensor] = {}
        self._stop = threading.Event()
        self._frames = video.stream(self._rows, self._stop)
        self._given = 0  # batches that the consumer has
        self._ahead = 0  # rows that are decoded and not given
        self._in_work = 0  # frames that are decoded and not preprocessed
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
        """Stop the threads, wait until they have ended, and free the batches that were not consumed."""
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
        """The decoding thread: passes frames to the workers, as fast as batches are consumed."""
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
        """Wait until another frame may be decoded; False if decoding should end."""

        def room() -> bool:
            if self._stop.is_set() or self._error:
                return True
            # The batch that the consumer waits for has priority; its frames may be anywhere in the video.
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

"""Frames of a video as they arrive, from a file, a pipe, a device or a URL, sampled by their time stamps.

The first frame at or after each k / rate seconds (k = 0, 1, ...) is sampled, counted from the first frame that can be
decoded. If frames are missing, the next one is sampled once.

- A frame without a time stamp counts as one interval of the average rate after the previous frame.
- So does a frame whose stamp is more than a second back or five minutes ahead: the source's clock was set.
- A frame whose stamp is less than a second back has the time of the previous frame.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, VideoError
from .base import (
    as_tensor,
    check_file,
    check_limits,
    check_pixels,
    hide_password,
    import_package,
    import_torch,
    log,
    reason,
)
from .container import FORMATS, demux, frame_rate, instead_of_none, open_container, picture_stream, why_unreadable
from .rgb import orientation, rgb_converter

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_RATE = 2.0  # frames per second, as in VideoLLM-online (arXiv 2406.11816)
_AHEAD = 8  # maximum number of sampled frames in the queue
_AHEAD_BYTES = 256 << 20  # maximum bytes of these, except that one frame of any size fits
_STALL = 10.0  # seconds without a frame before a warning
_BACK, _GAP = 1, 300  # seconds by which a time stamp may go back or ahead
_SLACK = 1  # seconds by which the pictures may end before the length that the container declares
_UNKNOWN_RATE = 25  # frames per second
_URL_TIMEOUTS = (30.0, 60.0)  # seconds to open, and to wait for a packet
_POLL_MS = 100
_CLOSE_SECONDS = 2.0
# By default FFmpeg reads many frames ahead, to estimate rates, before it returns the first one.
_AT_ONCE = {"fpsprobesize": "0", "analyzeduration": "500000"}
_STDIN = "standard input"
_CONTAINERS = "a pipe may carry Matroska, MPEG-TS, fragmented MP4, Y4M or H.264"


def open_live(source: str | os.PathLike[str], rate: float = DEFAULT_RATE) -> LiveVideo:
    """Open a video whose frames are read as they arrive. Waits for the source's header.

    Args:
        source: A file, a named pipe, "-" for standard input (any container that ffmpeg writes to a pipe), a video
            device such as /dev/video0, or a URL that PyAV opens (rtsp://, http://, ...).
        rate: Frames per second to sample; the rule is in the module's docstring.

    Raises:
        VideoError: If the source has no pictures.
        InputError: If `rate` is not a positive number.
        BackendError: If PyAV is not installed.
    """
    if not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
        raise InputError(f"rate must be a number of frames per second above 0, not {rate!r}")
    check_limits()
    av = import_package("av", "pyav")
    live = LiveVideo(av, _Source(os.fspath(source)), Fraction(str(float(rate))))
    try:
        live._wait_for_header()
    except BaseException:
        live.close()
        raise
    return live


class LiveVideo:
    """The sampled frames of a source, decoded in a thread as they arrive; made by `open_live`.

    Iteration yields (seconds, frame): the seconds from the first frame, and an upright frame, uint8 RGB [H, W, 3], of
    the source's current size, as a tensor; `arrays` yields arrays. The queue has at most 8 frames and 256 MiB. When it
    is full, a file or a pipe waits; of a device or a live URL the oldest frame is dropped.

    Attributes:
        name: Of the source, for messages.
        live: Whether frames may be dropped.
        dropped: Number of frames that were dropped.
        damaged: Number of packets and frames that could not be decoded and were skipped.
    """

    def __init__(self, av: Any, source: _Source, rate: Fraction) -> None:
        self.name, self.live = source.name, False
        self.dropped = self.damaged = 0
        self._av, self._source, self._rate = av, source, rate
        self._ready: deque[tuple[float, np.ndarray]] = deque()
        self._opened = self._ended = self._stopped = False
        self._broke: str | None = None  # the reason if the stream broke off
        self._error: BaseException | None = None
        self._alive_at, self._warned = time.monotonic(), False  # time of the last decoded frame; of none since
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sfllava-live", daemon=True)
        self._thread.start()

    def next_frame(self, timeout: float | None = None) -> tuple[float, Tensor] | None:
        """`next_array` with the frame as a tensor. Raises BackendError without torch, and then no frame is lost."""
        import_torch()
        following = self.next_array(timeout)
        return following and (following[0], as_tensor(following[1]))

    def next_array(self, timeout: float | None = None) -> tuple[float, np.ndarray] | None:
        """The next (seconds, frame), or None at the end of the stream and after `close`.

        Args:
            timeout: Seconds to wait, or None to wait forever; a long wait is logged once.

        Raises:
            TimeoutError: After `timeout` seconds. No frame is lost: call again.
            VideoError: If no frame of the stream could be decoded.
        """
        with self._changed:
            self._wait(lambda: self._ready or self._ended or self._stopped, timeout)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error:
                raise self._error
            return None

    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        return iter(self.next_frame, None)

    def arrays(self) -> Iterator[tuple[float, np.ndarray]]:
        """Iterate over (seconds, array). Needs no torch."""
        return iter(self.next_array, None)

    def close(self) -> None:
        """Stop decoding, and log the number of dropped frames.

        The thread has ended afterwards, unless a device or the network hangs; then it ends when that returns.
        """
        with self._changed:
            closed, self._stopped = self._stopped, True
            self._changed.notify_all()
        self._source.stop()
        self._thread.join(_CLOSE_SECONDS)
        self._ready.clear()
        if self.dropped and not closed:
            log.warning("%s: %d frames were dropped: they arrived faster than they were read", self.name, self.dropped)

    def __enter__(self) -> LiveVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for_header(self) -> None:
        with self._changed:
            self._wait(lambda: self._opened or self._ended, None)
            if self._error:
                raise self._error

    def _wait(self, ready: Callable[[], Any], timeout: float | None) -> None:
        """Wait, with the lock held, until `ready`. Logs once if no frame arrives."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not ready():
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError(f"{self.name}: no frame for {timeout:g} s")
            if now >= self._alive_at + _STALL and not self._warned:
                self._warned = True
                log.warning("%s: no frame for %g s, still waiting", self.name, _STALL)
            # Short waits, since a Ctrl-C at the beginning of a wait does not end it.
            self._changed.wait(min(deadline - now, _STALL, 1.0))

    def _run(self) -> None:
        """The decoding thread."""
        error: BaseException | None = None
        try:
            with contextlib.closing(self._source), self._source.open(self._av) as container:
                self._read(container)
        except BaseException as failure:
            error = failure
        with self._changed:
            self._ended, self._error = True, None if self._stopped else error
            self._changed.notify_all()

    def _read(self, container: Any) -> None:
        stream = picture_stream(self._av, container, self.name)
        stream.thread_type = "SLICE"  # frame threads delay frames, and lose good ones next to a damaged one
        with self._changed:
            # A source with a known length is not live, even if it is a URL.
            self.live = self._source.is_live and container.duration is None
            self._opened = True
            self._changed.notify_all()
        clock, sized = _Clock(stream, self.name), bool(stream.width)
        to_rgb, taken = rgb_converter(self._av), -1
        for frame in self._decode(container, stream):
            seconds = clock.tick(frame.pts)
            turn = math.floor(seconds * self._rate)
            if turn > taken:
                taken = turn
                size = frame.height, frame.width
                check_pixels(self.name, size)
                self._deliver(float(seconds), orientation(self._av, frame).upright(to_rgb(frame, size)))
        if not self._stopped:
            length = stream.duration and stream.duration * stream.time_base
            self._report_end(clock, sized, length, container.duration)

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield intact frames in the order in which they are shown, until stopped."""
        packets = demux(container, stream)
        while not self._stopped:
            try:
                packet = next(packets, None)
            except (self._av.FFmpegError, OSError) as error:
                silent = isinstance(error, self._av.error.ExitError)
                self._broke = f"no data for {_URL_TIMEOUTS[1]:g} s" if silent else reason(error)
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except self._av.FFmpegError:
                frames = []
                self.damaged += 1
            for frame in frames:
                if frame.is_corrupt:
                    self.damaged += 1
                    continue
                with self._changed:
                    self._alive_at, self._warned = time.monotonic(), False
                yield frame

    def _deliver(self, seconds: float, frame: np.ndarray) -> None:
        with self._changed:
            while self.live and not self._has_room(frame):
                self._ready.popleft()
                self.dropped += 1
            self._changed.wait_for(lambda: self._stopped or self._has_room(frame))
            self._ready.append((seconds, frame))
            self._changed.notify_all()

    def _has_room(self, frame: np.ndarray) -> bool:
        waiting = sum(one.nbytes for _, one in self._ready)
        return not waiting or (len(self._ready) < _AHEAD and waiting + frame.nbytes <= _AHEAD_BYTES)

    def _report_end(self, clock: _Clock, sized: bool, length: Fraction | None, microseconds: int | None) -> None:
        """Log what was missing, given the length that the stream or else the container declares.

        Raises:
            VideoError: If no frame was decoded.
        """
        if clock.now is None:
            why = self._broke or instead_of_none(sized)
            raise VideoError(
                f"{self.name} has a video stream but none of its frames can be decoded: {why}{self._source.hint}"
            )
        if self._broke:
            log.warning("%s broke off: %s", self.name, self._broke)
        if self.damaged:
            log.warning("%s is damaged: %d packets or frames could not be decoded", self.name, self.damaged)
        length = length or Fraction(microseconds or 0, 1_000_000)
        if not clock.jumps and clock.now + _SLACK < length:
            log.warning("%s ends at %.1f of %.1f s: it may be cut short", self.name, clock.now, length)


class _Clock:
    """Seconds from the first frame, from time stamps if they are plausible.

    Attributes:
        now: Seconds of the last frame, None before the first.
        jumps: How many times the source's clock was set.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self.now: Fraction | None = None
        self.jumps = 0
        self._name, self._unit = name, Fraction(stream.time_base)
        self._rate = frame_rate(stream) or _UNKNOWN_RATE
        self._start: Fraction | None = None  # the source's clock at 0 seconds
        self._warned = False

    def tick(self, stamp: int | None) -> Fraction:
        """Seconds of the next frame, whose time stamp is `stamp`."""
        following = Fraction(0) if self.now is None else self.now + 1 / Fraction(self._rate)
        if stamp is None:
            self._warn_missing()
            self.now = following
            return self.now
        moment = stamp * self._unit
        if self._start is None:
            self._start = moment - following
        seconds = moment - self._start
        if self.now is not None and not self.now - _BACK <= seconds <= self.now + _GAP:
            log.info("%s: its clock jumps by %.1f s", self._name, seconds - following)
            self.jumps += 1
            self._start, seconds = moment - following, following
        self.now = seconds if self.now is None else max(self.now, seconds)
        return self.now

    def _warn_missing(self) -> None:
        if not self._warned:
            log.warning("%s has frames without time stamps: they count as %g per second", self._name, self._rate)
        self._warned = True


class _Source:
    """The file, pipe, device or URL of a text: opens it for PyAV, and can interrupt a read that waits.

    Attributes:
        name: For messages, without passwords.
        is_live: Whether the source goes on if it is not read.
    """

    def __init__(self, text: str) -> None:
        self.name, self.is_live = hide_password(text), False
        self._pipe: _Pipe | None = None
        self._options: dict[str, Any] = {"options": _AT_ONCE}
        self._file: Any = text
        if text == "-":
            self._open_stdin()
        elif "://" in text:
            self.is_live = True
            self._options |= {"timeout": _URL_TIMEOUTS, "formats": f"{FORMATS},rtsp,rtp"}
        else:
            self._open_path(Path(text))

    def _open_stdin(self) -> None:
        self.name = _STDIN
        if sys.stdin is None or sys.stdin.isatty():
            raise VideoError("no video on standard input: pipe one into this command")
        descriptor = sys.stdin.fileno()
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            self._open_path(Path(f"/dev/fd/{descriptor}"))  # any container, since a file can be seeked
        else:
            self._file = self._pipe = _Pipe(os.dup(descriptor))

    def _open_path(self, path: Path) -> None:
        if os.path.isdir(path):
            raise VideoError(f"{path} is a folder: name a file, a pipe, a device or a URL")
        kind = path.stat().st_mode if os.path.exists(path) else 0
        if stat.S_ISFIFO(kind):
            # Does not wait for the writer, so that close() does not block; reading waits for it.
            self._file = self._pipe = _Pipe(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        elif stat.S_ISCHR(kind):
            self.is_live = True
            self._options |= {"format": "v4l2", "formats": "v4l2"}
        else:
            check_file(path)
            self._file, self._options = str(path.absolute()), {}  # a relative 12:30.mp4 would be a protocol

    def open(self, av: Any) -> Any:
        try:
            return open_container(av, self._file, **self._options)
        except (av.FFmpegError, OSError, ValueError) as error:
            if self._pipe is not None and not self._pipe.count:
                raise VideoError(f"{self.name} is empty: its writer wrote nothing") from error
            why = reason(error) if "format" in self._options else why_unreadable(error)
            raise VideoError(f"{self.name} is not a readable video: {why}{self.hint}") from error

    @property
    def hint(self) -> str:
        """Text to append to an error."""
        return f"; {_CONTAINERS}" if self._pipe is not None else ""

    def stop(self) -> None:
        """Interrupt a read that waits, from any thread."""
        if self._pipe is not None:
            self._pipe.stopped = True

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()


class _Pipe:
    """A file descriptor as the file object that PyAV reads. After `stopped` is set it is at its end."""

    def __init__(self, descriptor: int) -> None:
        self.stopped, self.count = False, 0
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(self, size: int) -> bytes:
        while not self._poll.poll(_POLL_MS):
            if self.stopped:
                return b""
        data = os.read(self._descriptor, size)
        self.count += len(data)
        return data

    def close(self) -> None:
        os.close(self._descriptor)

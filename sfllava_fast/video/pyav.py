"""Frame-exact reading with PyAV, versions 14.1 to 19."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RenumberedError, VideoError
from .base import Numbered, Video, import_package, log, reason

_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
_OUTPUT_CORRUPT = 1 << 3  # AV_CODEC_FLAG_OUTPUT_CORRUPT: show what ffmpeg shows when a stream starts mid-GOP.


@dataclass(frozen=True)
class _Index:
    """Frames as the packets tell them, in the order shown."""

    pts: list[int]
    packet: list[int]  # the packet, in file order, that completes the frame
    start: list[int]  # the key packet from which it can be decoded


class PyavVideo(Video):
    """Frame-exact reading with PyAV.

    One pass over the packets gives every frame's time stamp, with nothing decoded; a read then decodes from
    the key frame before a wanted frame up to it. Where packets cannot tell (no time stamps, damage), frames
    are counted by decoding from the start.
    """

    decoder = "pyav"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._av = import_package("av", "pyav")
        with open_stream(self._av, path) as (container, stream):
            self._time_base = Fraction(stream.time_base)
            rate = frame_rate(stream)
            self.fps = float(rate) if rate else None
            first, self._index = self._scan_packets(container, stream)
        if self._index is None:
            first = self._scan_frames(threading.Event())
        else:
            self._pts = self._index.pts
        if first is None:
            raise VideoError(f"{path} has a video stream but none of its frames can be decoded: re-encode it")
        self._rotation = quarter_turns(first)
        height, width = first.height, first.width
        self.size = (width, height) if self._rotation % 2 else (height, width)
        self._coded_size = (height, width)

    @property
    def total(self) -> int:
        return len(self._pts)

    def _scan_packets(self, container: Any, stream: Any) -> tuple[Any, _Index | None]:
        """The first frame shown, and the index (None where packets cannot tell which frames there are)."""
        first, packets = None, []
        try:
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                if packet.size:
                    packets.append((packet.pts, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
        except self._av.FFmpegError:
            return None, None
        return first, _index_frames(packets, bool(stream.codec_context.has_b_frames)) if first else None

    def _scan_frames(self, stop: threading.Event) -> Any:
        """Number the frames by decoding them all, unless stopped; the first one, or None."""
        first, stamps = None, []
        for frame in self.decode_all(warn=True):
            if stop.is_set():
                return None
            first = first or frame
            stamps.append(frame.pts)
        self._index, self._pts = None, stamps
        return first

    def decode_all(self, warn: bool = False) -> Iterator[Any]:
        """Every frame in the order shown, stepping over packets that do not decode."""
        bad = 0
        with open_stream(self._av, self.path) as (container, stream):
            try:
                for packet in container.demux(stream):
                    try:
                        yield from packet.decode()
                    except self._av.FFmpegError:
                        bad += 1
            except self._av.FFmpegError:
                bad += 1
        if bad and warn:
            log.warning("%s is damaged: %d of its packets cannot be decoded", self.path, bad)

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        given = 0
        if self._index is not None and unique:
            given = yield from self._from_segments(unique, stop)
            if given < len(unique) and not stop.is_set():
                self._renumber(unique, given, stop)
        if given < len(unique) and not stop.is_set():
            yield from self._from_start(unique[given:], stop)

    def _from_segments(
        self, unique: list[int], stop: threading.Event
    ) -> Generator[tuple[int, np.ndarray], None, int]:
        """Decode only what the wanted frames need, up to one that does not come out as indexed; how many did."""
        index = self._index
        segments = _merge((index.start[i], index.packet[i]) for i in unique)
        missing = {index.pts[i]: i for i in unique}
        todo, early = deque(unique), {}
        convert = self._converter()
        try:
            for start, frames in self._decode_segments(segments, {index.packet[i] for i in unique}):
                for frame in frames:
                    number = missing.pop(frame.pts, None)
                    if number is None:
                        continue
                    if frame.is_corrupt and start:
                        return len(unique) - len(todo)
                    early[number] = convert(frame)
                    # Segments come in the order of the file, frames in the order shown.
                    while todo and todo[0] in early:
                        number = todo.popleft()
                        yield number, early.pop(number)
                if stop.is_set() or not todo:
                    break
        except self._av.FFmpegError as error:
            log.debug("%s: %s", self.path, error)
        return len(unique) - len(todo)

    def _renumber(self, unique: list[int], given: int, stop: threading.Event) -> None:
        """Number frames by decoding them all; the `given` first of `unique` must keep their numbers."""
        log.info("%s: time stamps do not match its frames, decoding from the start", self.path)
        indexed = self._pts
        self._scan_frames(stop)
        if unique[-1] >= self.total:
            raise VideoError(
                f"{self.path} is damaged: only {self.total} of {len(indexed)} frames can be decoded; "
                "copy or download it again"
            )
        if any(self._pts[i] != indexed[i] for i in unique[:given]):
            raise RenumberedError(
                f"{self.path} is damaged and its frames are not those its packets announce: read it again, "
                "by the numbers it has now"
            )

    def _decode_segments(
        self, segments: list[tuple[int, int]], wanted: set[int]
    ) -> Iterator[tuple[int, Iterable[Any]]]:
        """(first packet of the segment, frames) for runs of packets [first, last] in file order.

        Frames of packets not wanted may be left out.
        """
        todo = iter(segments)
        start, stop = next(todo)
        with open_stream(self._av, self.path) as (container, stream):
            skips = _can_skip(stream.codec_context)
            packets = (p for p in container.demux(stream) if p.size)
            for position, packet in enumerate(packets):
                if position >= start:
                    if skips:
                        stream.codec_context.skip_frame = "DEFAULT" if position in wanted else "NONREF"
                    yield start, packet.decode()
                if position < stop:
                    continue
                # Draining gives the last wanted frame without decoding what follows it.
                yield start, stream.decode(None)
                stream.codec_context.flush_buffers()
                start, stop = next(todo, (None, None))
                if start is None:
                    return

    def _from_start(self, unique: list[int], stop: threading.Event) -> Numbered:
        wanted = set(unique)
        convert = self._converter()
        for index, frame in enumerate(self.decode_all()):
            if stop.is_set():
                return
            if index in wanted:
                yield index, convert(frame)
            if index == unique[-1]:
                return
        raise VideoError(f"{self.path}: frame {unique[-1]} of {self.total} can no longer be decoded")

    def _converter(self) -> Callable[[Any], np.ndarray]:
        """A function from a decoded frame to RGB [H, W, 3], turned upright."""
        to_rgb = rgb_converter(self._av)
        return lambda frame: to_rgb(frame, self._coded_size, self._rotation)

    def _time(self, index: int) -> float:
        pts, first = self._pts[index], self._pts[0]
        return index / self.fps if pts is None or first is None else float((pts - first) * self._time_base)


@contextlib.contextmanager
def open_stream(av: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, threads on."""
    try:
        container = open_container(av, str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path} is not a readable video: {reason(error)}") from error
    with container:
        stream = picture_stream(av, container, path)
        stream.thread_type = "AUTO"
        stream.codec_context.flags |= _OUTPUT_CORRUPT
        yield container, stream


def open_container(av: Any, file: Any, **options: Any) -> Any:
    """av.open as every version has it. Metadata need not be UTF-8: version 19 asks nothing, older ones would raise."""
    if int(av.__version__.split(".")[0]) < 19:
        options["metadata_errors"] = "ignore"
    return av.open(file, **options)


def frame_rate(stream: Any) -> Fraction | None:
    """Frames a second that a stream announces: None or, from PyAV 19 on, a false value where it does not."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else None


def picture_stream(av: Any, container: Any, name: object) -> Any:
    """The stream of a container with the largest pictures. Raises VideoError, with its name, where there is none."""
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kind = "only sound" if container.streams.audio else "no video stream"
        raise VideoError(f"{name} has {kind}: name a file with pictures")
    streams = [s for s in streams if s.codec_context]
    if not streams:
        raise VideoError(f"{name} uses a codec that PyAV cannot decode: re-encode it as H.264")
    return max(streams, key=lambda s: (s.width or 0) * (s.height or 0))


def rgb_converter(av: Any) -> Callable[[Any, tuple[int, int], int], np.ndarray]:
    """A function from a decoded frame, its size (height, width) as coded and the quarter turns that put it upright, to
    uint8 RGB [H, W, 3]."""
    from av.video.reformatter import VideoReformatter

    reformat = VideoReformatter().reformat
    # The decoder's threads have the cores already; before version 17 there was one thread anyway.
    threads = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def convert(frame: Any, size: tuple[int, int], turns: int) -> torch.Tensor:
        # Older versions do not look at a frame's range and take every one for limited.
        full = {"src_color_range": _FULL_RANGE} if frame.color_range == _FULL_RANGE else {}
        rgb = reformat(frame, size[1], size[0], "rgb24", **threads, **full).to_ndarray()
        return np.rot90(rgb, turns).copy() if turns else rgb

    return convert


def quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that put a frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _index_frames(packets: Sequence[tuple[int | None, bool, bool, bool]], reorders: bool) -> _Index | None:
    """The index of (pts, key, discard, corrupt) packets, or None where they cannot be trusted."""
    stamps = [pts for pts, *_ in packets]
    if not packets or None in stamps or len(set(stamps)) < len(stamps) or not packets[0][1]:
        return None
    if any(corrupt for *_, corrupt in packets):
        return None
    # A container without presentation times (AVI) passes decode times off as such: useless once reordered.
    if reorders and stamps == sorted(stamps):
        return None
    shown, keys = [], []
    for position, (pts, key, discard, _) in enumerate(packets):
        if key:
            keys.append((pts, position))
        if not discard:
            # Frames shown before their key frame (open GOP) refer to the group before: start at its key.
            start = next((at for key_pts, at in reversed(keys) if key_pts <= pts), 0)
            shown.append((pts, position, start))
    if not shown:
        return None
    return _Index(*(list(column) for column in zip(*sorted(shown))))


def _can_skip(context: Any) -> bool:
    """Whether a packet is a frame, and one marked as no reference is none to any other.

    HEVC marks by temporal layer only; the two fields of an interlaced frame may be packets of their own.
    """
    return context.name == "h264" and getattr(context, "field_order", None) == _PROGRESSIVE


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted runs [first, last] with those that touch made one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged

"""Frame-exact decoding with PyAV, versions 14.1 to 19."""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import RenumberedError, VideoError
from .base import Numbered, Video, check_pixels, import_package, log
from .container import demux, frame_rate, instead_of_none, open_stream
from .rgb import orientation, rgb_converter

_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
_LONGEST = 300  # maximum seconds that a frame is shown


@dataclass(frozen=True)
class _Index:
    """The frames that the packets declare, in the order in which they are shown."""

    pts: list[int]
    packet: list[int]  # the packet, in file order, that completes the frame
    start: list[int]  # the key packet from which it can be decoded


class PyavVideo(Video):
    """A video file that PyAV decodes, exact to the frame.

    Opening scans the packets for the time stamp of every frame. Reading decodes from the key frame before a wanted
    frame. If the packets do not determine the frames (no time stamps, damage), frames are counted by decoding from the
    start.

    A damaged file is used as far as FFmpeg decodes it. A frame that is missing when the video is opened has no number.
    A frame that turns out to be missing later is replaced by the next one, or the last. Both set `damage` and are
    logged.
    """

    decoder = "pyav"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._av = import_package("av", "pyav")
        self._threads = True
        self._served: list[int] | None = None  # for each frame, the number of the decoded one that is returned
        self._pts: Sequence[int | None]
        with open_stream(self._av, path) as (container, stream):
            self._time_base = Fraction(stream.time_base)
            rate = frame_rate(stream)
            self.fps = float(rate) if rate else None
            sized = bool(stream.width)
            first, self._index, lost = self._scan_packets(container, stream)
        if self._index is None:
            first, self._pts, bad = self._scan_frames(threading.Event())
            self._report_bad(bad, lost)
        else:
            self._pts = self._index.pts
        if first is None:
            raise VideoError(
                f"{path} has a video stream but none of its frames can be decoded: {_why_none(path, sized)}"
            )
        self.total, self._timed = len(self._pts), _are_times(self._pts, self._time_base)
        self._coded_size = first.height, first.width
        check_pixels(path, self._coded_size)
        self._orientation = orientation(self._av, first)
        self.size = self._coded_size[::-1] if self._orientation.transposed else self._coded_size

    def _scan_packets(self, container: Any, stream: Any) -> tuple[Any, _Index | None, float]:
        """The first frame shown, the index (None if the packets do not determine the frames), the seconds lost."""
        first: Any = None
        packets, decoded = [], []
        try:
            for packet in demux(container, stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                if packet.size:
                    packets.append((packet.pts, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
                    decoded.append((packet.dts, packet.is_corrupt))
        except self._av.FFmpegError:
            return None, None, _lost(decoded, self._time_base)
        index = _index_frames(packets, bool(stream.codec_context.has_b_frames)) if first else None
        index = index if index and first.pts == index.pts[0] else None
        return first, index, _lost(decoded, self._time_base)

    def _scan_frames(self, stop: threading.Event) -> tuple[Any, list[int | None], int]:
        """Decode until `stop` is set: the first frame or None, all time stamps, the number of bad packets.

        A decoder with several threads loses more than the damaged frame, so missing frames are counted again with one.
        """
        while True:
            first: Any = None
            stamps: list[int | None] = []
            tally: Counter[str] = Counter()
            for frame in self.decode_all(tally):
                if stop.is_set():
                    break
                first = first or frame
                stamps.append(frame.pts)
            lost = tally["bad"] or len(stamps) < tally["packets"]
            if stop.is_set() or not (lost and self._threads):
                break
            self._threads = False
        return first, stamps, tally["bad"]

    def decode_all(self, tally: Counter[str] | None = None) -> Iterator[Any]:
        """Yield all frames in the order in which they are shown, without packets that do not decode.

        Args:
            tally: Counts "packets" that should be frames, and "bad" ones.
        """
        tally = Counter() if tally is None else tally
        with open_stream(self._av, self.path, self._threads) as (container, stream):
            try:
                for packet in demux(container, stream):
                    tally["packets"] += bool(packet.size and not packet.is_discard)
                    try:
                        yield from packet.decode()
                    except self._av.FFmpegError:
                        tally["bad"] += 1
            except self._av.FFmpegError:
                tally["bad"] += 1
                with contextlib.suppress(self._av.FFmpegError):
                    yield from stream.decode(None)

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        given = 0
        if self._index is not None and unique:
            given = yield from self._from_segments(unique, stop)
            if given < len(unique) and not stop.is_set():
                self._renumber(unique, given, stop)
        if given < len(unique) and not stop.is_set():
            yield from self._from_start(unique[given:], stop)

    def _from_segments(self, unique: list[int], stop: threading.Event) -> Generator[tuple[int, np.ndarray], None, int]:
        """Decode only what the wanted frames need, until one differs from the index; the number that did not."""
        index = self._index
        assert index
        segments = _merge((index.start[i], index.packet[i]) for i in unique)
        missing = {index.pts[i]: i for i in unique}
        todo = deque(unique)
        early: dict[int, np.ndarray] = {}
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
                    # Segments are in the order of the file, frames in the order in which they are shown.
                    while todo and todo[0] in early:
                        number = todo.popleft()
                        yield number, early.pop(number)
                if stop.is_set() or not todo:
                    break
        except self._av.FFmpegError as error:
            log.debug("%s: %s", self.path, error)
        return len(unique) - len(todo)

    def _renumber(self, unique: list[int], given: int, stop: threading.Event) -> None:
        """Find the frames by decoding. The first `given` of `unique` must keep their numbers."""
        log.info("%s: its frames differ from its packets, decoding from the start", self.path)
        indexed = self._pts
        _, stamps, bad = self._scan_frames(stop)
        if stop.is_set():
            return
        self._index = None
        if stamps and len(stamps) < len(indexed) and set(stamps) <= set(indexed) and (times := _sorted_times(stamps)):
            self._served = [min(bisect_left(times, pts), len(times) - 1) for pts in _sorted_times(indexed)]
            self._report_damage(
                f"{len(stamps)} of its {len(indexed)} frames can be decoded; where one is missing, the next is taken"
            )
            return
        self._pts, self.total, self._timed = stamps, len(stamps), _are_times(stamps, self._time_base)
        self._report_bad(bad)
        if unique[-1] >= self.total:
            raise VideoError(
                f"{self.path} is damaged: only {self.total} of {len(indexed)} frames can be decoded; "
                "copy or download it again"
            )
        if any(self._pts[i] != indexed[i] for i in unique[:given]):
            raise RenumberedError(
                f"{self.path} is damaged and its frames differ from its packets: read it again, "
                "with the numbers that the frames have now"
            )

    def _decode_segments(
        self, segments: list[tuple[int, int]], wanted: set[int]
    ) -> Iterator[tuple[int, Iterable[Any]]]:
        """Yield (first packet of the segment, frames) for runs of packets [first, last] in the order of the file.

        Frames of packets that are not in `wanted` may be missing.
        """
        todo = iter(segments)
        start, stop = next(todo)
        with open_stream(self._av, self.path) as (container, stream):
            skips = _can_skip(stream.codec_context)
            packets = (p for p in demux(container, stream) if p.size)
            for position, packet in enumerate(packets):
                if position >= start:
                    if skips:
                        stream.codec_context.skip_frame = "DEFAULT" if position in wanted else "NONREF"
                    yield start, packet.decode()
                if position < stop:
                    continue
                # Draining returns the last wanted frame without decoding what follows it.
                yield start, stream.decode(None)
                stream.codec_context.flush_buffers()
                following = next(todo, None)
                if following is None:
                    return
                start, stop = following

    def _from_start(self, unique: list[int], stop: threading.Event) -> Numbered:
        numbers: dict[int, list[int]] = {}
        for number in unique:
            numbers.setdefault(self._served[number] if self._served else number, []).append(number)
        convert = self._converter()
        for position, frame in enumerate(self.decode_all()):
            if stop.is_set():
                return
            if wanted := numbers.pop(position, None):
                rgb = convert(frame)
                yield from ((number, rgb) for number in wanted)
            if not numbers:
                return
        raise VideoError(f"{self.path}: frame {unique[-1]} of {self.total} can no longer be decoded")

    def _converter(self) -> Callable[[Any], np.ndarray]:
        """A function from a decoded frame to upright RGB [H, W, 3]."""
        to_rgb = rgb_converter(self._av)
        return lambda frame: self._orientation.upright(to_rgb(frame, self._coded_size))

    def _time(self, index: int) -> float:
        if not self._timed:
            return super()._time(index)
        return float((cast(int, self._pts[index]) - cast(int, self._pts[0])) * self._time_base)

    def _report_bad(self, packets: int, lost: float = 0.0) -> None:
        gap = f"about {lost:.2f} s of it are missing" if lost else ""
        bad = f"{packets} of its packets cannot be decoded, {len(self._pts)} frames can" if packets else ""
        if (gap or bad) and self._pts:
            self._report_damage("; ".join(filter(None, (gap, bad))))

    def _report_damage(self, what: str) -> None:
        if self.damage is None:
            log.warning("%s is damaged: %s", self.path, what)
        self.damage = what


def _why_none(path: Path, sized: bool) -> str:
    head = path.read_bytes()[:64] if path.is_file() else b""
    if head[8:12] == b"WEBP" and b"ANIM" in head:
        return "this FFmpeg cannot read animated WebP; convert it to GIF or MP4, or install PyAV 19"
    return instead_of_none(sized)


def _index_frames(packets: Sequence[tuple[int | None, bool, bool, bool]], reorders: bool) -> _Index | None:
    """The index of (pts, key, discard, corrupt) packets, or None if their time stamps are not reliable."""
    stamps = [pts for pts, *_ in packets if pts is not None]
    if not packets or len(set(stamps)) < len(packets) or not packets[0][1]:
        return None
    if any(corrupt for *_, corrupt in packets):
        return None
    # A container without presentation times (AVI) has decode times instead, which are wrong if frames are reordered.
    if reorders and stamps == sorted(stamps):
        return None
    key_stamps = [pts for pts, (_, key, *_) in zip(stamps, packets) if key]
    if key_stamps != sorted(key_stamps):  # several files joined, each with its own clock
        return None
    keys: list[tuple[int, int]] = []
    shown = []
    for position, (pts, (_, key, discard, _)) in enumerate(zip(stamps, packets)):
        if key:
            keys.append((pts, position))
        if not discard:
            # Frames shown before their key frame (open GOP) refer to the previous group: start at its key frame.
            start = next((at for key_pts, at in reversed(keys) if key_pts <= pts), 0)
            shown.append((pts, position, start))
    if not shown:
        return None
    return _Index(*(list(column) for column in zip(*sorted(shown))))


def _lost(packets: Sequence[tuple[int | None, bool]], unit: Fraction) -> float:
    """Seconds that are missing in gaps between (dts, corrupt) packets.

    A gap is a step that is too long by half a frame or more, within two packets of one that FFmpeg marks as corrupt, as
    it does after a break in a transport stream's continuity. Both are required, since files are joined and rates vary.
    In a step longer than `_LONGEST` a clock was set.
    """
    timed = [(dts, corrupt) for dts, corrupt in packets if dts is not None]
    steps = [b - a for (a, _), (b, _) in pairwise(timed)]
    onward = sorted(step for step in steps if step > 0)
    if not onward:
        return 0.0
    usual = onward[len(onward) // 2]
    near = {at for i, (_, corrupt) in enumerate(timed) if corrupt for at in range(i - 1, i + 2)}
    long = (steps[at] for at in near if 0 <= at < len(steps) and 1.5 * usual <= steps[at] <= _LONGEST / unit)
    return float(sum(step - usual for step in long) * unit)


def _are_times(stamps: Sequence[int | None], unit: Fraction) -> bool:
    """Whether all time stamps exist, ascend (not in AVI) and do not jump (not in joined files)."""
    times = _sorted_times(stamps)
    return len(times) == len(stamps) and all((b - a) * unit <= _LONGEST for a, b in pairwise(times))


def _sorted_times(stamps: Sequence[int | None]) -> list[int]:
    """The time stamps, if all exist and none is less than the one before; else an empty list."""
    times = [pts for pts in stamps if pts is not None]
    return times if len(times) == len(stamps) and times == sorted(times) else []


def _can_skip(context: Any) -> bool:
    """Whether every packet is a frame, and frames that are marked as no reference can be skipped.

    HEVC marks by temporal layer only, and the two fields of an interlaced frame may be two packets.
    """
    return context.name == "h264" and getattr(context, "field_order", None) == _PROGRESSIVE


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs [first, last], sorted, with adjacent and overlapping ones merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged

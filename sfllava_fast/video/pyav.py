"""Frame-exact reading with PyAV, versions 14.1 to 19."""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RenumberedError, VideoError
from .base import Numbered, Video, check_pixels, import_package, log, max_pixels, reason

# FFmpeg has formats that are lists of other files, or devices, or code: what holds pictures itself is named here.
FORMATS = (
    "3g2,3gp,apng,asf,avi,av1,avs2,avs3,bmp_pipe,cavsvideo,dds_pipe,dirac,dnxhd,dpx_pipe,dv,evc,exr_pipe,flic,flv,gif,"
    "gif_pipe,gxf,h261,h263,h264,hdr_pipe,hevc,ico,ivf,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_anim,jpegxl_pipe,live_flv,"
    "m4v,matroska,mjpeg,mjpeg_2000,mov,mp4,mpeg,mpegts,mpegvideo,mpjpeg,mxf,nut,obu,ogg,pam_pipe,pbm_pipe,pcx_pipe,"
    "pgm_pipe,pgmyuv_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,rm,sgi_pipe,sunrast_pipe,swf,tiff_pipe,vc1,vvc,webm,"
    "webp_anim,webp_pipe,wtv,xbm_pipe,xpm_pipe,xwd_pipe,yuv4mpegpipe,"
    "aac,ac3,aiff,amr,caf,flac,mp3,w64,wav"  # sound: to say that there is only that
)
_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
_LONGEST = 300  # seconds that a frame may be shown
_GAPS = 10_000  # stretches without a packet, a millisecond each at least, that are read over
_SIDE_DATA = 48  # kinds of it, at most
_UNREADABLE_HERE = 22  # EINVAL: what FFmpeg says of a format that is not among those allowed


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

    Damage: what ffmpeg can decode is used. Frames found missing while the video is opened have no number; in the
    place of one found missing later stands the next that there is, or the last. `damage` and the log say so.
    """

    decoder = "pyav"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._av = import_package("av", "pyav")
        self._threads = True
        self._served: list[int] | None = None  # by frame, the decoded one that stands for it
        with open_stream(self._av, path) as (container, stream):
            self._time_base = Fraction(stream.time_base)
            rate = frame_rate(stream)
            self.fps = float(rate) if rate else None
            sized = bool(stream.width)
            first, self._index, lost = self._scan_packets(container, stream)
        if self._index is None:
            first, self._pts, bad = self._scan_frames(threading.Event())
            self._tell_bad(bad, lost)
        else:
            self._pts = self._index.pts
        if first is None:
            raise VideoError(
                f"{path} has a video stream but none of its frames can be decoded: {_why_none(path, sized)}"
            )
        self._timed = _are_times(self._pts, self._time_base)
        self._coded_size = first.height, first.width
        check_pixels(path, self._coded_size)
        self._orientation = orientation(self._av, first)
        self.size = self._coded_size[::-1] if self._orientation.transposed else self._coded_size

    @property
    def total(self) -> int:
        return len(self._pts)

    def _scan_packets(self, container: Any, stream: Any) -> tuple[Any, _Index | None, float]:
        """The first frame shown, the index (None where packets cannot tell which frames there are), seconds lost."""
        first, packets, decoded = None, [], []
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
        """By decoding, unless stopped: the first frame or None, all time stamps, how many packets are bad.

        Threads of a decoder lose more than the damaged frame: where frames are missing, one counts again.
        """
        while True:
            first, stamps, tally = None, [], Counter()
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
        """Every frame in the order shown, stepping over packets that do not decode.

        tally: counts "packets" that should be frames, and "bad" ones.
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
        """Find by decoding which frames there are; the `given` first of `unique` must keep their numbers."""
        log.info("%s: its frames are not those its packets announce, decoding from the start", self.path)
        indexed = self._pts
        _, stamps, bad = self._scan_frames(stop)
        if stop.is_set():
            return
        self._index = None
        if stamps and len(stamps) < len(indexed) and stamps == sorted(stamps) and set(stamps) <= set(indexed):
            self._served = [min(bisect_left(stamps, pts), len(stamps) - 1) for pts in indexed]
            self._tell_damage(
                f"{len(stamps)} of its {len(indexed)} frames can be decoded; where one is missing, the next is taken"
            )
            return
        self._pts, self._timed = stamps, _are_times(stamps, self._time_base)
        self._tell_bad(bad)
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
            packets = (p for p in demux(container, stream) if p.size)
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
        """A function from a decoded frame to RGB [H, W, 3], turned upright."""
        to_rgb = rgb_converter(self._av)
        return lambda frame: self._orientation.upright(to_rgb(frame, self._coded_size))

    def _time(self, index: int) -> float:
        return float((self._pts[index] - self._pts[0]) * self._time_base) if self._timed else index / self.fps

    def _tell_bad(self, packets: int, lost: float = 0.0) -> None:
        gap = f"about {lost:.2f} s of it are missing" if lost else ""
        bad = f"{packets} of its packets cannot be decoded, {len(self._pts)} frames can" if packets else ""
        if (gap or bad) and self._pts:
            self._tell_damage("; ".join(filter(None, (gap, bad))))

    def _tell_damage(self, what: str) -> None:
        if self.damage is None:
            log.warning("%s is damaged: %s", self.path, what)
        self.damage = what


@contextlib.contextmanager
def open_stream(av: Any, path: Path, threads: bool = True) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, decoded by several threads or by one."""
    try:
        # A relative name may look like a protocol of FFmpeg: 12:30.mp4.
        container = open_container(av, str(path.absolute()))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path} is not a readable video: {why_unreadable(error)}") from error
    with container:
        stream = picture_stream(av, container, path)
        if threads:
            stream.thread_type = "AUTO"
        else:
            stream.codec_context.thread_count = 1
        yield container, stream


def open_container(av: Any, file: Any, formats: str = FORMATS, **options: Any) -> Any:
    """av.open as every version has it, of these formats only.

    Metadata need not be UTF-8: version 19 asks nothing, older ones would raise.
    """
    if int(av.__version__.split(".")[0]) < 19:
        options["metadata_errors"] = "ignore"
    limits = {"format_whitelist": formats, "max_pixels": str(max_pixels())}
    return av.open(file, **options | {"options": limits | options.get("options", {})})


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """container.demux, that reads on where FFmpeg found no packet for a while and says "again", which PyAV raises."""
    gaps = 0
    while True:
        try:
            for packet in container.demux(stream):
                gaps = 0
                yield packet
            return
        except BlockingIOError:
            gaps += 1
            if gaps > _GAPS:
                raise
            time.sleep(0.001)


def frame_rate(stream: Any) -> Fraction | None:
    """Frames a second that a stream announces: None or, from PyAV 19 on, a false value where it does not."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else None


def picture_stream(av: Any, container: Any, name: object) -> Any:
    """The default video stream of a container, of several the one with the largest pictures; it is not decoded yet.

    Raises VideoError, with its name, where there is none, or its pictures are larger than `max_pixels`.
    """
    kinds = av.stream.Disposition
    streams = [s for s in container.streams.video if not s.disposition & kinds.attached_pic]
    if not streams:
        kind = "only sound" if container.streams.audio else "no video stream"
        raise VideoError(f"{name} has {kind}: name a file with pictures")
    streams = [s for s in streams if s.codec_context]
    if not streams:
        raise VideoError(f"{name} uses a codec that PyAV cannot decode: re-encode it as H.264")
    stream = max(streams, key=lambda s: (bool(s.disposition & kinds.default), (s.width or 0) * (s.height or 0)))
    check_pixels(name, (stream.height or 0, stream.width or 0))
    stream.codec_context.options = {"max_pixels": str(max_pixels())}  # for sizes that are known later, or change
    return stream


def rgb_converter(av: Any) -> Callable[[Any, tuple[int, int]], np.ndarray]:
    """A function from a decoded frame and a size (height, width) to uint8 RGB [H, W, 3] of that size.

    The conversion is ffmpeg's own: its scale filter with the flags that the ffmpeg command gives it. (Beside it, PyAV's
    reformat takes fields for pictures of half the height, moves the chroma of 10-bit frames, and has other defaults.)
    """
    graphs: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def convert(frame: Any, size: tuple[int, int]) -> np.ndarray:
        key = *_kind(frame), *size
        if key not in graphs:
            graphs.clear()
            scale = "scale", f"h={size[0]}:w={size[1]}:flags=bicubic"
            graphs[key] = _graph(av, *_kind(frame), scale, ("format", "rgb24"))
        _, source, sink = graphs[key]
        source.push(frame)
        return sink.pull().to_ndarray()

    return convert


def _kind(frame: Any) -> tuple[int, int, str, int, int]:
    return frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range)


def _graph(
    av: Any, width: int, height: int, pixels: str, matrix: int, levels: int, *filters: tuple[str, str]
) -> tuple[Any, Any, Any]:
    """(graph, source, sink) of FFmpeg's filters; the graph has to be held as long as the others."""
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):
        graph.threads = 1  # the decoder's threads have the cores already
    source = graph.add(
        "buffer", f"video_size={width}x{height}:pix_fmt={pixels}:time_base=1/1000:colorspace={matrix}:range={levels}"
    )
    sink = graph.add("buffersink")
    graph.link_nodes(source, *(graph.add(*one) for one in filters), sink).configure()
    return graph, source, sink


class Orientation(NamedTuple):
    """How a frame is put upright: rows and columns exchanged, then columns and rows reversed."""

    transposed: bool
    right_to_left: bool
    upside_down: bool

    def upright(self, rgb: np.ndarray) -> np.ndarray:
        """RGB [H, W, 3] as it is shown, contiguous."""
        rgb = rgb.transpose(1, 0, 2) if self.transposed else rgb
        return np.ascontiguousarray(rgb[:: -1 if self.upside_down else 1, :: -1 if self.right_to_left else 1])


def orientation(av: Any, frame: Any) -> Orientation:
    """By the display matrix of a frame, which may mirror it as well: phones do, and EXIF of images.

    The matrix [a b u, c d v, x y w] shows the pixel (x, y) at (a x + c y, b x + d y).
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        matrix = _known_side_data(av, frame).get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation(False, False, False)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def _known_side_data(av: Any, frame: Any) -> Any:
    """PyAV 17 and 18 give no side data of a frame that has some of a kind unknown to them, such as EXIF."""
    unknown = [("sidedata", f"mode=delete:type={kind}") for kind in range(_SIDE_DATA) if not _is_known(av, kind)]
    graph, source, sink = _graph(av, *_kind(frame), *unknown)
    source.push(frame)
    return sink.pull().side_data


def _is_known(av: Any, kind: int) -> bool:
    try:
        av.sidedata.sidedata.Type(kind)
    except ValueError:
        return False
    return True


def why_unreadable(error: Exception) -> str:
    if getattr(error, "errno", None) == _UNREADABLE_HERE:
        return "it is in no format of videos or images that is read here (lists of files are not); re-encode it as MP4"
    return reason(error)


def _why_none(path: Path, sized: bool) -> str:
    head = path.read_bytes()[:64] if path.is_file() else b""
    if head[8:12] == b"WEBP" and b"ANIM" in head:
        return "this FFmpeg cannot read animated WebP; convert it to GIF or MP4, or install PyAV 19"
    return instead_of_none(sized)


def instead_of_none(sized: bool) -> str:
    """What to do about a video without a frame that can be decoded, which says the size of its pictures or does not."""
    if sized:
        return "re-encode it"
    return f"re-encode it; or set SFLLAVA_FAST_MAX_PIXELS, if it has frames of more than {max_pixels()} pixels"


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
    key_stamps = [pts for pts, key, *_ in packets if key]
    if key_stamps != sorted(key_stamps):  # a file joined of several, each with its own clock
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


def _lost(packets: Sequence[tuple[int | None, bool]], unit: Fraction) -> float:
    """Seconds that gaps among (dts, corrupt) packets have lost.

    A gap is a step half a frame or more too long, within two of a packet marked as corrupt: so FFmpeg marks a break in
    a transport stream's continuity. Neither tells alone: files are joined, and rates vary. Beyond `_LONGEST` a clock
    was set.
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
    """Whether time stamps are all there and go on: not those of AVI, which go back, nor of joined files, which jump."""
    return None not in stamps and all(0 <= (b - a) * unit <= _LONGEST for a, b in pairwise(stamps))


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

"""Frames of a video by their number: PyAV (exact on every container), decord, or a folder of images.

Frames are numbered in the order they are shown, from 0. Which ones to take is `config.sample_frames`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import operator
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import BackendError, InputError, RenumberedError, VideoError

log = logging.getLogger("sfllava_fast")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
Numbered = Generator[tuple[int, torch.Tensor], None, None]  # (number, frame), as `Video.stream` gives them
_DECORD_BATCH = 8
_READERS = 8  # threads that read a folder of images, at most
_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
_OUTPUT_CORRUPT = 1 << 3  # AV_CODEC_FLAG_OUTPUT_CORRUPT: show what ffmpeg shows when a stream starts mid-GOP.


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

    def frames(self, indices: Iterable[int]) -> torch.Tensor:
        """uint8 RGB [n, H, W, 3], in the order asked; numbers may repeat.

        Raises InputError for a number outside 0 .. total - 1, VideoError where decoding fails.
        """
        wanted = [self._check(i) for i in indices]
        rows = torch.empty(len(wanted), *self.size, 3, dtype=torch.uint8)
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(wanted):
            rows_of.setdefault(number, []).append(row)
        try:
            self._fill(rows, rows_of)
        except RenumberedError:
            self._fill(rows, rows_of)
        return rows

    def stream(self, indices: Iterable[int], stop: threading.Event | None = None) -> Numbered:
        """(number, frame) of each number asked, once, in ascending order, as soon as it is decoded.

        A frame is uint8 RGB [H, W, 3], to be read and not written: its memory may be the decoder's. Closing the
        iterator frees the decoder; setting `stop`, from any thread, ends it at the next packet.

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

    def _fill(self, rows: torch.Tensor, rows_of: dict[int, list[int]]) -> None:
        for number, frame in self.stream(rows_of):
            for row in rows_of[number]:
                rows[row] = frame

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        raise NotImplementedError

    def _time(self, index: int) -> float:
        return index / self.fps


class FolderVideo(Video):
    """A folder of image frames in natural order (frame2 before frame10), read with Pillow."""

    decoder = "images"
    fps = None

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names = (
            p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
        self._files = sorted(names, key=_natural)
        if not self._files:
            raise VideoError(
                f"{path} holds no image frames: name a video file, or a folder of .jpg or .png frames"
            )
        self.total = len(self._files)
        self.size = tuple(self._load(0).shape[:2])

    def _load(self, index: int) -> torch.Tensor:
        from PIL import Image, ImageOps

        file = self._files[index]
        try:
            with Image.open(file) as image:
                return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise VideoError(f"cannot read the frame {file}: {_one_line(error)}") from error

    def _load_alike(self, index: int) -> torch.Tensor:
        image = self._load(index)
        if image.shape[:2] != self.size:
            raise VideoError(
                f"{self._files[index]} is {_wide(image.shape)}, the first frame {_wide(self.size)}: "
                "the frames of a folder must be of one size"
            )
        return image

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        workers = min(torch.get_num_threads(), _READERS)
        pool, ahead = ThreadPoolExecutor(workers, "sfllava-read"), deque()
        todo = iter(unique)
        try:
            for index in unique:
                ahead.extend(pool.submit(self._load_alike, i) for i in islice(todo, workers + 1 - len(ahead)))
                if stop.is_set():
                    return
                yield index, ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class MemoryVideo(Video):
    """Frames that are decoded already: uint8 RGB [T, H, W, 3]."""

    decoder = "memory"
    fps = None

    def __init__(self, frames: torch.Tensor | np.ndarray) -> None:
        super().__init__(Path("frames"))
        self._frames = as_frames(frames).cpu()
        self.total, *size = frames.shape[:3]
        self.size = tuple(size)

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        yield from ((number, self._frames[number]) for number in unique)


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
        with _open(self._av, path) as (container, stream):
            self._time_base = stream.time_base
            rate = stream.average_rate or stream.guessed_rate
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
        for frame in self._decode_all(warn=True):
            if stop.is_set():
                return None
            first = first or frame
            stamps.append(frame.pts)
        self._index, self._pts = None, stamps
        return first

    def _decode_all(self, warn: bool = False) -> Iterator[Any]:
        """Every frame in the order shown, stepping over packets that do not decode."""
        bad = 0
        with _open(self._av, self.path) as (container, stream):
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
    ) -> Generator[tuple[int, torch.Tensor], None, int]:
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
        with _open(self._av, self.path) as (container, stream):
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
        for index, frame in enumerate(self._decode_all()):
            if stop.is_set():
                return
            if index in wanted:
                yield index, convert(frame)
            if index == unique[-1]:
                return
        raise VideoError(f"{self.path}: frame {unique[-1]} of {self.total} can no longer be decoded")

    def _converter(self) -> Callable[[Any], torch.Tensor]:
        """A function from a decoded frame to RGB [H, W, 3], turned upright."""
        to_rgb = rgb_converter(self._av)
        return lambda frame: to_rgb(frame, self._coded_size, self._rotation)

    def _time(self, index: int) -> float:
        pts, first = self._pts[index], self._pts[0]
        return index / self.fps if pts is None or first is None else float((pts - first) * self._time_base)


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
        with contextlib.suppress(BackendError), _open(import_package("av", "decord"), path):
            pass
        try:
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
            self.total = len(self._reader)
            self.fps = float(self._reader.get_avg_fps())
            height, width, _ = self._reader[0].shape
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise VideoError(f"decord cannot read {path}: {reason(error)}; try --decoder pyav") from error
        self.size = (height, width)
        self._error = decord.DECORDError

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        for start in range(0, len(unique), _DECORD_BATCH):
            numbers = unique[start : start + _DECORD_BATCH]
            try:
                frames = torch.from_numpy(self._reader.get_batch(numbers).asnumpy())
            except (self._error, RuntimeError) as error:
                raise VideoError(
                    f"decord cannot decode {self.path}: {reason(error)}; try --decoder pyav"
                ) from error
            if stop.is_set():
                return
            yield from zip(numbers, frames)


DECODERS: dict[str, Callable[[Path], Video]] = {"pyav": PyavVideo, "decord": DecordVideo}
_MODULES = {"pyav": ("av",), "decord": ("decord", "av")}


def import_decoder(decoder: str) -> None:
    """Import what a decoder needs, once, so that timings can leave that out.

    Raises BackendError for a decoder that is unknown or not installed.
    """
    if decoder not in DECODERS:
        raise BackendError(f"unknown decoder {decoder!r}: choose one of {', '.join(DECODERS)}")
    for module in _MODULES[decoder]:
        import_package(module, decoder)


Source = str | os.PathLike[str] | torch.Tensor | np.ndarray | Video


def as_frames(frames: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Frames in memory as a tensor; InputError unless they are uint8 RGB [T, H, W, 3], one or more."""
    if isinstance(frames, np.ndarray):
        frames = torch.as_tensor(np.ascontiguousarray(frames))  # torch has no negative strides
    if not isinstance(frames, torch.Tensor):
        raise InputError(f"frames must be uint8 RGB [T, H, W, 3], not {type(frames).__name__}")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise InputError(
            f"frames must be uint8 RGB [T, H, W, 3], not {str(frames.dtype).removeprefix('torch.')} "
            f"{list(frames.shape)}"
        )
    return frames


def open_video(video: Source, decoder: str = "pyav") -> Video:
    """Open a video file, a folder of image frames (read with Pillow under every decoder), or frames in memory (uint8
    RGB [T, H, W, 3]); an opened Video comes back as it is.

    Raises VideoError for anything without readable frames, InputError for frames of another kind, BackendError for a
    decoder that is unknown or not installed; each in one line.
    """
    if isinstance(video, Video):
        return video
    if isinstance(video, (torch.Tensor, np.ndarray)):
        return MemoryVideo(video)
    if not isinstance(video, (str, os.PathLike)):
        raise InputError(f"a video is a file, a folder or frames [T, H, W, 3], not {type(video).__name__}")
    if decoder not in DECODERS:
        raise BackendError(f"unknown decoder {decoder!r}: choose one of {', '.join(DECODERS)}")
    path = Path(video)
    if path.is_dir():
        return FolderVideo(path)
    size = check_file(path)
    declared = _declared_bytes(path)
    if declared > size:
        raise VideoError(_truncated(path, size, declared))
    return DECODERS[decoder](path)


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


@contextlib.contextmanager
def _open(av: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, threads on."""
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path} is not a readable video: {reason(error)}") from error
    with container:
        stream = picture_stream(av, container, path)
        stream.thread_type = "AUTO"
        stream.codec_context.flags |= _OUTPUT_CORRUPT
        yield container, stream


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


def rgb_converter(av: Any) -> Callable[[Any, tuple[int, int], int], torch.Tensor]:
    """A function from a decoded frame, its size (height, width) as coded and the quarter turns that put it upright, to
    uint8 RGB [H, W, 3]."""
    from av.video.reformatter import VideoReformatter

    reformat = VideoReformatter().reformat
    # The decoder's threads have the cores already; before version 17 there was one thread anyway.
    threads = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def convert(frame: Any, size: tuple[int, int], turns: int) -> torch.Tensor:
        rgb = reformat(frame, size[1], size[0], "rgb24", **threads).to_ndarray()
        return torch.from_numpy(np.rot90(rgb, turns).copy() if turns else rgb)

    return convert


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


def _declared_bytes(path: Path) -> int:
    """Bytes that an MP4, AVI or Matroska file says it has; 0 where its header does not tell."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            return 8 + int.from_bytes(head[4:8], "little")
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_bytes(head)
        return _mp4_bytes(file) if head[4:8] == b"ftyp" else 0


def _mp4_bytes(file: Any) -> int:
    """End of the last top-level box."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if len(head) < 8 or size < 8:
            return at
        at += size


def _matroska_bytes(head: bytes) -> int:
    """End of the Segment element; 0 where it is of unknown length, as in a live recording."""
    size, at = _ebml_size(head, 4)
    at += size
    if head[at : at + 4] != b"\x18S\x80g":
        return 0
    size, at = _ebml_size(head, at + 4)
    return at + size if size else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of an EBML variable-length size; all ones mean unknown and read as 0."""
    length = 9 - data[at].bit_length()
    bits = 7 * length
    value = int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + length


def _truncated(path: Path, size: int, declared: int) -> str:
    """What is wrong with a file that ends before its own header says, with the frames that are left."""
    try:
        video = PyavVideo(path)
        with _open(video._av, path) as (container, stream):
            announced = stream.frames or round((container.duration or 0) / 1e6 * (video.fps or 0))
        left = sum(1 for _ in video._decode_all())
        frames = f"{left} of {announced} frames" if announced else f"{left} frames"
    except (VideoError, BackendError):
        frames = "no frame"
    short = f"{path} is cut short ({size} of {declared} bytes)"
    return f"{short}: {frames} can be decoded; copy or download it again"


def quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that put a frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def import_package(module: str, decoder: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"decoder {decoder} needs the package {module}, which cannot be imported "
            f"({_one_line(error)}): pip install 'sfllava_fast[video]'"
        ) from error


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _wide(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def reason(error: Exception) -> str:
    """The readable half of a decoder's message."""
    return getattr(error, "strerror", None) or _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

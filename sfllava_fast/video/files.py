"""Opening of videos: files, folders of images, frames in memory."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, Union

import numpy as np

from ..errors import BackendError, InputError, VideoError, dtype_name
from .base import Numbered, Video, as_tensor, check_file, check_limits, hide_password, import_package, is_url
from .container import open_stream
from .decord import DecordVideo
from .folder import FolderVideo
from .headers import declared_bytes
from .pyav import PyavVideo

if TYPE_CHECKING:
    from torch import Tensor


class FramesVideo(Video):
    """Frames in memory: uint8 RGB [T, H, W, 3]."""

    decoder = "memory"
    fps = None

    def __init__(self, frames: Tensor | np.ndarray) -> None:
        super().__init__(Path("frames"))
        _check_frames(frames)
        self._frames = _for_torch(frames) if isinstance(frames, np.ndarray) else frames.cpu().numpy()
        self.total, height, width = frames.shape[:3]
        self.size = height, width

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        yield from ((number, self._frames[number]) for number in unique)


DECODERS: dict[str, Callable[[Path], Video]] = {"pyav": PyavVideo, "decord": DecordVideo}
_MODULES = {"pyav": ("av",), "decord": ("decord", "av")}
Source = Union[str, os.PathLike, "Tensor", np.ndarray, Video]


def import_decoder(decoder: str) -> None:
    """Import a decoder's packages, so that a later timing does not include it.

    Raises:
        BackendError: If the decoder is unknown or not installed.
    """
    if decoder not in DECODERS:
        raise BackendError(f"unknown decoder {decoder!r}: choose one of {', '.join(DECODERS)}")
    for module in _MODULES[decoder]:
        import_package(module, decoder)


def as_frames(frames: Tensor | np.ndarray) -> Tensor:
    """Frames in memory as a tensor. Raises InputError unless they are uint8 RGB [T, H, W, 3] with T of at least 1."""
    _check_frames(frames)
    if not isinstance(frames, np.ndarray):
        return frames
    return as_tensor(_for_torch(frames))


def _check_frames(frames: Any) -> None:
    if not _is_frames(frames):
        raise InputError(f"frames must be uint8 RGB [T, H, W, 3], not {type(frames).__name__}")
    dtype = dtype_name(frames.dtype)
    if dtype != "uint8" or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise InputError(f"frames must be uint8 RGB [T, H, W, 3], not {dtype} {list(frames.shape)}")


def _for_torch(array: np.ndarray) -> np.ndarray:
    """A contiguous, writable array: torch has no negative strides, and warns of read-only memory."""
    return np.require(array, requirements=("C", "W"))


def _is_frames(video: object) -> TypeGuard[Tensor | np.ndarray]:
    """Whether it is an array or a tensor. Does not import torch: there is no tensor before that."""
    torch = sys.modules.get("torch")
    return isinstance(video, np.ndarray) or (torch is not None and isinstance(video, torch.Tensor))


def open_video(video: Source, decoder: str = "pyav") -> Video:
    """Open a video.

    Args:
        video: A video file, a folder of image frames, or frames in memory, uint8 RGB [T, H, W, 3]. A Video is returned
            unchanged.
        decoder: "pyav", or "decord" as in the published pipeline. Pillow reads folders with either: in natural order,
            but for "decord" by name, 10.jpg before 2.jpg, as the published pipeline sorts.

    Raises:
        VideoError: If there are no readable frames.
        InputError: If frames in memory have another shape or dtype.
        BackendError: If the decoder is unknown or not installed.
    """
    if isinstance(video, Video):
        return video
    if _is_frames(video):
        return FramesVideo(video)
    if not isinstance(video, (str, os.PathLike)):
        raise InputError(f"a video is a file, a folder or frames [T, H, W, 3], not {type(video).__name__}")
    if decoder not in DECODERS:
        raise BackendError(f"unknown decoder {decoder!r}: choose one of {', '.join(DECODERS)}")
    text = os.fsdecode(video)
    if is_url(text) and not os.path.exists(text):
        raise VideoError(f"{hide_password(text)} is a URL: use `watch`, or download it")
    path = Path(text)
    if os.path.isdir(text):
        return FolderVideo(path, by_name=decoder == "decord")
    check_limits()
    size = check_file(path)
    declared = declared_bytes(path)
    if declared > size:
        _check_whole(path, size, declared)
    return DECODERS[decoder](path)


def _check_whole(path: Path, size: int, declared: int) -> None:
    """Raise VideoError for a file that is shorter than its header declares, unless it has all frames."""
    try:
        video = PyavVideo(path)
        with open_stream(import_package("av", "pyav"), path) as (container, stream):
            declared_frames = stream.frames or round((container.duration or 0) / 1e6 * (video.fps or 0))
        left = sum(1 for _ in video.decode_all())
        frames = f"{left} of {declared_frames} frames" if declared_frames else f"{left} frames"
        if left >= declared_frames > 0:
            return
    except VideoError:
        frames = "no frame"
    short = f"{path} is cut short ({size} of {declared} bytes)"
    raise VideoError(f"{short}: {frames} can be decoded; copy or download it again")

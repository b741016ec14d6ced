"""A folder of image frames, read with Pillow."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import VideoError
from .base import Numbered, Video, check_file, check_pixels, one_line, wide

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # others, such as EPS, may start programs, under any file name
_READERS = 8  # maximum number of threads
_WHITE_16 = 65535


class FolderVideo(Video):
    """A folder of image frames, in natural order: frame2 before frame10.

    Args:
        path: The folder.
        by_name: Whether to sort by name, frame10 before frame2, as the published pipeline does.
    """

    decoder = "images"
    fps = None

    def __init__(self, path: Path, by_name: bool = False) -> None:
        super().__init__(path)
        names = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        self._files = sorted(names, key=None if by_name else _natural)
        if not self._files:
            raise VideoError(f"{path} has no image frames: name a video file, or a folder of .jpg or .png frames")
        self.total = len(self._files)
        height, width, _ = self._load(0).shape
        self.size = height, width

    def _load(self, index: int) -> np.ndarray:
        from PIL import Image, ImageOps

        file = self._files[index]
        check_file(file)
        try:
            with file.open("rb") as stream, _open_image(stream) as image:
                check_pixels(file, image.size[::-1])
                return _rgb(ImageOps.exif_transpose(image))
        except VideoError:
            raise
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise VideoError(f"{file} has more pixels than Pillow's own limit, {limit}") from error
        except Exception as error:  # Pillow's readers raise many types
            raise VideoError(f"cannot read the frame {file}: {one_line(error)}") from error

    def _load_alike(self, index: int) -> np.ndarray:
        image = self._load(index)
        if image.shape[:2] != self.size:
            raise VideoError(
                f"{self._files[index]} is {wide(image.shape)}, the first frame {wide(self.size)}: "
                "all frames of a folder must have one size"
            )
        return image

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        workers = min(_allowed_threads(), _READERS)
        pool = ThreadPoolExecutor(workers, "sfllava-read")
        ahead: deque[Future[np.ndarray]] = deque()
        todo = iter(unique)
        try:
            for index in unique:
                ahead.extend(pool.submit(self._load_alike, i) for i in islice(todo, workers + 1 - len(ahead)))
                if stop.is_set():
                    return
                yield index, ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _open_image(stream: Any) -> Any:
    """Image.open for `_FORMATS`, without Pillow's own limit of pixels: `check_pixels` has ours.

    Pillow's readers of WebP and TIFF still apply theirs.
    """
    from PIL import Image

    Image.init()
    head = stream.read(16)
    for make, accepts in (Image.OPEN[name] for name in _FORMATS if name in Image.OPEN):
        if accepts is not None and accepts(head) is True:
            stream.seek(0)
            return make(stream, "")
    raise ValueError(f"it is none of {', '.join(_FORMATS)}")


def _rgb(image: Any) -> np.ndarray:
    """uint8 [H, W, 3]. Values of 16 bits are scaled here: Pillow would clip them."""
    if not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB"))
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > _WHITE_16:
        raise ValueError(f"its values are not of 8 or 16 bits (mode {image.mode}): save it as PNG")
    grey = np.round(values / (_WHITE_16 / 255)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _allowed_threads() -> int:
    """torch's number of threads if torch is imported, else the number of CPUs."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else os.cpu_count() or 1


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]

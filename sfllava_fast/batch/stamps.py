"""Stamps that show whether files changed: names, sizes and modification times. No content is read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# The files that decide a checkpoint's answers.
_CHECKPOINT = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin", "reduction/*")


def stamp_video(video: str | os.PathLike[str]) -> str | None:
    """The stamp of a video file or a folder of frames.

    Args:
        video: A path. A copy with the same modification times has the same stamp.

    Returns:
        The stamp, or None if there is no such file.
    """
    with suppress(OSError, ValueError):  # ValueError: a null byte in the name
        if os.path.isdir(video):
            return _stamp(Path(video).iterdir(), Path(video))
        found = os.stat(video)
        return f"{found.st_size}-{found.st_mtime_ns}"
    return None


def stamp_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The stamp of a checkpoint's weights, config and tokenizer; None if `folder` is no local folder."""
    with suppress(OSError, ValueError):
        if os.path.isdir(folder):
            return _stamp((file for name in _CHECKPOINT for file in Path(folder).glob(name)), Path(folder))
    return None


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:  # a broken link, or a file that was deleted meanwhile
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _stamp(files: Iterable[Path], folder: Path) -> str:
    facts = sorted([str(file.relative_to(folder)), *_size_and_time(file)] for file in files)
    return f"{zlib.crc32(json.dumps(facts).encode()):08x}"

"""Whether files are those of before: by their names, sizes and times of change. No content is read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# What decides what a checkpoint answers; a note beside it does not.
_CHECKPOINT = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin", "reduction/*")


def stamp_video(video: str | os.PathLike[str]) -> str | None:
    """The stamp of a file, or of the files in a folder of frames; None if it is not here. A copy that keeps the times
    of change has the same."""
    with suppress(OSError, ValueError):  # a name that no file can have
        if os.path.isdir(video):
            return _stamp(Path(video).iterdir(), Path(video))
        found = os.stat(video)
        return f"{found.st_size}-{found.st_mtime_ns}"
    return None


def stamp_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The stamp of a checkpoint's weights, config and tokenizer; None for what is no folder here."""
    with suppress(OSError, ValueError):
        if os.path.isdir(folder):
            return _stamp((file for name in _CHECKPOINT for file in Path(folder).glob(name)), Path(folder))
    return None


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:  # a link that leads nowhere, or a file that is gone
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _stamp(files: Iterable[Path], folder: Path) -> str:
    told = sorted([str(file.relative_to(folder)), *_size_and_time(file)] for file in files)
    return f"{zlib.crc32(json.dumps(told).encode()):08x}"

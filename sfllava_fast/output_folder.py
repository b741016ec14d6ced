"""Output files: their folders are checked before anything is computed, and files are written atomically."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def check_folder(out: Path) -> None:
    """Raise InputError unless the folder of a file exists or can be made."""
    there = next(folder for folder in Path(os.path.abspath(out)).parents if os.path.lexists(folder))
    if not there.is_dir():
        raise InputError(f"cannot write {out}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {out}: {there} is not writable")


def make_folder(out: Path) -> None:
    """Make the folder of a file. Raises InputError if that fails."""
    check_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Context of a new file that replaces `out` at the end. Links are followed.

    Raises:
        InputError: If `out` exists and is not a regular file.
    """
    place = Path(os.path.realpath(out))
    if place.exists() and not place.is_file():
        raise InputError(f"{out} is not a regular file: name another")
    # A unique name, since other threads may write to the same place, and a link may exist there.
    part = place.with_name(f".sfllava-{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)

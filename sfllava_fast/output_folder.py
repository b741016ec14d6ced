"""Where an output goes: its folder, made where there is none and refused before anything is computed; its file,
written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def check_folder(out: Path) -> None:
    """InputError unless the folder of a file is there, or can be made."""
    there = next(folder for folder in Path(os.path.abspath(out)).parents if os.path.lexists(folder))
    if not there.is_dir():
        raise InputError(f"cannot write {out}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {out}: nothing can be written to {there}")


def make_folder(out: Path) -> None:
    """Make the folder of a file. Raises InputError where that cannot be done."""
    check_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A new file to write to, which is moved to `out` at the end: links are followed to the file that it replaces.

    Raises InputError for what is there and no regular file, such as a device.
    """
    place = Path(os.path.realpath(out))
    if place.exists() and not place.is_file():
        raise InputError(f"{out} is no regular file: name another")
    # A name of its own, whoever else writes to this place: two threads, or a link that lies there.
    part = place.with_name(f".sfllava-{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)

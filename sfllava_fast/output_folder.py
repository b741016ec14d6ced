"""Where an output goes: its folder, made where there is none and refused before anything is computed; the file, whole
or not at all."""

from __future__ import annotations

import os
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
    """A path to write to beside the file that `out` names, links followed; it takes that file's place in the end.

    Raises InputError where `out` is there and no regular file.
    """
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_file():  # a device or a pipe would be replaced
        raise InputError(f"cannot write {out}: it is no regular file")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)

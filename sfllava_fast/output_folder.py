"""The folder that an output goes into: made where there is none, and refused before anything is computed."""

from __future__ import annotations

import os
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

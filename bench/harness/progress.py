"""Which work is being measured, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(works: Collection[T]) -> Iterator[T]:
    """Yields the works; if stderr is a terminal, writes the name of each there before it is measured."""
    for number, work in enumerate(works, 1):
        if sys.stderr.isatty():
            print(f"{number} of {len(works)}: {work}", file=sys.stderr)
        yield work

"""An end for code of a checkpoint's, such as its chat template, that may have none of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TooLong(BaseException):
    """The time is over; no Exception, so that what runs cannot take it for one of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block once it has run so long, as soon as Python code of it goes on.

    It works in every thread, as signals do not; one call into C that takes long by itself is waited for. Functions are
    looked at where they are called, and line by line where they were made of text, as a template's are.
    """
    end, before = time.perf_counter() + seconds, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.perf_counter() > end:
            raise TooLong
        return trace if frame.f_code.co_filename.startswith("<") else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)

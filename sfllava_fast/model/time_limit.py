"""A time limit for code from a checkpoint, such as its chat template, which may not terminate."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TooLong(BaseException):
    """The time limit was exceeded. Not an Exception, so that the limited code does not catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context that raises TooLong at the next traced Python call or line after `seconds`.

    Unlike signals it works in every thread. It does not interrupt a call into C. Calls of all functions are traced, and
    lines only in code that was compiled from text, as templates are.
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

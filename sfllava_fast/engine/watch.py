"""Answers about a video while it comes in: what `sfllava-fast watch` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .answer import Answer

_ROUNDING = 1e-6  # seconds divided by seconds: 0.3 / 0.1 is 3


def watch_live(
    frames: Iterable[tuple[float, Tensor]],
    session: Any,
    questions: Sequence[str],
    every: float,
    max_new_tokens: int | None = None,
    changed_only: bool = False,
) -> Iterator[tuple[float, Answer]]:
    """Ask the questions at every multiple of `every` seconds, after the first frame at or after it.

    They are also asked at the end of the stream if frames came since the last time.

    Args:
        frames: (seconds, uint8 RGB [H, W, 3]), such as a `LiveVideo`. Each frame is pushed as it comes.
        session: A session of `SlowFastLlava.open_stream`.
        questions: Asked in this order.
        every: Seconds of the stream.
        max_new_tokens: Where an answer is cut; None: the checkpoint's number.
        changed_only: Leave out an answer with the same text as the one before to the same question.

    Yields:
        (seconds, answer).
    """
    last: dict[str, str] = {}

    def answers() -> Iterator[tuple[float, Answer]]:
        for question in questions:
            answer = session.ask(question, max_new_tokens=max_new_tokens)
            if not changed_only or last.get(question) != answer.text:
                yield seconds, answer
            last[question] = answer.text

    passed, unasked = 0, False
    for seconds, frame in frames:
        session.push(frame[None])
        due = math.floor(seconds / every + _ROUNDING)
        unasked = due <= passed
        if not unasked:
            passed = due
            yield from answers()
    if unasked:
        yield from answers()


def time_stamp(seconds: float, decimals: bool = False) -> str:
    """Seconds as 0:02, 12:34 or 1:02:03, truncated to seconds, or to tenths with `decimals`."""
    tenths = math.floor(10 * seconds + _ROUNDING)
    minutes, rest = divmod(tenths // 10, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{clock}.{tenths % 10}" if decimals else clock

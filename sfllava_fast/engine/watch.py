"""Answers about a video as it goes on: what `sfllava-fast watch` prints."""

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
    """(seconds, answer) to each question behind the first frame at or after every multiple of `every` seconds, and at
    the end of the stream if frames came since.

    frames: (seconds, uint8 RGB [H, W, 3]), such as a LiveVideo. session: what `SlowFastLlava.open_stream` makes; each
    frame is pushed as it comes. changed_only: only answers whose text is another than the last to the same question.
    """
    said: dict[str, str] = {}

    def answers() -> Iterator[tuple[float, Answer]]:
        for question in questions:
            answer = session.ask(question, max_new_tokens=max_new_tokens)
            if not changed_only or said.get(question) != answer.text:
                yield seconds, answer
            said[question] = answer.text

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
    """Seconds as 0:02, 12:34 or 1:02:03, cut to whole ones or, with `decimals`, to tenths."""
    tenths = math.floor(10 * seconds + _ROUNDING)
    minutes, rest = divmod(tenths // 10, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{clock}.{tenths % 10}" if decimals else clock

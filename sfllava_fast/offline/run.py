"""A question file in, an answer file out: what `sfllava-fast batch` and the judge of `sfllava-fast score` run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .journal import Journal
from .progress import show_progress, summary
from .questions import Group, Question
from .scheduler import DEFAULT_ATTEMPTS, Scheduler
from .workers import STOP_SIGNALS, MakeAnswerer, Worker


def run(
    groups: list[Group],
    out: Path,
    settings: dict[str, Any],
    make: MakeAnswerer,
    workers: int = 1,
    attempts: int = DEFAULT_ATTEMPTS,
    timeout: float | None = None,
    retry_errors: bool = False,
    what: str = "answered",
    start: Callable[[MakeAnswerer, int, int], Any] = Worker,
) -> tuple[str, bool]:
    """Answer what `out` does not have yet; a summary, and whether every question is answered.

    settings: what decides the answers; `out` may be resumed with the same only. make: called in each worker, with its
    number and how many there are, for what answers there. retry_errors: ask again what ended as an error.
    Raises InputError, BackendError or KeyboardInterrupt; what was answered by then is in `out`.
    """
    questions: list[Question] = [question for group in groups for question in group.questions]
    with Journal(out, settings) as journal:
        again = {question.id for question in questions if retry_errors and question.id in journal.errors}
        over = sum(question.id in journal.done and question.id not in again for question in questions)
        workers, begun, answered = min(workers, len(groups)), time.monotonic(), journal.answered
        with _stops_raise(), show_progress(what, over, len(questions)) as told:
            scheduler = Scheduler(groups, journal, lambda n: start(make, n, workers), attempts, timeout, told, again)
            try:
                scheduler.run(workers)
            except KeyboardInterrupt:
                over = sum(question.id in journal.done for question in questions)
                raise KeyboardInterrupt(
                    f"interrupted: {over} of {len(questions)} questions are over; the same command goes on from there"
                ) from None
        table = summary(questions, journal, time.monotonic() - begun, journal.answered - answered)
        return table, all(journal.done.get(question.id) for question in questions)


@contextmanager
def _stops_raise() -> Iterator[None]:
    """The signals of a scheduler and of a closed terminal end the batch as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

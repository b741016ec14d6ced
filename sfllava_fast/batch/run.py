"""A question file in, an answer file out: what `sfllava-fast batch` and the judge of `sfllava-fast score` run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from .journal import Journal
from .progress import show_progress, summary
from .questions import Group, Id, Question
from .scheduler import DEFAULT_ATTEMPTS, Scheduler
from .workers import STOP_SIGNALS, MakeAnswerer, Worker

_TOLD = 3


def run(
    groups: list[Group],
    out: Path,
    settings: dict[str, Any],
    make: MakeAnswerer,
    workers: int = 1,
    attempts: int = DEFAULT_ATTEMPTS,
    timeout: float | None = None,
    retry_errors: bool = False,
    retry_changed: bool = False,
    what: str = "answered",
    start: Callable[[MakeAnswerer, int, int], Any] = Worker,
) -> tuple[str, bool]:
    """Answer what `out` does not have yet; a summary, and whether every question is answered.

    settings: what decides the answers; `out` may be resumed with the same only. make: called in each worker, with its
    number and how many there are, for what answers there. retry_errors: ask again what ended as an error.
    retry_changed: ask again what was answered when its question, video, choices, truth or any other field was another;
    without it such a question is refused, unless all that `out` has of it is an error.
    Raises InputError, BackendError or KeyboardInterrupt; what was answered by then is in `out`.
    """
    questions: list[Question] = [question for group in groups for question in group.questions]
    with Journal(out, settings) as journal:
        again = {question.id for question in questions if retry_errors and question.id in journal.errors}
        changed = journal.changed(questions)
        again |= {key for key in changed if retry_changed or key in journal.errors}
        _check_unchanged(out, {key: fields for key, fields in changed.items() if key not in again})
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


def _check_unchanged(out: Path, changed: dict[Id, list[str]]) -> None:
    if changed:
        told = [f"{key!r} (another {', '.join(fields)})" for key, fields in list(changed.items())[:_TOLD]]
        more = f" and {len(changed) - _TOLD} more" if len(changed) > _TOLD else ""
        raise InputError(
            f"{out} has answers to other questions, or about other videos, under the ids {', '.join(told)}{more}: name "
            "another file, or replace them with --retry-changed"
        )


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

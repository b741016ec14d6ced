"""The loop of `sfllava-fast batch`, and of the judge of `sfllava-fast score`: questions in, an answer file out."""

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

_MOST_NAMED = 3  # ids in an error


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
    """Answer the questions that `out` does not have yet.

    Args:
        groups: The questions, by video.
        out: The output, JSON lines. An existing one is resumed.
        settings: What decides the answers; `out` can only be resumed with the same.
        make: Makes the answerer; called in each worker with its number and the number of workers.
        workers: Number of workers.
        attempts: How often a question is handed out at most, over all runs.
        timeout: Seconds for one answer; None waits forever.
        retry_errors: Ask again the questions that ended as errors.
        retry_changed: Ask again the questions that were answered with another text, video, choices, truth or other
            field. Without it they are refused, unless they ended as errors.
        what: The progress bar's label.
        start: Starts a worker: `Worker` or `RayWorker`.

    Returns:
        A summary, and whether every question is answered.

    Raises:
        InputError: `out` cannot be used or was written with other settings or questions.
        BackendError: No question can be answered on this machine.
        KeyboardInterrupt: On SIGINT, SIGTERM or SIGHUP. What was answered by then is in `out`.
    """
    questions: list[Question] = [question for group in groups for question in group.questions]
    with Journal(out, settings) as journal:
        retry = {question.id for question in questions if retry_errors and question.id in journal.errors}
        changed = journal.changed(questions)
        retry |= {key for key in changed if retry_changed or key in journal.errors}
        _check_unchanged(out, {key: fields for key, fields in changed.items() if key not in retry})
        done = sum(question.id in journal.done and question.id not in retry for question in questions)
        workers, started, answered = min(workers, len(groups)), time.monotonic(), journal.answered
        with _signals_interrupt(), show_progress(what, done, len(questions)) as on_done:
            scheduler = Scheduler(groups, journal, lambda n: start(make, n, workers), attempts, timeout, on_done, retry)
            try:
                scheduler.run(workers)
            except KeyboardInterrupt:
                done = sum(question.id in journal.done for question in questions)
                raise KeyboardInterrupt(
                    f"interrupted: {done} of {len(questions)} questions are done; run the same command to continue"
                ) from None
        table = summary(questions, journal, time.monotonic() - started, journal.answered - answered)
        return table, all(journal.done.get(question.id) for question in questions)


def _check_unchanged(out: Path, changed: dict[Id, list[str]]) -> None:
    if changed:
        named = [f"{key!r} (another {', '.join(fields)})" for key, fields in list(changed.items())[:_MOST_NAMED]]
        more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
        raise InputError(
            f"{out} has answers to other questions, or about other videos, under the ids {', '.join(named)}{more}: "
            "name another file, or replace them with --retry-changed"
        )


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM of a cluster's scheduler and SIGHUP of a closed terminal raise KeyboardInterrupt, as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

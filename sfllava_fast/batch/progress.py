"""Progress of a batch, as a bar on a terminal or a line every 30 seconds, and its summary."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..terminal import one_line
from .journal import Journal
from .questions import Question

_SECONDS_BETWEEN_LINES = 30.0
_MOST_NAMED = 20  # videos in the summary


@contextlib.contextmanager
def show_progress(what: str, done: int, total: int) -> Iterator[Callable[[bool], None]]:
    """Show progress while the context is open.

    Args:
        what: The label of the bar.
        done: Questions that are done already.
        total: All questions.

    Yields:
        A function to call after each question, with whether it was answered.
    """
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            columns.append(TextColumn("{task.fields[errors]}"))
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(what, completed=done, total=total, errors="")
                errors = 0

                def advance(answered: bool) -> None:
                    nonlocal errors
                    errors += not answered
                    bar.update(task, advance=1, errors=f"{errors} errors" if errors else "")

                yield advance
            return
    yield _Lines(what, done, total)


class _Lines:
    """Writes a line to stderr, at most every `_SECONDS_BETWEEN_LINES`."""

    def __init__(self, what: str, done: int, total: int) -> None:
        self.what, self.done_before, self.total = what, done, total
        self.done = self.errors = 0
        self.start = self.last_line = time.monotonic()

    def __call__(self, answered: bool) -> None:
        self.done += 1
        self.errors += not answered
        now = time.monotonic()
        if now - self.last_line < _SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        done = self.done_before + self.done
        left = (self.total - done) * (now - self.start) / self.done
        print(
            f"{self.what}: {done} of {self.total}, {self.errors} errors, {clock(left)} left",
            file=sys.stderr,
            flush=True,
        )


def summary(questions: list[Question], journal: Journal, seconds: float, answered_here: int) -> str:
    """The final table: counts over all runs, the rate of this one, and every video with errors.

    Args:
        questions: Those of this run's question file.
        journal: The output.
        seconds: Duration of this run.
        answered_here: Questions answered in this run.
    """
    ids = {question.id for question in questions}
    errors = {key: line for key, line in journal.errors.items() if key in ids}
    rows = [
        ("questions", f"{len(ids)} about {len({question.video for question in questions})} videos"),
        ("answered", f"{sum(journal.done.get(key, False) for key in ids)}"),
        ("errors", f"{len(errors)}"),
    ]
    if left := sum(key not in journal.done for key in ids):
        rows.append(("left", f"{left}"))
    if others := sum(key not in ids for key in journal.done):
        rows.append(("others", f"{others} of other question files, kept"))
    rate = f", {answered_here / seconds:.2f} questions/s" if answered_here and seconds else ""
    rows.append(("this run", f"{answered_here} answered in {clock(seconds)}{rate}"))
    lines = [f"{name:<12}{value}" for name, value in rows]
    return "\n".join([*lines, *_error_lines(errors.values())])


def _error_lines(errors: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each video with errors, at most `_MOST_NAMED`; quarantined videos first."""
    found: dict[tuple[str, bool], list[str]] = {}
    for line in errors:
        found.setdefault((line["video"], bool(line["quarantined"])), []).append(line["error"])
    order = sorted(found.items(), key=lambda item: not item[0][1])
    lines = []
    for (name, quarantined), texts in order[:_MOST_NAMED]:
        several = f" ({len(texts)} questions)" if len(texts) > 1 else ""
        kind = "quarantined" if quarantined else "error"
        lines.append(f"{kind:<12}{one_line(name)}{several}: {one_line(texts[0])}")
    if len(order) > _MOST_NAMED:
        lines.append(f"{'':<12}and {len(order) - _MOST_NAMED} more videos")
    return lines


def clock(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"

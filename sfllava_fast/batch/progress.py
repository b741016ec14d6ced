"""How far a batch is, while it runs: a bar on a terminal, else a line now and then; and what became of it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from ..terminal import one_line
from .journal import Journal
from .questions import Question

_SECONDS_BETWEEN_LINES = 30.0
_NAMED = 20


@contextlib.contextmanager
def show_progress(what: str, done: int, total: int) -> Iterator[Callable[[bool], None]]:
    """A function to call with each question that is over, whether it was answered; done are over already."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            columns.append(TextColumn("{task.fields[errors]}"))
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(what, completed=done, total=total, errors="")
                errors = Counter()

                def advance(answered: bool) -> None:
                    errors[answered] += 1
                    bar.update(task, advance=1, errors=f"{errors[False]} errors" if errors[False] else "")

                yield advance
            return
    yield _Lines(what, done, total)


class _Lines:
    """Says how far it is on stderr, at most every so many seconds."""

    def __init__(self, what: str, done: int, total: int) -> None:
        self.what, self.before, self.total = what, done, total
        self.over: Counter[bool] = Counter()
        self.begun = self.said = time.monotonic()

    def __call__(self, answered: bool) -> None:
        self.over[answered] += 1
        now = time.monotonic()
        if now - self.said < _SECONDS_BETWEEN_LINES:
            return
        self.said = now
        here = self.over.total()
        left = (self.total - self.before - here) * (now - self.begun) / here
        print(
            f"{self.what}: {self.before + here} of {self.total}, {self.over[False]} errors, {clock(left)} left",
            file=sys.stderr,
            flush=True,
        )


def summary(questions: list[Question], journal: Journal, seconds: float, answered_here: int) -> str:
    """The final table: counts over all runs, the rate of this one, and every video that was given up."""
    mine = {question.id for question in questions}
    errors = {key: line for key, line in journal.errors.items() if key in mine}
    rows = [
        ("questions", f"{len(mine)} about {len({question.video for question in questions})} videos"),
        ("answered", f"{sum(journal.done.get(key, False) for key in mine)}"),
        ("errors", f"{len(errors)}"),
    ]
    rest = sum(key not in journal.done for key in mine)
    others = sum(key not in mine for key in journal.done)
    rate = f", {answered_here / seconds:.2f} questions/s" if answered_here and seconds else ""
    rows += [("left", f"{rest}")] if rest else []
    rows += [("others", f"{others} of other question files, kept")] if others else []
    rows += [("this run", f"{answered_here} answered in {clock(seconds)}{rate}")]
    lines = [f"{name:<12}{value}" for name, value in rows]
    return "\n".join([*lines, *_named_errors(errors.values())])


def _named_errors(errors) -> list[str]:
    """A line for each quarantined video and each other error of a video, the first ones in full."""
    found: dict[tuple[str, bool], list[str]] = {}
    for line in errors:
        found.setdefault((line["video"], bool(line["quarantined"])), []).append(line["error"])
    # Quarantined ones first: they are what a next run would leave out.
    order = sorted(found.items(), key=lambda item: not item[0][1])
    lines = []
    for (name, quarantined), said in order[:_NAMED]:
        video = one_line(name)
        several = f" ({len(said)} questions)" if len(said) > 1 else ""
        lines.append(f"{'quarantined' if quarantined else 'error':<12}{video}{several}: {one_line(said[0])}")
    return lines + ([f"{'':<12}and {len(order) - _NAMED} more videos"] if len(order) > _NAMED else [])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

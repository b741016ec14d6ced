"""Progress and log messages on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from ..terminal import one_line
from .options import PROGRAM

log = logging.getLogger("sfllava_fast")


class TokenCount:
    """Shows the number of generated tokens in the progress line."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show, self.count = show, 0

    def __call__(self, text: str) -> None:
        self.count += 1
        self.show(f"answering, {self.count} tokens")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done: on stderr if it is a terminal, else nowhere."""
    console = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            console = Console(stderr=True)
    if console is None:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)


@contextlib.contextmanager
def messages(verbose: bool) -> Iterator[None]:
    """Our warnings on stderr, one line each; the libraries' only with --verbose or Python's own -W."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    if not verbose:
        for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
            os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            if not verbose and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{PROGRAM}: {record.levelname.lower()}: {one_line(record.getMessage())}"

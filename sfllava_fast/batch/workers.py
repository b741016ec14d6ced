"""Worker processes: each loads an answerer once, then answers one question at a time.

A worker is a process of its own, so that it can be killed if it hangs, and a video that crashes it loses nothing else.
Workers are spawned, because a CUDA context does not survive a fork.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection as connections
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any

from ..errors import (
    BackendError,
    CheckpointError,
    OutOfMemoryError,
    ServerError,
    SfllavaError,
    SlowServerError,
    VideoError,
    first_line,
)
from .questions import Group, Question

Answerer = Callable[[Question], dict[str, Any]]
# Called in the worker with its number and the number of workers; must be picklable.
MakeAnswerer = Callable[[int, int], Answerer]

# Signals with which a terminal or a cluster's scheduler ends a batch.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_TO_DIE = 5


class Reply(enum.Enum):
    """The outcome of loading or of a question, as a worker reports it."""

    READY = enum.auto()  # loaded
    UNUSABLE = enum.auto()  # no question can be answered here: the batch ends
    ANSWERED = enum.auto()
    REFUSED = enum.auto()  # the question is wrong: a retry would fail alike
    FAILED = enum.auto()  # a retry may succeed; if none does, the video is at fault
    UNSERVED = enum.auto()  # a retry may succeed; if none does, the question is an error and the video is not at fault
    BROKEN = enum.auto()  # like UNSERVED, and the process must be replaced
    DIED = enum.auto()  # the process ended or was too slow; if no retry succeeds, the video is at fault


Message = tuple[Reply, Any, float]  # reply, its value (an answer or an error), seconds


class AnswererHost:
    """Holds the answerer in the worker's process and turns its errors into replies."""

    answerer: Answerer

    def load(self, make: MakeAnswerer, number: int, count: int) -> Message:
        if not sys.warnoptions:  # warnings of libraries are no use in a batch
            warnings.simplefilter("ignore")
        try:
            self.answerer = make(number, count)
        except Exception as error:
            return Reply.UNUSABLE, _one_line(error), 0.0
        # Warnings about this machine were logged while loading; those of a question would be repeated for each.
        logging.getLogger("sfllava_fast").setLevel(logging.ERROR)
        return Reply.READY, None, 0.0

    def answer(self, question: Question) -> Message:
        start = time.perf_counter()
        return *self._reply(question), time.perf_counter() - start

    def _reply(self, question: Question) -> tuple[Reply, Any]:
        try:
            return Reply.ANSWERED, self.answerer(question)
        except (BackendError, CheckpointError) as error:
            return Reply.UNUSABLE, _one_line(error)
        except (VideoError, OutOfMemoryError, SlowServerError) as error:
            return Reply.FAILED, _one_line(error)
        except ServerError as error:
            return Reply.UNSERVED, _one_line(error)
        except SfllavaError as error:
            return Reply.REFUSED, _one_line(error)
        except (RuntimeError, OSError, MemoryError) as error:  # a CUDA error leaves the process unusable
            return Reply.BROKEN, _one_line(error)
        except Exception as error:
            return Reply.REFUSED, _one_line(error)


class Worker:
    """The batch's side of a worker process.

    Attributes:
        connection: Readable when a reply has arrived or the process has ended.
        ready: Whether its answerer is loaded.
        group: The group whose questions it answers.
        asked: The question that it is answering, if any.
        deadline: When the answer is due, by `time.monotonic`.

    Args:
        make: Makes the answerer, in the process.
        number: Of this worker, from 0.
        count: Of all workers.
    """

    _process: SpawnProcess

    def __init__(self, make: MakeAnswerer, number: int, count: int) -> None:
        self.number, self.ready = number, False
        self.group: Group | None = None
        self.asked: Question | None = None
        self.deadline = float("inf")
        self.connection, theirs = get_context("spawn").Pipe()
        self._start(theirs, make, number, count)

    def ask(self, question: Question, timeout: float | None) -> None:
        """Send a question, to be answered within `timeout` seconds."""
        self.asked = question
        self.deadline = time.monotonic() + (timeout or float("inf"))
        with suppress(OSError):  # the process has ended: `reply` will report it
            self.connection.send(question)

    def reply(self) -> Message:
        """The reply that `connection` holds; DIED if the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return Reply.DIED, self._cause_of_death(), 0.0

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_SECONDS_TO_DIE)  # a process that waits for a hanging file system cannot be killed
        self.connection.close()

    def _start(self, theirs: Connection, make: MakeAnswerer, number: int, count: int) -> None:
        self._process = get_context("spawn").Process(
            target=_run_worker, args=(theirs, make, number, count), daemon=True
        )
        with _signals_blocked():
            self._process.start()
        theirs.close()

    def _cause_of_death(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            return f"the worker ended with exit code {code}"
        if -code == signal.SIGKILL:
            return "the worker was killed by SIGKILL (out of memory?)"
        return f"the worker was killed by {signal.Signals(-code).name}"


def _run_worker(connection: Connection, make: MakeAnswerer, number: int, count: int) -> None:
    """Load, then answer until the batch closes the connection or ends."""
    Thread(target=_exit_with_parent, daemon=True).start()
    host = AnswererHost()
    with suppress(EOFError, OSError):
        connection.send(host.load(make, number, count))
        while True:
            connection.send(host.answer(connection.recv()))


def _one_line(error: Exception) -> str:
    if isinstance(error, SfllavaError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)}"


def _exit_with_parent() -> None:
    if parent := parent_process():
        connections.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside do not get signals sent to the process group: the batch itself ends them."""
    resource_tracker.ensure_running()  # its first start unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Worker processes: each loads what answers once, then answers one question at a time.

A worker is a process, whatever answers in it: one that hangs can be killed, and one that a video kills takes nothing
along. They are spawned: a CUDA context does not survive a fork.
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
# Called in the worker with its number and how many there are; must be picklable.
MakeAnswerer = Callable[[int, int], Answerer]

# What a terminal or a cluster's scheduler ends a batch with.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_TO_DIE = 5


class Reply(enum.Enum):
    """What a worker says, or what becomes of it."""

    READY = enum.auto()  # it has loaded
    UNUSABLE = enum.auto()  # nothing can be answered here, whatever is asked
    ANSWERED = enum.auto()
    REFUSED = enum.auto()  # the question is wrong: asking again says the same
    FAILED = enum.auto()  # another attempt may succeed; if none does, it is the video's fault
    UNSERVED = enum.auto()  # so it may; if none does, the question is an error, and its video is not at fault
    BROKEN = enum.auto()  # the same, but not in this process
    DIED = enum.auto()


Message = tuple[Reply, Any, float]  # with its value, and the seconds it took


class Desk:
    """What a worker does, in its own process."""

    def load(self, make: MakeAnswerer, number: int, count: int) -> Message:
        if not sys.warnoptions:  # of libraries, which nobody asked for
            warnings.simplefilter("ignore")
        try:
            self.answerer = make(number, count)
        except Exception as error:
            return Reply.UNUSABLE, _one_line(error), 0.0
        # Loading said what is to be said of this machine; what a question makes us warn of would be said for each.
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
        except (RuntimeError, OSError, MemoryError) as error:  # a CUDA error, for one, stays with the process
            return Reply.BROKEN, _one_line(error)
        except Exception as error:
            return Reply.REFUSED, _one_line(error)


class Worker:
    """A worker, seen from the batch: what is sent and received goes through `connection`.

    group: whose questions it answers. asked: the one that it is at, to be answered by `deadline`.
    """

    def __init__(self, make: MakeAnswerer, number: int, count: int) -> None:
        self.number, self.ready = number, False
        self.group: Group | None = None
        self.asked: Question | None = None
        self.deadline = float("inf")
        self.connection, theirs = get_context("spawn").Pipe()
        self._start(theirs, make, number, count)

    def ask(self, question: Question, timeout: float | None) -> None:
        """Hand a question out; its reply is to come within so many seconds."""
        self.asked = question
        self.deadline = time.monotonic() + (timeout or float("inf"))
        with suppress(OSError):  # it is dead, as `reply` will say
            self.connection.send(question)

    def reply(self) -> Message:
        """What `connection` has."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return Reply.DIED, self._cause_of_death(), 0.0

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_SECONDS_TO_DIE)  # on a file system that hangs, not even a kill ends it
        self.connection.close()

    def _start(self, theirs: Connection, make: MakeAnswerer, number: int, count: int) -> None:
        self._process = get_context("spawn").Process(target=_serve, args=(theirs, make, number, count), daemon=True)
        with _signals_blocked():
            self._process.start()
        theirs.close()

    def _cause_of_death(self) -> str:
        self._process.join()
        code = self._process.exitcode
        if code >= 0:
            return f"the worker ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"the worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _serve(connection: Connection, make: MakeAnswerer, number: int, count: int) -> None:
    """The life of a worker process; it ends with the batch at the latest."""
    Thread(target=_die_with_the_batch, daemon=True).start()
    desk = Desk()
    with suppress(EOFError, OSError):
        connection.send(desk.load(make, number, count))
        while True:
            connection.send(desk.answer(connection.recv()))


def _one_line(error: Exception) -> str:
    if isinstance(error, SfllavaError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)}"


def _die_with_the_batch() -> None:
    connections.wait([parent_process().sentinel])
    os._exit(1)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """What starts inside never sees the signals that are sent to the whole process group: the batch ends it."""
    resource_tracker.ensure_running()  # its first start unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

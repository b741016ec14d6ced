"""Answerers for tests of batches, made in worker processes; one does what the question says."""

from __future__ import annotations

import builtins
import os
import signal
import time
from pathlib import Path
from typing import Any

from sfllava_fast.batch.questions import Question
from sfllava_fast.errors import BackendError, InputError, OutOfMemoryError, VideoError


class Obedient:
    """Does what the first word of a question says, and logs the question and its process.

    Questions with "once" and "dies" also name a file that records that it has happened.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, question: Question) -> dict[str, Any]:
        with self.log.open("a") as file:
            file.write(f"{question.id} {os.getpid()}\n")
        word, *rest = question.question.split()
        if word == "die":
            os.kill(os.getpid(), getattr(signal, rest[0]))
        if word == "murder":
            for other in {process for _, process in asked(self.log)} - {os.getpid()}:
                os.kill(other, signal.SIGKILL)
        if word == "hang":
            time.sleep(600)
        if word == "wait":
            time.sleep(float(rest[0]))
        if word == "bug":
            raise getattr(builtins, rest[0])("a bug")
        if word == "fill":
            raise OutOfMemoryError("out of memory")
        if word == "refuse":
            raise InputError("a wrong\nquestion")
        if word == "stop":
            raise BackendError("nothing works here")
        if word == "fail" or (word == "once" and not Path(rest[0]).exists()):
            if rest:
                Path(rest[0]).touch()
            raise VideoError("a bad video")
        return {"answer": f"{question.question}!"}


def make_obedient(number: int, count: int, log: Path) -> Obedient:
    return Obedient(log)


def make_nothing(number: int, count: int, error: type[Exception]) -> Obedient:
    """No answerer: loading fails."""
    if error is SystemExit:
        os._exit(3)
    raise error("there is\nno model")


def asked(log: Path) -> list[tuple[str, int]]:
    """(id, process) of every question that was asked, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(name, int(process)) for name, process in map(str.split, lines)]

"""The output of a batch: appended line by line, so that any kill leaves what was answered, once.

`answers.jsonl` has one line for each question that is over. Beside it `answers.jsonl.state` says with which settings it
was begun and how often each question was handed out. That is written before the worker gets the question, so that a
question that takes worker and batch down with it is known for it. It is also what is locked: by the kernel, which frees
it however the process ends. Both are those of the file itself, whatever link it was named by.

A line is written to the file at once, without a buffer of ours: from then on only a crash of the whole machine can lose
it, and such a question is asked again. An fsync a line would cost milliseconds on a shared file system to guard that.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .questions import RESERVED, Id, Question

log = logging.getLogger("sfllava_fast")

# How a line of ours that was cut short begins; a crash of the machine may leave zeros.
_TORN = (b"", b"{", b'{"')
# What a line has beside its question: the reply of a model or of a judge.
_REPLIED = {*RESERVED, "answer", "pred", "score"}


class Journal:
    """The output file at a path, locked until it is closed; nothing is written before `begin`.

    done: whether each question that is over was answered, `answered` of them. errors: what is said of the others.
    attempts: how often each question was handed out.
    settings: what decides the answers. Raises InputError where the file was begun with others, is not a batch's, is
    being written by another process, is no file of one name, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path = Path(os.path.realpath(path))
        self.path, self.settings = path, settings
        self.done: dict[Id, bool] = {}
        self.errors: dict[Id, dict[str, Any]] = {}
        self.answered_videos: set[str] = set()
        self.attempts: Counter[Id] = Counter()
        self._state_path = path.with_name(path.name + ".state")
        self._state = _lock(self._state_path, path)
        self._answers: int | None = None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def answered(self) -> int:
        return sum(self.done.values())

    def changed(self, questions: Iterable[Question]) -> dict[Id, list[str]]:
        """Which of the questions that are over were others when they were asked, and the fields that differ."""
        asked = {question.id: question.to_json() for question in questions if question.id in self.done}
        lines = [line for line in _read_lines(self.path) if line["id"] in asked] if asked else []
        differing = {line["id"]: _differing(line, asked[line["id"]]) for line in lines}
        return {key: fields for key, fields in differing.items() if fields}

    def begin(self, again: Collection[Id] = ()) -> None:
        """Open the output for appending; the errors of these questions are forgotten."""
        # The output is there before its state: state without output is of one that was deleted.
        self._answers = _open(self.path, os.O_APPEND)
        if os.fstat(self._state).st_size == 0:
            self._append(self._state, self._state_path, {"settings": self.settings})
        if again:
            self._forget(set(again))

    def start(self, key: Id) -> None:
        """A question is about to be handed out."""
        self._count(key, self.attempts[key] + 1)

    def withdraw(self, key: Id) -> None:
        """A question was handed out, and the batch ends through no fault of it."""
        self._count(key, self.attempts[key] - 1)

    def finish(self, line: dict[str, Any]) -> None:
        """A question is over: the one line about it."""
        self._append(self._answers, self.path, line)
        self._note(line)

    def close(self) -> None:
        if self._answers is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._answers)
            os.close(self._answers)
        if os.fstat(self._state).st_size == 0:
            self._state_path.unlink(missing_ok=True)
        os.close(self._state)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        if not self.path.exists():
            os.ftruncate(self._state, 0)
            return
        if self.path.is_file() and self.path.stat().st_nlink > 1:
            # A line appended under one name would be in the other, under another lock; written anew they would part.
            raise InputError(f"{self.path} has another name (a hard link): name another file, or copy it")
        if not (self.path.is_file() or self.path.is_dir()):  # a pipe would be waited for
            raise InputError(f"{self.path} is no regular file: name another")
        for number, line in enumerate(_read_lines(self.path), 1):
            if not _is_answer(line):
                raise InputError(f"{self.path}, line {number} is not an answer of a batch: name another file")
            self._note(line)
        lines = [line for line in _read_lines(self._state_path) if _is_state(line)]
        begun = next((line["settings"] for line in lines if "settings" in line), self.settings)
        if begun != self.settings and not self.done:
            os.ftruncate(self._state, 0)
            return
        self._check_settings(begun)
        self.attempts.update({line["id"]: line["attempts"] for line in lines if "attempts" in line})

    def _check_settings(self, begun: dict[str, Any]) -> None:
        names = dict.fromkeys([*self.settings, *begun])
        pairs = {name: (begun.get(name), self.settings.get(name)) for name in names}
        was = [
            f"another {name.replace('_', ' ')}" if name.endswith(("_file", "_files")) else f"{name} {then}, not {now}"
            for name, (then, now) in pairs.items()
            if then != now
        ]  # a stamp of files says nothing to a reader
        if was:
            raise InputError(f"{self.path} was begun with {', '.join(was)}: use the same, or name another file")

    def _note(self, line: dict[str, Any]) -> None:
        self.done[line["id"]] = line["ok"]
        if line["ok"]:
            self.answered_videos.add(line["video"])
        else:
            self.errors[line["id"]] = {name: line.get(name) for name in ("video", "error", "quarantined")}

    def _count(self, key: Id, attempts: int) -> None:
        self._append(self._state, self._state_path, {"id": key, "attempts": attempts})
        self.attempts[key] = attempts

    def _forget(self, keys: set[Id]) -> None:
        # The attempts first: cut off in between, the errors are still there to be forgotten.
        for key in keys:
            self._count(key, 0)
        part = self.path.with_name(self.path.name + ".part")
        lines = self.path.read_bytes().splitlines(keepends=True)
        try:
            part.unlink(missing_ok=True)
            # A new file, never one that a link leads to; who may read it stays as it was.
            mode = os.fstat(self._answers).st_mode & 0o777
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.writelines(line for line in lines if json.loads(line)["id"] not in keys)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            part.unlink(missing_ok=True)
        os.close(self._answers)
        self._answers = _open(self.path, os.O_APPEND)
        for key in keys:
            del self.done[key]
            self.errors.pop(key, None)

    def _append(self, file: int, path: Path, record: dict[str, Any]) -> None:
        """One line, whole or not at all."""
        data, end = json.dumps(record).encode() + b"\n", os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise _unwritable(path, error) from error


def _lock(path: Path, output: Path) -> int:
    """The file at a path, created where there is none, locked against every other process."""
    while True:
        file = _open(path, os.O_APPEND | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InputError(f"{output} is being written by another batch: wait for it, or name another file") from None
        except OSError as error:
            log.warning("%s has no locks (%s): make sure that no other batch writes there", path.parent, error.strerror)
        # Another batch may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path} ({error.strerror}): make room or name another file, then run it again")


def _is_state(line: Any) -> bool:
    """Whether a line is of a state file; damaged ones are passed over."""
    if not isinstance(line, dict) or "settings" in line:
        return isinstance(line, dict) and isinstance(line["settings"], dict) and "attempts" not in line
    attempts = line.get("attempts")
    return isinstance(line.get("id"), (str, int)) and isinstance(attempts, int) and attempts >= 0


def _read_lines(path: Path) -> list[Any]:
    """The lines of a file, None for what is no JSON; a last one that was cut short is taken off the file."""
    try:
        data = path.read_bytes()
        *whole, tail = data.split(b"\n")
        lines = [_parse(line) for line in whole]
        if tail and (rest := _parse(tail)) is not None:
            lines.append(rest)
            with path.open("ab") as file:
                file.write(b"\n")
        elif tail and tail.rstrip(b"\0")[:2] in _TORN and None not in lines:
            os.truncate(path, len(data) - len(tail))
        elif tail:
            lines.append(None)
        return lines
    except OSError as error:
        raise _unwritable(path, error) from error


def _is_answer(line: Any) -> bool:
    kinds = {"id": (str, int), "video": str, "ok": bool}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())


def _differing(line: dict[str, Any], question: dict[str, Any]) -> list[str]:
    """The fields in which a question is not that of a line, compared as JSON, where NaN is the same as NaN."""
    was = {name: value for name, value in line.items() if name in question or name not in _REPLIED}
    as_json = [{name: json.dumps(of[name], sort_keys=True) for name in of} for of in (was, question)]
    return [name for name in {**was, **question} if as_json[0].get(name) != as_json[1].get(name)]


def _parse(line: bytes) -> Any:
    """The JSON of a line; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

"""The output of a batch: a file that is appended to line by line, so that a killed batch can be resumed.

- `answers.jsonl` has one line for each question that is done.
- `answers.jsonl.state` has the settings of the batch and the number of attempts of each question. An attempt is
  written before the worker gets the question, so that it counts even if it kills worker and batch.
- The state file is locked while a batch writes. The kernel frees the lock when the process ends, in whatever way.
- Symbolic links are resolved first, so that all names of an output share one state file and lock.

Lines are written unbuffered: after that only a crash of the machine can lose one, and its question is asked again. An
fsync for each line would cost milliseconds on a shared file system.
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

# The start of a line that was cut short; a crash of the machine may leave zeros instead.
_TORN = (b"", b"{", b'{"')
# Fields of a line that are not the question's: the reply of a model or of a judge.
_REPLIED = {*RESERVED, "answer", "pred", "score"}


class Journal:
    """An output file, locked until `close`; nothing is written before `begin`.

    Args:
        path: The output.
        settings: What decides the answers.

    Attributes:
        done: By id of each question that is done, whether it was answered.
        errors: By id of each question that is an error: its video, error and whether the video is quarantined.
        answered_videos: Videos of which a question was answered.
        attempts: By id, how often the question was handed out.

    Raises:
        InputError: The file was written with other settings or by another program, is being written by another
            process, has hard links, is no regular file, or cannot be written.
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
    def _output(self) -> int:
        assert self._answers is not None, "begin() opens the output"
        return self._answers

    @property
    def answered(self) -> int:
        """Number of answered questions."""
        return sum(self.done.values())

    def changed(self, questions: Iterable[Question]) -> dict[Id, list[str]]:
        """The ids of questions that are done but were asked with other fields, and the names of these fields."""
        asked = {question.id: question.to_json() for question in questions if question.id in self.done}
        lines = [line for line in _read_lines(self.path) if line["id"] in asked] if asked else []
        differing = {line["id"]: _differing(line, asked[line["id"]]) for line in lines}
        return {key: fields for key, fields in differing.items() if fields}

    def begin(self, retry: Collection[Id] = ()) -> None:
        """Open the output for appending, and discard the outcomes of the questions in `retry`."""
        # The output is created first: a state file without output means that the output was deleted.
        self._answers = _open(self.path, os.O_APPEND)
        if os.fstat(self._state).st_size == 0:
            self._append(self._state, self._state_path, {"settings": self.settings})
        if retry:
            self._forget(set(retry))

    def start(self, key: Id) -> None:
        """Record an attempt, before the question is handed out."""
        self._count(key, self.attempts[key] + 1)

    def withdraw(self, key: Id) -> None:
        """Take an attempt back: the batch ends, and the question is not the cause."""
        self._count(key, self.attempts[key] - 1)

    def finish(self, line: dict[str, Any]) -> None:
        """Write the line of a question that is done."""
        self._append(self._output, self.path, line)
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
            # Each name would have its own lock, and a rewrite under one name would not reach the other.
            raise InputError(f"{self.path} has another name (a hard link): name another file, or copy it")
        if not (self.path.is_file() or self.path.is_dir()):  # opening a pipe would block
            raise InputError(f"{self.path} is no regular file: name another")
        for number, line in enumerate(_read_lines(self.path), 1):
            if not _is_answer(line):
                raise InputError(f"{self.path}, line {number} is not an answer of a batch: name another file")
            self._note(line)
        lines = [line for line in _read_lines(self._state_path) if _is_state(line)]
        earlier = next((line["settings"] for line in lines if "settings" in line), self.settings)
        if earlier != self.settings and not self.done:
            os.ftruncate(self._state, 0)
            return
        self._check_settings(earlier)
        self.attempts.update({line["id"]: line["attempts"] for line in lines if "attempts" in line})

    def _check_settings(self, earlier: dict[str, Any]) -> None:
        differing = []
        for name in dict.fromkeys([*self.settings, *earlier]):
            then, now = earlier.get(name), self.settings.get(name)
            if then != now and name.endswith(("_file", "_files")):
                differing.append(f"another {name.replace('_', ' ')}")  # the values are stamps
            elif then != now:
                differing.append(f"{name} {then}, not {now}")
        if differing:
            raise InputError(f"{self.path} was begun with {', '.join(differing)}: use the same, or name another file")

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
        # Attempts first: if the batch is killed in between, the errors are still recorded and can be discarded again.
        for key in keys:
            self._count(key, 0)
        part = self.path.with_name(self.path.name + ".part")
        lines = self.path.read_bytes().splitlines(keepends=True)
        try:
            part.unlink(missing_ok=True)
            # O_EXCL: never the target of a link. The mode is that of the output.
            mode = os.fstat(self._output).st_mode & 0o777
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
        os.close(self._output)
        self._answers = _open(self.path, os.O_APPEND)
        for key in keys:
            del self.done[key]
            self.errors.pop(key, None)

    def _append(self, file: int, path: Path, record: dict[str, Any]) -> None:
        """Append one whole line, or nothing."""
        data, end = json.dumps(record).encode() + b"\n", os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise _unwritable(path, error) from error


def _lock(path: Path, output: Path) -> int:
    """Open a file, or create it, and lock it against every other process."""
    while True:
        file = _open(path, os.O_APPEND | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InputError(f"{output} is being written by another batch: wait for it, or name another file") from None
        except OSError as error:
            log.warning("%s has no locks (%s): make sure that no other batch writes there", path.parent, error.strerror)
        # Another batch may have removed the file before it was locked here.
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
    """Whether a line is one of a state file and undamaged."""
    if not isinstance(line, dict) or "settings" in line:
        return isinstance(line, dict) and isinstance(line["settings"], dict) and "attempts" not in line
    attempts = line.get("attempts")
    return isinstance(line.get("id"), (str, int)) and isinstance(attempts, int) and attempts >= 0


def _read_lines(path: Path) -> list[Any]:
    """The lines of a file, None for what is not JSON; a last line that was cut short is removed from the file."""
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
    kinds: dict[str, type | tuple[type, ...]] = {"id": (str, int), "video": str, "ok": bool}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())


def _differing(line: dict[str, Any], question: dict[str, Any]) -> list[str]:
    """The fields in which a question differs from that of a line; as JSON text, so that NaN equals NaN."""
    asked = {name: value for name, value in line.items() if name in question or name not in _REPLIED}
    then, now = ({name: json.dumps(of[name], sort_keys=True) for name in of} for of in (asked, question))
    return [name for name in {**then, **now} if then.get(name) != now.get(name)]


def _parse(line: bytes) -> Any:
    """The value of a JSON line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

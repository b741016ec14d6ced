"""Question files: our own JSON lines, and the published files of SlowFast-LLaVA's and IG-VLM's evaluations.

All of them say the same under other names. The published ones are `question_id`, `video_name` and `candidates` (in CSV
the columns a0, a1, ...), and `answer` is the true one, which is `truth` here: an answer is what the model says. An
entry of VCGBench's consistency list has two questions, which become two under its id.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, first_line
from ..terminal import one_line
from ..video.base import hide_password, is_url
from .stamps import stamp_video

Id = str | int
Row = dict[str, Any]

# What batch itself writes about a question.
RESERVED = ("ok", "choice", "option", "openly", "caveat", "damage", "error", "quarantined", "attempts", "seconds")
RESERVED += ("video_file",)
_NAMES = {"question_id": "id", "video_name": "video", "candidates": "choices", "answer": "truth"}
_SUFFIXES = ("", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
_TOLD = 3
_DEEPEST = 64  # lists and objects in one another; deeper ones could be read here and not written by a worker


@dataclass(frozen=True)
class Question:
    """A question about a video; extra: every other field of its line, such as the truth. video_file: the stamp of the
    video's file, None if it is not here."""

    id: Id
    video: str
    question: str
    choices: list[Any] | None = None
    extra: Row = field(default_factory=dict)
    video_file: str | None = None

    def to_json(self) -> Row:
        """What an output line repeats of it, so that scoring needs no other file."""
        choices = {} if self.choices is None else {"choices": self.choices}
        file = {} if self.video_file is None else {"video_file": self.video_file}
        return {"id": self.id, "video": self.video, "question": self.question, **choices, **self.extra, **file}


@dataclass
class Group:
    """Questions that are answered one after another by the same worker, and given up together."""

    name: str
    questions: deque[Question]


def read_questions(path: Path, truths: Path | None = None) -> list[Question]:
    """The questions of a file of JSON lines, a JSON list or a CSV file with a header.

    truths: the published file of true answers that belongs to a published list of questions, entry by entry.
    Raises InputError that names the first wrong lines: nothing of a wrong file is answered.
    """
    rows = list(_rows(path))
    if truths is not None:
        rows = _with_truths(rows, list(_rows(truths)), path, truths)
    questions, wrong = [], []
    repeated: Counter[Id] = Counter()
    seen: dict[Id, str] = {}
    for place, row in rows:
        try:
            for one in _each(row):
                question = _question(one, repeated)
                if question.id in seen:
                    raise InputError(f"has the id {question.id!r} of {seen[question.id]}")
                seen[question.id] = place
                questions.append(question)
        except InputError as error:
            wrong.append(f"{place} {error}")
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise InputError(f"{path}: {'; '.join(wrong[:_TOLD])}{more}")
    if not questions:
        raise InputError(f"{path} has no questions")
    return questions


def by_video(questions: Iterable[Question]) -> list[Group]:
    """One group a video, in the order of their first questions."""
    groups: dict[str, Group] = {}
    for question in questions:
        groups.setdefault(question.video, Group(question.video, deque())).questions.append(question)
    return list(groups.values())


def note_files(groups: Iterable[Group], folder: Path) -> None:
    """Stamp the questions with the files that their videos are now."""
    for group in groups:
        stamp = stamp_video(find_video(folder, group.name))
        group.questions = deque(replace(question, video_file=stamp) for question in group.questions)


def find_video(folder: Path, name: str) -> Path:
    """The video of that name in the folder; published files leave the suffix out, and those of ActivityNet the "v_"."""
    paths = [folder / name]
    if "activitynet" in str(folder.absolute()).lower():
        paths.append(folder / f"v_{name}")
    found = (Path(f"{path}{suffix}") for path in paths for suffix in _SUFFIXES if os.path.exists(f"{path}{suffix}"))
    return next(found, paths[0])


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place in the file, row) of each."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    if path.suffix.lower() == ".csv":
        return _csv_rows(text, path)
    if text.lstrip().startswith("["):
        return ((f"entry {i}", row) for i, row in enumerate(_json(text, str(path)), 1))
    # Not splitlines: JSON may hold U+2028 as it is.
    lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
    return ((place, _json(line, f"{path}, {place}")) for place, line in lines)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, Row]]:
    # Strict: otherwise a stray quote would swallow lines up to the next one.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield f"line {reader.line_num}", _csv_row(row)
    except csv.Error as error:
        told = f"{path}: around line {reader.line_num} it is not CSV ({error})"
        raise InputError(f"{told}: a text with quotes is written in quotes, its own doubled") from error


def _csv_row(row: Row) -> Row:
    """The row with its choices in a list; an empty one where it is wider or narrower than the header."""
    if None in row or None in row.values():
        return {}
    choices = []
    while (column := f"a{len(choices)}") in row:
        choices.append(row.pop(column))
    row.pop("", None)  # the published files number their rows
    if re.fullmatch(r"[0-9]{1,9}", row.get("answer_number", "")):
        row["answer_number"] = int(row["answer_number"])
    return row | ({"candidates": choices} if choices else {})


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        told = f"{place} is not JSON ({first_line(error)})"
        raise InputError(f"{told}: write one object a line, or a list of objects") from error


def _depth(value: Any) -> int:
    """How many lists and objects are in one another, counted no further than is allowed."""
    depth, inside = 0, [value]
    while depth <= _DEEPEST and (inside := [part for part in inside if isinstance(part, (list, dict))]):
        depth += 1
        inside = [one for part in inside for one in (part.values() if isinstance(part, dict) else part)]
    return depth


def _each(row: Any) -> list[Any]:
    """The row for each of its questions: a published entry may have two."""
    questions = row.get("question") if isinstance(row, dict) and "question_id" in row else None
    return [row | {"question": text} for text in questions] if isinstance(questions, list) and questions else [row]


def _with_truths(
    rows: list[tuple[str, Row]], truths: list[tuple[str, Row]], path: Path, truths_path: Path
) -> list[tuple[str, Row]]:
    def key(row: Any) -> Any:
        return row.get("question_id") if isinstance(row, dict) else None

    if [key(row) for _, row in rows] != [key(row) for _, row in truths]:
        raise InputError(f"{truths_path} does not have the question_ids of {path}, entry by entry: name its own file")
    return [(place, truth | row) for (place, row), (_, truth) in zip(rows, truths)]


def _question(row: Any, repeated: Counter[Id]) -> Question:
    """The question of a row; repeated counts the published ids so far."""
    if not isinstance(row, dict) or not row:
        raise InputError("is no object with the fields id, video and question")
    if _depth(row) > _DEEPEST:
        raise InputError(f"has more than {_DEEPEST} lists and objects in one another: write it flat")
    clash = [name for name in RESERVED if name in row]
    if clash:
        raise InputError(f"has the field {clash[0]!r}, which the output writes itself: rename it")
    fields = {_NAMES.get(name, name): value for name, value in row.items()}
    key, video, text = (fields.pop(name, None) for name in ("id", "video", "question"))
    if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
        raise InputError("has no id, a text or a whole number")
    for name, value in (("video", video), ("question", text)):
        if not isinstance(value, str) or not (value or name == "question"):
            raise InputError(f"has no {name}, a text")
    if is_url(video):  # which may hold a secret that the output would repeat
        raise InputError(f"has a URL as its video, {one_line(hide_password(video))}: download it, and name the file")
    choices = fields.pop("choices", None)
    if choices is not None and not isinstance(choices, list):
        raise InputError("has choices that are no list")
    if "question_id" in row:
        repeated[key] += 1
        # TGIF-QA's file gives all questions about a clip one id.
        key = key if repeated[key] == 1 else f"{key}#{repeated[key]}"
    return Question(key, video, text, choices, fields)

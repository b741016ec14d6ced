"""Question files: JSON lines of our own, and the published files of SlowFast-LLaVA's and IG-VLM's evaluations.

Published files have other names for the fields: `question_id` (id), `video_name` (video), `candidates` (choices; in CSV
the columns a0, a1, ...) and `answer` (truth). An entry of VCGBench's consistency list has two questions; it becomes two
questions with ids `ID` and `ID#2`.
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

# The fields that batch itself writes.
RESERVED: tuple[str, ...] = ("ok", "choice", "option", "openly", "caveat", "damage", "error", "quarantined", "attempts")
RESERVED += ("seconds", "video_file")
_NAMES = {"question_id": "id", "video_name": "video", "candidates": "choices", "answer": "truth"}
_SUFFIXES = ("", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
_MOST_NAMED = 3  # wrong lines in an error
_DEEPEST = 64  # nested lists and objects; deeper ones can be read here but not pickled for a worker


@dataclass(frozen=True)
class Question:
    """A question about a video.

    Attributes:
        id: Unique in its file.
        video: The video's name, relative to the folder of videos.
        question: The text.
        choices: Of a multiple-choice question.
        extra: Every other field of its line, such as the truth.
        video_file: The stamp of the video's file; None if there is no such file.
    """

    id: Id
    video: str
    question: str
    choices: list[Any] | None = None
    extra: Row = field(default_factory=dict)
    video_file: str | None = None

    def to_json(self) -> Row:
        """The fields that an output line repeats, so that scoring needs no other file."""
        fields: Row = {"id": self.id, "video": self.video, "question": self.question}
        if self.choices is not None:
            fields["choices"] = self.choices
        fields |= self.extra
        if self.video_file is not None:
            fields["video_file"] = self.video_file
        return fields


@dataclass
class Group:
    """The questions about one video, which the same worker answers one after another.

    Attributes:
        name: The video.
        questions: Those that are not done.
    """

    name: str
    questions: deque[Question]


def read_questions(path: Path, truths: Path | None = None) -> list[Question]:
    """Read JSON lines, a JSON list or a CSV file with a header.

    Args:
        path: The file.
        truths: For published lists of questions without answers: the file of true answers, in the same order.

    Raises:
        InputError: The file cannot be read, or lines are wrong; the first ones are named.
    """
    rows = list(_rows(path))
    if truths is not None:
        rows = _with_truths(rows, list(_rows(truths)), path, truths)
    questions: list[Question] = []
    wrong: list[str] = []
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
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise InputError(f"{path}: {'; '.join(wrong[:_MOST_NAMED])}{more}")
    if not questions:
        raise InputError(f"{path} has no questions")
    return questions


def by_video(questions: Iterable[Question]) -> list[Group]:
    """Group questions by video, in the order of the videos' first questions."""
    groups: dict[str, Group] = {}
    for question in questions:
        groups.setdefault(question.video, Group(question.video, deque())).questions.append(question)
    return list(groups.values())


def note_files(groups: Iterable[Group], folder: Path) -> None:
    """Set `video_file` of the questions to the stamps of their files in a folder."""
    for group in groups:
        stamp = stamp_video(find_video(folder, group.name))
        group.questions = deque(replace(question, video_file=stamp) for question in group.questions)


def find_video(folder: Path, name: str) -> Path:
    """The path of a video in a folder; published files omit the suffix, and those of ActivityNet the prefix "v_"."""
    paths = [folder / name]
    if "activitynet" in str(folder.absolute()).lower():
        paths.append(folder / f"v_{name}")
    found = (Path(f"{path}{suffix}") for path in paths for suffix in _SUFFIXES if os.path.exists(f"{path}{suffix}"))
    return next(found, paths[0])


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields (place in the file, row)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    if path.suffix.lower() == ".csv":
        return _csv_rows(text, path)
    if text.lstrip().startswith("["):
        return ((f"entry {i}", row) for i, row in enumerate(_json(text, str(path)), 1))
    # Not splitlines: JSON may contain U+2028 unescaped.
    lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
    return ((place, _json(line, f"{path}, {place}")) for place, line in lines)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, Row]]:
    # Strict: otherwise an unbalanced quote would join lines up to the next one.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield f"line {reader.line_num}", _csv_row(row)
    except csv.Error as error:
        wrong = f"{path}: around line {reader.line_num} it is not CSV ({error})"
        raise InputError(f"{wrong}: put a text with quotes into quotes, and double its own") from error


def _csv_row(row: Row) -> Row:
    """The row with its choices in a list; an empty row if its width is not the header's."""
    if None in row or None in row.values():
        return {}
    choices: list[str] = []
    while (column := f"a{len(choices)}") in row:
        choices.append(row.pop(column))
    row.pop("", None)  # row numbers of published files
    if re.fullmatch(r"[0-9]{1,9}", row.get("answer_number", "")):
        row["answer_number"] = int(row["answer_number"])
    if choices:
        row["candidates"] = choices
    return row


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place} is not JSON ({first_line(error)}): write one object a line, or a list of objects"
        ) from error


def _depth(value: Any) -> int:
    """Nesting depth of lists and objects, at most `_DEEPEST` + 1."""
    depth, inside = 0, [value]
    while depth <= _DEEPEST and (inside := [part for part in inside if isinstance(part, (list, dict))]):
        depth += 1
        inside = [one for part in inside for one in (part.values() if isinstance(part, dict) else part)]
    return depth


def _each(row: Any) -> list[Any]:
    """One row for each question of a row: a published entry may have several."""
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
    """The question of a row. repeated: counts the published ids so far."""
    if not isinstance(row, dict) or not row:
        raise InputError("is not an object with the fields id, video and question")
    if _depth(row) > _DEEPEST:
        raise InputError(f"has more than {_DEEPEST} nested lists and objects: flatten it")
    clash = [name for name in RESERVED if name in row]
    if clash:
        raise InputError(f"has the field {clash[0]!r}, which batch writes itself: rename it")
    fields: Row = {str(_NAMES.get(name, name)): value for name, value in row.items()}
    key, video, text = (fields.pop(name, None) for name in ("id", "video", "question"))
    if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
        raise InputError("has no id: give a text or a whole number")
    for name, value in (("video", video), ("question", text)):
        if not isinstance(value, str) or not (value or name == "question"):
            raise InputError(f"has no {name}: give a text")
    if is_url(video):  # it may contain a secret, which the output would repeat
        raise InputError(f"has a URL as its video, {one_line(hide_password(video))}: download it and name the file")
    choices = fields.pop("choices", None)
    if choices is not None and not isinstance(choices, list):
        raise InputError("has choices that are not a list")
    if "question_id" in row:
        repeated[key] += 1
        # In TGIF-QA's file all questions about a clip have one id.
        key = key if repeated[key] == 1 else f"{key}#{repeated[key]}"
    return Question(key, video, text, choices, fields)

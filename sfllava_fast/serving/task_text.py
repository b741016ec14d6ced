"""Parser of a benchmark's text into question, options and instruction."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

_LABEL = re.compile(r"^question\s*:\s*", re.IGNORECASE)
_HEADING = re.compile(r"(options?|choices|candidates)\s*:?", re.IGNORECASE)
# Beginning of a line with an instruction; a line that ends with a question mark is the question.
_LEADING = re.compile(
    r"(please )?(select|choose|pick|answer|respond|give|provide)\b"
    r".*?\b(questions?|options?|answers?|choices?|letter)\b",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"(?<=[.?!\n])\s*((?:please )?answer\b[^.?!\n]*[.!]?)\s*$", re.IGNORECASE)
# Marks of options, with a letter for {}; half and full width.
_MARKS = (r"[(\uff08]{}[)\uff09]", r"{}[.\uff0e\u3001]", r"{}[)\uff09]", r"{}[:\uff1a]")
_LONGEST = 20  # maximum lines of an option


class TaskText(NamedTuple):
    """A benchmark's text.

    Attributes:
        question: The question.
        options: The options, or None for an open-ended question.
        instruction: How to answer.
    """

    question: str
    options: list[str] | None
    instruction: str


def read_task_text(text: str) -> TaskText:
    """Split a text "instruction, question, a line for each option, instruction" or "question, Answer ... instruction".

    - Options have letters from A or a, each at the beginning of a line: "A. text", "A) text", "(A) text" or "A: text".
    - A line between two options continues the first. A line after the last option continues it if it begins with a
      lower-case letter.
    - Options may be empty, but not all of them.
    - Of several lists, the last has the options; the others are part of the question.
    - Labels that the paper's prompts add ("Question:", "Options:") are removed.
    """
    text = _LABEL.sub("", text.strip())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - 2, 0, -1):
        options, end = _options(lines, start)
        if len(options) > 1 and any(options):
            headed = start > 1 and _HEADING.fullmatch(lines[start - 1])
            leading, question = _take_leading(lines[: start - 1 if headed else start])
            return TaskText("\n".join(question), options, "\n".join([*leading, *lines[end:]]))
    closing = _CLOSING.search(text)
    rest = text[: closing.start()].rstrip() if closing else text
    leading, question = _take_leading(rest.splitlines())
    return TaskText("\n".join(question), None, "\n".join([*leading, *([closing[1]] if closing else [])]))


def _take_leading(lines: list[str]) -> tuple[list[str], list[str]]:
    """The leading lines with instructions, and the lines of the question, of which there is at least one."""
    count = 0
    while count < len(lines) - 1 and _LEADING.match(lines[count].strip()) and not lines[count].rstrip().endswith("?"):
        count += 1
    question = lines[count:]
    return [line.strip() for line in lines[:count]], [_LABEL.sub("", question[0]), *question[1:]] if question else []


def _options(lines: Sequence[str], start: int) -> tuple[list[str], int]:
    """The options that begin at a line, all with one kind of mark, and the end line."""
    for letters in (string.ascii_uppercase, string.ascii_lowercase):
        for mark in _MARKS:
            if first := _begins(mark, letters[0], lines[start]):
                return _list(lines, start, mark, letters, first[1])
    return [], start


def _list(lines: Sequence[str], start: int, mark: str, letters: str, first: str) -> tuple[list[str], int]:
    options, end = [first], start + 1
    for letter in letters[1:]:
        near = range(end, min(end + _LONGEST, len(lines)))
        found = next(((i, match[1]) for i in near if (match := _begins(mark, letter, lines[i]))), None)
        if found is None:
            break
        at, option = found
        options[-1] = " ".join([options[-1], *lines[end:at]]).strip()
        options.append(option)
        end = at + 1
    while end < len(lines) and lines[end][0].islower():
        options[-1], end = f"{options[-1]} {lines[end]}".strip(), end + 1
    return options, end


def _begins(mark: str, letter: str, line: str) -> re.Match[str] | None:
    return re.fullmatch(rf"{mark.format(letter)}\s*(.*)", line)

"""The question, and the options, that a benchmark's text holds."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

_HEADING = re.compile(r"(options?|choices|candidates)\s*:?", re.IGNORECASE)
_CLOSING = re.compile(r"(?<=[.?!\n])\s*((?:please )?answer\b[^.?!\n]*[.!]?)\s*$", re.IGNORECASE)


class TaskText(NamedTuple):
    """What a text asks: options are None where it lists none, instruction is how it wants to be answered."""

    question: str
    options: list[str] | None
    instruction: str


def read_task_text(text: str) -> TaskText:
    """Take apart "question, a line for each option, instruction" or "question, Answer ... instruction".

    Options are lettered from A on, one a line: "A. text", "A) text", "(A) text" or "A: text". Labels that the paper's
    prompts have themselves ("Question:", "Options:") are left out.
    """
    text = re.sub(r"^question\s*:\s*", "", text.strip(), flags=re.IGNORECASE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(1, len(lines)):
        options = _options(lines[start:])
        if len(options) > 1:
            end = start + len(options)
            headed = start > 1 and _HEADING.fullmatch(lines[start - 1])
            return TaskText("\n".join(lines[: start - 1 if headed else start]), options, "\n".join(lines[end:]))
    closing = _CLOSING.search(text)
    if closing:
        return TaskText(text[: closing.start()].rstrip(), None, closing[1])
    return TaskText(text, None, "")


def _options(lines: Sequence[str]) -> list[str]:
    """The options that the first lines list."""
    options = []
    for letter, line in zip(string.ascii_uppercase, lines):
        match = re.match(rf"(?:\({letter}\)|{letter}[.):])\s*(\S.*)", line)
        if not match:
            break
        options.append(match[1])
    return options

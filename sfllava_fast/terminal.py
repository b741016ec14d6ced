"""Text for a terminal, without control sequences of a file's name or a model's answer."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from typing import Any

# C0 and C1 controls but tab and newline, marks that turn the direction of text, and halves of surrogate pairs: bytes of
# a name that is not UTF-8.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object) -> str:
    """The text with control characters and unwritable ones escaped as in Python: \\x1b."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def one_line(text: object) -> str:
    """`shown` in one line."""
    return " ".join(shown(text).split())


def fit(line: str, indent: str, end: str = "", width: int = 0) -> str:
    """Break a line at blanks outside quotes to fit the terminal or `width`; all lines but the last get `end`."""
    width = (width or shutil.get_terminal_size().columns) - len(end)
    if len(line) <= width + len(end):
        return line
    held = re.sub("\"[^\"]*\"|'[^']*'", lambda found: found[0].replace(" ", "\0"), line.strip())
    first = line[: len(line) - len(line.lstrip())]
    wrapper = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return f"{end}\n".join(wrapper.wrap(held)).replace("\0", " ")


def as_json(value: Any) -> str:
    """JSON in one line for stdout; characters that stdout cannot write, and control characters, are escaped."""
    can_write = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")
    text = json.dumps(value, ensure_ascii=not can_write)
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

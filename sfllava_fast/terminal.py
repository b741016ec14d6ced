"""Text for a terminal, without control characters from file names or models' answers."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from typing import Any

# C0 and C1 controls except tab and newline, marks of text direction, and halves of surrogate pairs, which stand for
# bytes of a name that is not UTF-8.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object) -> str:
    """The text with control characters and unprintable ones escaped as in Python: \\x1b."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def one_line(text: object) -> str:
    """`shown` in one line."""
    return " ".join(shown(text).split())


def fit(line: str, indent: str, end: str = "", width: int = 0) -> str:
    """Wrap a line at blanks outside quotes.

    Args:
        line: The line.
        indent: Of all lines but the first.
        end: Text at the end of all lines but the last.
        width: Maximum width; 0 stands for the terminal's.
    """
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
    """JSON in one line for stdout, with control characters escaped, and others too if stdout cannot encode them."""
    can_write = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")
    text = json.dumps(value, ensure_ascii=not can_write)
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

"""How long a file is by its own header, to tell one that is cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def declared_bytes(path: Path) -> int:
    """Bytes that an MP4, AVI or Matroska file says it has; 0 where its header does not tell."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            return 8 + int.from_bytes(head[4:8], "little")
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_bytes(head)
        return _mp4_bytes(file) if head[4:8] == b"ftyp" else 0


def _mp4_bytes(file: Any) -> int:
    """End of the last top-level box."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if len(head) < 8 or size < 8:
            return at
        at += size


def _matroska_bytes(head: bytes) -> int:
    """End of the Segment element; 0 where it is of unknown length, as in a live recording."""
    size, at = _ebml_size(head, 4)
    at += size
    if head[at : at + 4] != b"\x18S\x80g":
        return 0
    size, at = _ebml_size(head, at + 4)
    return at + size if size else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of an EBML variable-length size; all ones mean unknown and read as 0."""
    length = 9 - data[at].bit_length()
    bits = 7 * length
    value = int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + length

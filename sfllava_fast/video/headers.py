"""File sizes that headers declare, to detect truncated files. An inconsistent header is ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import VideoError

# Types of the top-level boxes of MP4, MOV and related formats.
_BOXES = frozenset(
    b"ftyp moov mdat free skip wide moof mfra sidx ssix styp uuid meta pdin emsg prft udta pnot PICT junk imda".split()
)
# First bytes of Matroska, AVI, Ogg, FLV, GIF and MPEG-TS (G), MPEG and raw H.264, and ASF.
_CONTAINERS = (
    b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"FLV", b"G", b"\x00\x00\x01", b"\x00\x00\x00\x01", b"0&\xb2u",
)  # fmt: skip
_MOST_BOXES = 100_000
_MOST_BYTES = 2**62
_UNKNOWN_RIFF = 0xFFFFFFFF  # written to a pipe


def declared_bytes(path: Path) -> int:
    """Size in bytes that the header of an MP4, AVI or Matroska file declares; 0 if it declares none."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            size = int.from_bytes(head[4:8], "little")
            return 8 + size if size < _UNKNOWN_RIFF else 0
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_bytes(head)
        return _mp4_bytes(file) if head[4:8] == b"ftyp" else 0


def _mp4_bytes(file: Any) -> int:
    """End of the last top-level box, without trailing bytes of no known box; 0 if there are too many boxes."""
    at = 0
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if head[4:8] not in _BOXES or size < 8 or at + size > _MOST_BYTES:
            return at
        at += size
    return 0


def _matroska_bytes(head: bytes) -> int:
    """End of the Segment element; 0 if its length is unknown, as in a live recording."""
    size, at = _ebml_size(head, 4)
    at += size
    if head[at : at + 4] != b"\x18S\x80g":
        return 0
    size, at = _ebml_size(head, at + 4)
    return at + size if size and at + size < _MOST_BYTES else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(value, end position) of an EBML variable-length size; 0 if it is unknown (all ones), invalid or truncated."""
    length = 9 - data[at].bit_length() if at < len(data) else 9
    if length > 8 or at + length > len(data):
        return 0, len(data)
    bits = 7 * length
    value = int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + length


def check_container(path: Path) -> None:
    """Raise VideoError unless a file begins like a container.

    The old FFmpeg in decord also opens lists of other files, under any name.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if not head.startswith(_CONTAINERS) and head[4:8] not in _BOXES:
        known = "MP4, Matroska, AVI, ..."
        raise VideoError(f"{path} is not a container that decord reads ({known}): use --decoder pyav")

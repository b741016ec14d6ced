"""How long a file is by its own header, to tell one that is cut short. A header that makes no sense tells nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import VideoError

# What stands at the top of MP4, MOV and their kin.
_BOXES = frozenset(
    b"ftyp moov mdat free skip wide moof mfra sidx ssix styp uuid meta pdin emsg prft udta pnot PICT junk imda".split()
)
# What Matroska, AVI, Ogg, FLV, GIF and MPEG-TS (G), MPEG and raw H.264, and ASF begin with.
_CONTAINERS = (
    b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"FLV", b"G", b"\x00\x00\x01", b"\x00\x00\x00\x01", b"0&\xb2u",
)  # fmt: skip
_MOST_BOXES = 100_000
_MOST_BYTES = 2**62
_UNKNOWN_RIFF = 0xFFFFFFFF  # written to a pipe


def declared_bytes(path: Path) -> int:
    """Bytes that an MP4, AVI or Matroska file says it has; 0 where its header does not tell."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            size = int.from_bytes(head[4:8], "little")
            return 8 + size if size < _UNKNOWN_RIFF else 0
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_bytes(head)
        return _mp4_bytes(file) if head[4:8] == b"ftyp" else 0


def _mp4_bytes(file: Any) -> int:
    """End of the last top-level box; what follows the boxes and is none does not count. 0 where there are too many."""
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
    """End of the Segment element; 0 where it is of unknown length, as in a live recording."""
    size, at = _ebml_size(head, 4)
    at += size
    if head[at : at + 4] != b"\x18S\x80g":
        return 0
    size, at = _ebml_size(head, at + 4)
    return at + size if size and at + size < _MOST_BYTES else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of an EBML variable-length size; all ones mean unknown and read as 0,
    as does what is no size or lies outside the data."""
    length = 9 - data[at].bit_length() if at < len(data) else 9
    if length > 8 or at + length > len(data):
        return 0, len(data)
    bits = 7 * length
    value = int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + length


def check_container(path: Path) -> None:
    """VideoError for a file that does not begin as a container does: an old FFmpeg, as decord has, also opens lists of
    other files, whatever their names."""
    with path.open("rb") as file:
        head = file.read(16)
    if not head.startswith(_CONTAINERS) and head[4:8] not in _BOXES:
        known = "MP4, Matroska, AVI, ..."
        raise VideoError(f"{path} is of no container that is read with decord ({known}): use --decoder pyav")

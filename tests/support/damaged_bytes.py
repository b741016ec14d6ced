"""Damage to the bytes of a file, drawn from a seed."""

from __future__ import annotations

import random
import struct

KINDS = ("bit", "cut", "zeros", "noise", "longer", "head", "swap", "gap", "double")


def damaged(data: bytes, random_: random.Random) -> bytes:
    """The bytes with one random damage, which sometimes changes nothing."""
    made, at = bytearray(data), random_.randrange(len(data))
    few = random_.randrange(1, 4096)
    kind = random_.choice(KINDS)
    if kind == "bit":
        made[at] ^= 1 << random_.randrange(8)
    elif kind == "cut":
        del made[at:]
    elif kind == "zeros":
        made[at:] = bytes(len(made) - at)
    elif kind == "noise":
        made[at : at + 9] = random_.randbytes(9)
    elif kind == "longer":
        made += random_.randbytes(few)
    elif kind == "head":
        made[:8] = struct.pack("<Q", random_.choice([0, 1, len(data), 1 << 32, (1 << 64) - 1]))
    elif kind == "swap":
        made = made[at:] + made[:at]
    elif kind == "gap":
        del made[at : at + few]
    else:
        made[at:at] = made[at : at + few]
    return bytes(made)

"""Order of loads in SASS, the GPU's machine code."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"(?:\*/|:\w)\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)\s+([^;]*);")


def most_in_flight(sass: str) -> int:
    """The largest number of 16-byte loads that a kernel issues before it uses a value of any of them."""
    most, pending, loads = 0, set(), 0
    for name, operands in _INSTRUCTION.findall(sass):
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        is_load = name.startswith("LDG.E.128")
        used = registers if name.startswith("ST") else registers[1:]
        if pending & set(used) or (not is_load and pending & set(registers[:1])):
            pending, loads = set(), 0
        if is_load:
            pending |= set(range(registers[0], registers[0] + 4))
            loads += 1
            most = max(most, loads)
    return most

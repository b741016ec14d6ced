"""How the tile kernels are launched, by direction. `python -m bench tune` times the alternatives on a GPU, and
`make gpu-pick` writes the fastest here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """warps: of a program. vectors: of 16 bytes a lane."""

    warps: int
    vectors: int


TUNING = {"forward": Tuning(warps=1, vectors=1), "backward": Tuning(warps=1, vectors=1)}

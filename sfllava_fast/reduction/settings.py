"""What the language model computes on of a video's tokens, as settings and as the texts that they are written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from .frames import check_ratio

if TYPE_CHECKING:
    from .pruning import Pruning

FORMS = "mixture:RATIO[:SCORER[:LAYERS]], prune:KEEP[:SCORER] or compress[:FILE]"
LEARNED = ".safetensors"  # a scorer that ends so is the file of a learned one


@dataclass(frozen=True)
class Mixture:
    """Mixture of depths (`mixture.MixtureOfDepths`): some layers compute on a share of each frame's tokens.

    ratio: that share, in (0, 1]. scorer: a training-free one's name, or the safetensors file of learned ones; None: the
    learned ones that ship with the model, else "norm". layers: the mixed ones; None: every other one, from the second.
    """

    ratio: float = 0.2
    scorer: str | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """RATIO, RATIO:SCORER or RATIO:SCORER:LAYERS, such as 0.2:norm:1,3,5; nothing is the default."""
        ratio, scorer, layers = (*text.split(":"), "", "", "")[:3]
        try:
            numbers = tuple(int(layer) for layer in layers.split(",")) if layers else None
            return cls(float(ratio or cls.ratio), scorer or None, numbers)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read the mixture {text!r}: write 0.2, 0.2:norm or 0.2:norm:1,3,5") from None

    def __str__(self) -> str:
        layers = ",".join(map(str, self.layers or ()))
        return f"{self.ratio:g}:{self.scorer or ''}:{layers}".rstrip(":")


@dataclass(frozen=True)
class CompressionFile:
    """Compression into the learned tokens of a file (`compression.Compression.load`); None: those that ship with the
    model."""

    file: str | None = None


def parse_reduction(text: str) -> Mixture | Pruning | CompressionFile:
    """The settings that a text means, one of FORMS. Raises InputError."""
    kind, _, rest = text.partition(":")
    if kind == "mixture":
        return Mixture.parse(rest)
    if kind == "prune":
        from .pruning import Pruning

        return Pruning.parse(rest)
    if kind == "compress":
        return CompressionFile(rest or None)
    raise InputError(f"unknown reduction {text!r}: write {FORMS}")

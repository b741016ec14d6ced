"""Settings of the reductions of a video's tokens, and their text forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..ops.token_offsets import check_ratio

if TYPE_CHECKING:
    from .pruning import Pruning
    from .scorers import Scorer

FORMS = "mixture[:RATIO[:SCORER[:LAYERS]]], fastv[:RATIO[:LAYER]], prune:KEEP[:SCORER] or compress[:FILE]"


@dataclass(frozen=True)
class Mixture:
    """Mixture of depths (`MixtureOfDepths`): some layers compute on a share of each frame's tokens.

    Attributes:
        ratio: The share, in (0, 1]. None stands for that of learned scorers, else 0.2.
        scorer: As in `MixtureOfDepths`, or the safetensors file of learned scorers. None stands for those that ship
            with the model, else "norm".
        layers: The mixed layers. None stands for those of learned scorers, else every other one, from the second.
    """

    ratio: float | None = None
    scorer: Scorer | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.file and self.layers is not None:
            raise InputError(f"{self.file} has the mixed layers: leave out layers")

    @property
    def file(self) -> str | None:
        """The file of learned scorers, or None."""
        return self.scorer if isinstance(self.scorer, str) and self.scorer.endswith(".safetensors") else None

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """The mixture of a text RATIO, RATIO:SCORER or RATIO:SCORER:LAYERS, such as 0.2:norm:1,3,5.

        Empty parts stand for the defaults. Raises InputError for any other text.
        """
        try:
            parts = text.split(":")
            ratio, scorer, layers = parts + [""] * (3 - len(parts))
            numbers = tuple(int(layer) for layer in layers.split(",")) if layers else None
            return cls(float(ratio) if ratio else None, scorer or None, numbers)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read the mixture {text!r}: write 0.2, 0.2:norm or 0.2:norm:1,3,5") from None

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:g}"
        scorer = self.scorer if isinstance(self.scorer, str) else type(self.scorer).__name__ if self.scorer else ""
        layers = ",".join(map(str, self.layers or ()))
        return f"{ratio}:{scorer}:{layers}".rstrip(":")


@dataclass(frozen=True)
class FastV:
    """FastV (`MixtureOfDepths.fastv`): layers from `layer` on compute on a share of a video's tokens.

    Attributes:
        ratio: The share, in (0, 1].
        layer: The paper's K.
    """

    ratio: float = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @classmethod
    def parse(cls, text: str) -> FastV:
        """The setting of a text RATIO or RATIO:LAYER, such as 0.25:3. Empty parts stand for the paper's values.

        Raises InputError for any other text.
        """
        ratio, _, layer = text.partition(":")
        try:
            share, first = float(ratio or cls.ratio), int(layer or cls.layer)
        except ValueError:
            raise InputError(f"cannot read the FastV setting {text!r}: write 0.5 or 0.5:2") from None
        return cls(share, first)

    def __str__(self) -> str:
        return f"{self.ratio:g}:{self.layer}"


@dataclass(frozen=True)
class CompressionFile:
    """Compression into learned tokens (`Compression`).

    Attributes:
        file: Their safetensors file. None stands for the tokens that ship with the model.
    """

    file: str | None = None


def parse_reduction(text: str) -> Mixture | FastV | Pruning | CompressionFile:
    """The settings of a text in one of FORMS. Raises InputError for any other text."""
    kind, _, rest = text.partition(":")
    if kind == "mixture":
        return Mixture.parse(rest)
    if kind == "fastv":
        return FastV.parse(rest)
    if kind == "prune":
        from .pruning import Pruning

        return Pruning.parse(rest)
    if kind == "compress":
        return CompressionFile(rest or None)
    raise InputError(f"unknown reduction {text!r}: write {FORMS}")

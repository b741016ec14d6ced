"""What of a video goes into the language model's keys and values: all of it, or what a reduction leaves.

Text always goes into every layer. What of the video a layer does not get has no place in its part of the cache
(`KvCache.skipped`), and what it gets keeps the position that it has among all: a question goes on behind the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layouts.plan import Plan
from ..model.weights import hash_weights
from ..ops.rows import gather_rows
from .settings import FORMS, CompressionFile, FastV, Mixture, parse_reduction

if TYPE_CHECKING:
    from ..model.generation import LanguageModel
    from ..model.kv_cache import KvCache
    from .compression import Compression
    from .mixture.wrapper import MixtureOfDepths
    from .pruning import Pruning

    Reduction = Mixture | FastV | Pruning | CompressionFile | Compression

# Files that a model may bring in its directory; not beside its weights, where others load all that there is.
SHIPPED_EXPERTS, SHIPPED_TOKENS = "reduction/mixture.safetensors", "reduction/compression.safetensors"


class Place(NamedTuple):
    """Where a video is in a sequence.

    start: its first token. frames: offsets [F + 1] of its frames' tokens, as `reduction.frames.token_frames` counts
    them. plan: what its layout does; None where no single one does.
    """

    start: int
    frames: tuple[int, ...]
    plan: Plan | None


class Chosen(NamedTuple):
    """What goes through the language model: embeds [rows, n, D], their positions [rows, n] where some were left out
    between them, and how many of the video's tokens each layer of the cache skips."""

    embeds: Tensor
    positions: Tensor | None
    skipped: Sequence[int]


class Prefilling:
    """All of a video's tokens, in every layer.

    text: the reduction, as it is told; None without one. asks_anew: whether what is kept depends on the question, so
    that each prefills the video again. adds: tokens that are put behind the video. context: where positions end.
    """

    asks_anew = False
    adds = 0

    def __init__(self, language: LanguageModel, context: int, text: str | None = None) -> None:
        self.language, self.context, self.text = language, context, text
        self.layers = language.config.num_hidden_layers
        self.undone = False

    def kind(self, place: Place) -> Hashable:
        """What rows must have in common to be in one cache; None where nothing will do."""
        if self.text is None:
            return ()
        return None if self.asks_anew else (place.start, place.frames)

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        """What is kept of embeds [rows, n, D], a video with the text around it."""
        return Chosen(embeds, None, [0] * self.layers)

    def prefill(self, cache: KvCache, chosen: Chosen, place: Place) -> None:
        """Keys and values of what was chosen, into an empty cache that skips what it does."""
        with self._computing(place):
            self.language.prefill(cache, chosen.embeds, chosen.positions)

    def extend(self, cache: KvCache, chosen: Chosen, place: Place) -> Tensor:
        """The same for one row that ends with a question: the logits [1, V] behind it."""
        with self._computing(place):
            return self.language.extend(cache, chosen.embeds, chosen.positions)

    def fingerprint(self) -> str:
        """Tells reductions apart, by what they learned too."""
        told = hashlib.sha256(str(self.text).encode())
        hash_weights(told, ((str(number), weight) for number, weight in enumerate(self._weights())))
        return told.hexdigest()

    def undo(self) -> None:
        """Put the language model back as it was. Nothing can be prefilled any more."""
        self.undone = True

    def _weights(self) -> Sequence[Tensor]:
        return ()

    def _computing(self, place: Place) -> AbstractContextManager[None]:
        return nullcontext()


class MixedPrefilling(Prefilling):
    """Mixture of depths, FastV among them: mixed layers hold the best of each frame."""

    def __init__(self, language: LanguageModel, context: int, mixture: MixtureOfDepths, text: str) -> None:
        super().__init__(language, context, text)
        self.mixture = mixture
        self.asks_anew = any(getattr(scorer, "needs_text", False) for scorer in mixture.scorers.values())

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        return Chosen(embeds, None, self.mixture.skipped(place.frames))

    def undo(self) -> None:
        self.mixture.undo()
        super().undo()

    def _weights(self) -> Sequence[Tensor]:
        return [*self.mixture.parameters(), *self.mixture.weights.values()]

    def _computing(self, place: Place) -> AbstractContextManager[None]:
        return self.mixture.on_frames(place.frames)


class PrunedPrefilling(Prefilling):
    """Pruning: what is left out goes into no layer."""

    def __init__(self, language: LanguageModel, context: int, pruning: Pruning) -> None:
        super().__init__(language, context, f"prune:{pruning}")
        self.pruning, self.asks_anew = pruning, pruning.needs_question

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        kept = torch.stack([self._kept(row, place) for row in embeds])
        total = place.plan.tokens["total"]
        stays = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        stays[:, place.start : place.start + total] = False
        positions = stays.scatter(1, place.start + kept, True).nonzero()[:, 1].view(len(embeds), -1)
        return Chosen(gather_rows(embeds, positions), positions, [total - kept.shape[1]] * self.layers)

    def kind(self, place: Place) -> Hashable:
        return None if self.pruning.below is not None else super().kind(place)

    def _kept(self, row: Tensor, place: Place) -> Tensor:
        if place.plan is None:
            raise InputError(f"{self.text} needs a layout's tokens, which those of a memory stream are not")
        stop = place.start + place.plan.tokens["total"]
        before, tokens, question = row.tensor_split([place.start, stop])
        return self.pruning.kept(tokens, place.plan, self.language.core, before, question if self.asks_anew else None)


class CompressedPrefilling(Prefilling):
    """Compression: learned tokens behind the video see it, and text sees them alone."""

    def __init__(self, language: LanguageModel, context: int, compression: Compression, text: str, model: nn.Module):
        # Keys that are kept cannot be computed again: no position may rescale them.
        super().__init__(language, min(context, language.rescales_after or context), text)
        self.compression, self.adds = compression, len(compression.tokens)
        self._patch = compression.install(model)

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        tokens = self.compression.tokens.to(embeds).expand(len(embeds), -1, -1)
        return Chosen(torch.cat([embeds, tokens], dim=1), None, [embeds.shape[1] - place.start] * self.layers)

    def prefill(self, cache: KvCache, chosen: Chosen, place: Place) -> None:
        whole = self.language.new_cache(*chosen.embeds.shape[:2])
        super().prefill(whole, chosen, place)
        cache.take_around(whole, place.start, place.start + cache.skipped[0])

    def undo(self) -> None:
        self._patch.undo()
        super().undo()

    def _weights(self) -> Sequence[Tensor]:
        return [self.compression.tokens, *self.compression.weights.values()]


def make_prefilling(
    reduction: str | Reduction | None, language: LanguageModel, model: nn.Module, context: int, home: Path | None
) -> Prefilling:
    """What prefills this model's videos. home: where files that it brings would be. Raises InputError, or
    CheckpointError for a file, with the model as it was."""
    if reduction is None:
        return Prefilling(language, context)
    if (getattr(language.config, "sliding_window", None) or context) < context:
        raise InputError("this model's attention has a sliding window, in which no token may be missing: no reduction")
    text = reduction if isinstance(reduction, str) else "compress"
    reduction = parse_reduction(reduction) if isinstance(reduction, str) else reduction
    if isinstance(reduction, (Mixture, FastV)):
        return MixedPrefilling(language, context, *_mix(model, reduction, home))
    from .compression import Compression
    from .pruning import Pruning

    if isinstance(reduction, Pruning):
        return PrunedPrefilling(language, context, reduction)
    if isinstance(reduction, CompressionFile):
        file = reduction.file or _shipped(home, SHIPPED_TOKENS)
        if file is None:
            raise InputError("this model brings no compression tokens: name a file of them, compress:FILE")
        reduction = Compression.load(file)
    if not isinstance(reduction, Compression):
        raise InputError(f"{reduction!r} is no reduction: pass its settings, or write {FORMS}")
    return CompressedPrefilling(language, context, reduction, text, model)


def _mix(model: nn.Module, settings: Mixture | FastV, home: Path | None) -> tuple[MixtureOfDepths, str]:
    """The model wrapped, and how that is told."""
    from .mixture.wrapper import MixtureOfDepths

    if isinstance(settings, FastV):
        return MixtureOfDepths.fastv(model, settings.ratio, settings.layer), f"fastv:{settings}"
    text, file = f"mixture:{settings}".rstrip(":"), settings.file
    if settings.scorer is None and settings.layers is None:
        file = _shipped(home, SHIPPED_EXPERTS)
    if file:
        return MixtureOfDepths.load(model, file, settings.ratio), text
    ratio = 0.2 if settings.ratio is None else settings.ratio
    return MixtureOfDepths(model, ratio, settings.scorer or "norm", settings.layers), text


def _shipped(home: Path | None, name: str) -> Path | None:
    return home / name if home is not None and (home / name).is_file() else None

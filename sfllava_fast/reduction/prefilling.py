"""Prefilling a video into the KV cache: all of its tokens, or what a reduction keeps.

Text always goes into every layer. A token that a layer leaves out takes no room in the layer's part of the cache
(`KvCache.skipped`). Kept tokens keep their positions, and a question begins after the last position of the video.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import ContextError, InputError
from ..layouts.plan import Plan
from ..model.shipped import compression_file, mixture_file
from ..model.weights import hash_weights
from ..ops.rows import gather_rows
from .settings import FORMS, CompressionFile, FastV, Mixture, parse_reduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.generation import LanguageModel
    from ..model.kv_cache import KvCache
    from .compression import Compression
    from .mixture.wrapper import MixtureOfDepths
    from .pruning import Pruning

    Reduction = Mixture | FastV | Pruning | CompressionFile | Compression


class Place(NamedTuple):
    """Where a video is in a sequence.

    Attributes:
        start: Position of its first token.
        token_offsets: Offsets [F + 1] of its frames' tokens in the sequence (`ops.token_offsets.token_frames`).
        plan: Its layout's plan; None if its tokens are not those of one layout.
    """

    start: int
    token_offsets: tuple[int, ...]
    plan: Plan | None


class Chosen(NamedTuple):
    """What goes through the language model.

    Attributes:
        embeds: [rows, n, D].
        positions: [rows, n] if tokens between them were left out, else None.
        skipped: How many of the video's tokens each layer of the cache leaves out.
    """

    embeds: Tensor
    positions: Tensor | None
    skipped: Sequence[int]


class Prefilling:
    """Puts all of a video's tokens into every layer.

    Attributes:
        label: The reduction, as `Answer.reduction` reports it; None without one.
        depends_on_question: Whether the kept tokens depend on the question: each then prefills the video again.
        extra_tokens: Tokens that are appended after the video.
        context: Positions that there are.
        undone: Whether the language model is again as it was; nothing can be prefilled then.
    """

    depends_on_question = False
    extra_tokens = 0

    def __init__(self, language: LanguageModel, context: int, label: str | None = None) -> None:
        self.language, self.context, self.label = language, context, label
        self.layers = language.config.num_hidden_layers
        self.undone = False

    def length(self, tokens: int) -> int:
        """Positions that a prompt's start and a video of `tokens` together take."""
        return tokens + self.extra_tokens

    def check_context(self, prompt: int, video: int, new: int, remedy: str) -> None:
        """Raise ContextError if a prompt, a video and an answer of this many tokens exceed the context together."""
        video = self.length(video)
        total = prompt + video + new
        if total > self.context:
            raise ContextError(
                f"{video} video tokens + {prompt} of prompt + {new} new = {total} exceed the context of "
                f"{self.context}: {remedy}"
            )

    def batch_key(self, place: Place) -> Hashable:
        """Rows with equal keys can share a cache; None: this row can share none."""
        if self.label is None:
            return ()
        return None if self.depends_on_question else (place.start, place.token_offsets)

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        """What is kept of embeds [rows, n, D]: a video with the text around it."""
        return Chosen(embeds, None, [0] * self.layers)

    def prefill(self, cache: KvCache, chosen: Chosen, place: Place) -> None:
        """Write the keys and values of what was chosen into an empty cache."""
        with self._computing(place):
            self.language.prefill(cache, chosen.embeds, chosen.positions)

    def extend(self, cache: KvCache, chosen: Chosen, place: Place) -> Tensor:
        """The same for one row that ends with a question; returns the logits [1, V] after it."""
        with self._computing(place):
            return self.language.extend(cache, chosen.embeds, chosen.positions)

    def fingerprint(self) -> str:
        """A hash of the reduction and its learned weights."""
        digest = hashlib.sha256(str(self.label).encode())
        hash_weights(digest, ((str(number), weight) for number, weight in enumerate(self._weights())))
        return digest.hexdigest()

    def undo(self) -> None:
        """Restore the language model."""
        self.undone = True

    def _weights(self) -> Sequence[Tensor]:
        return ()

    def _computing(self, place: Place) -> AbstractContextManager[None]:
        return nullcontext()


class MixedPrefilling(Prefilling):
    """Mixture of depths and FastV: mixed layers hold the tokens of each frame that score best."""

    def __init__(self, language: LanguageModel, context: int, mixture: MixtureOfDepths, label: str) -> None:
        super().__init__(language, context, label)
        self.mixture = mixture
        self.depends_on_question = any(getattr(scorer, "needs_text", False) for scorer in mixture.scorers.values())

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        return Chosen(embeds, None, self.mixture.skipped(place.token_offsets))

    def undo(self) -> None:
        self.mixture.undo()
        super().undo()

    def _weights(self) -> Sequence[Tensor]:
        return [*self.mixture.parameters(), *self.mixture.weights.values()]

    def _computing(self, place: Place) -> AbstractContextManager[None]:
        return self.mixture.on_frames(place.token_offsets)


class PrunedPrefilling(Prefilling):
    """Pruning: tokens that are left out go into no layer."""

    def __init__(self, language: LanguageModel, context: int, pruning: Pruning) -> None:
        super().__init__(language, context, f"prune:{pruning}")
        self.pruning, self.depends_on_question = pruning, pruning.needs_question

    def choose(self, embeds: Tensor, place: Place) -> Chosen:
        kept = torch.stack([self._kept(row, place) for row in embeds])
        assert place.plan is not None  # _kept has checked it
        total = place.plan.tokens["total"]
        stays = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        stays[:, place.start : place.start + total] = False
        positions = stays.scatter(1, place.start + kept, True).nonzero()[:, 1].view(len(embeds), -1)
        return Chosen(gather_rows(embeds, positions), positions, [total - kept.shape[1]] * self.layers)

    def batch_key(self, place: Place) -> Hashable:
        return None if self.pruning.below is not None else super().batch_key(place)

    def _kept(self, row: Tensor, place: Place) -> Tensor:
        if place.plan is None:
            raise InputError(
                f"{self.label} needs the tokens of a layout, and a memory stream has others: leave the reduction out"
            )
        stop = place.start + place.plan.tokens["total"]
        before, tokens, question = row.tensor_split([place.start, stop])
        return self.pruning.kept(
            tokens, place.plan, self.language.core, before, question if self.depends_on_question else None
        )


class CompressedPrefilling(Prefilling):
    """Compression: learned tokens after the video attend to it, and text attends to them instead of the video."""

    def __init__(
        self, language: LanguageModel, context: int, compression: Compression, label: str, model: PreTrainedModel
    ) -> None:
        # Kept keys cannot be computed again: no position may rescale them.
        super().__init__(language, min(context, language.rescales_after or context), label)
        self.compression, self.extra_tokens = compression, len(compression.tokens)
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
    reduction: str | Reduction | None,
    language: LanguageModel,
    model: PreTrainedModel,
    context: int,
    embedded: bool = False,
) -> Prefilling:
    """What prefills a model's videos.

    Args:
        reduction: A text (`settings.FORMS`), its settings, or None.
        language: The model's language model.
        model: The transformers model, which a reduction may change.
        context: Positions of the language model.
        embedded: Whether it is the embedded model, whose learned reductions are in the package.

    Raises:
        InputError: For an unknown reduction, or one that does not fit the model.
        CheckpointError: For a file that is not one of a reduction. The model is unchanged then.
    """
    if reduction is None:
        return Prefilling(language, context)
    if (getattr(language.config, "sliding_window", None) or context) < context:
        raise InputError(
            "this model's attention has a sliding window, in which no token may be missing: take no reduction"
        )
    label = reduction if isinstance(reduction, str) else "compress"
    reduction = parse_reduction(reduction) if isinstance(reduction, str) else reduction
    if isinstance(reduction, (Mixture, FastV)):
        return MixedPrefilling(language, context, *_mix(model, reduction, embedded))
    from .compression import Compression
    from .pruning import Pruning

    if isinstance(reduction, Pruning):
        return PrunedPrefilling(language, context, reduction)
    if isinstance(reduction, CompressionFile):
        file = reduction.file or (compression_file() if embedded else None)
        if file is None:
            raise InputError("this model has no compression tokens of its own: name a file of them, compress:FILE")
        reduction = Compression.load(file)
    if not isinstance(reduction, Compression):
        raise InputError(f"{reduction!r} is no reduction: pass its settings, or write {FORMS}")
    return CompressedPrefilling(language, context, reduction, label, model)


def _mix(model: PreTrainedModel, settings: Mixture | FastV, embedded: bool) -> tuple[MixtureOfDepths, str]:
    """The wrapped model, and the label of its reduction."""
    from .mixture.wrapper import MixtureOfDepths

    if isinstance(settings, FastV):
        return MixtureOfDepths.fastv(model, settings.ratio, settings.layer), f"fastv:{settings}"
    label = f"mixture:{settings}".rstrip(":")
    own = embedded and settings.scorer is None and settings.layers is None
    if file := mixture_file() if own else settings.file:
        return MixtureOfDepths.load(model, file, settings.ratio), label
    ratio = 0.2 if settings.ratio is None else settings.ratio
    return MixtureOfDepths(model, ratio, settings.scorer or "norm", settings.layers), label

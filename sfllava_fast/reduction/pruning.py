"""Pruning of a video's tokens before the language model, without training. Kept tokens keep their positions.

FastV (arXiv 2403.06764) prunes inside the model: the first K layers run on all tokens, later layers on those that
receive the most attention from the prompt's last token in layer K. Here tokens are scored before the prefill, so that
the first layers and their KV cache become smaller too. Scoring by attention runs the first layers twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, check_count
from ..layouts.plan import Plan
from ..ops.backends.reference import token_rows
from ..ops.rows import attention_received
from ..ops.token_offsets import check_ratio, kept_of
from .scorers import LayerInput, attention_of, queries_and_keys

SCORERS = ("similarity", "attention", "question", "norm")
TokenScorer = Callable[[Tensor, Plan], Tensor]


class Pruned(NamedTuple):
    """The result of `prune_tokens`.

    Attributes:
        tokens: [..., k, D].
        kept: int64 [..., k], their positions among all tokens, ascending.
    """

    tokens: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Pruning:
    """Selects the tokens of a video that the language model gets.

    Attributes:
        keep: A number of tokens, or their share, a float in (0, 1]. Of equal scores the first are kept.
        scorer: "similarity" (see `novelty`), "attention" received from the video's last tokens, "question" for
            attention received from the question's last tokens, "norm", or a function of tokens [S, D] and plan that
            returns scores [S], of which the highest are kept.
        below: Instead of `keep`, for "similarity" only. Keeps the first frame of each pathway, and as many tokens as
            needed for every dropped token to have at least this cosine similarity to the nearest kept one in time at
            the same place.
        layer: The decoder layer, from 0, whose attention is used; the layers before it are run. FastV with K = 2
            corresponds to layer 1 and one query of the question.
        queries: Maximum number of last tokens whose attention is used.
        separators: Whether separators are kept, in addition to `keep`; otherwise all are dropped.

    Raises:
        InputError: If a value is wrong, or unless exactly one of `keep` and `below` is given.
    """

    keep: int | float | None = None
    scorer: str | TokenScorer = "similarity"
    below: float | None = None
    layer: int = 1
    queries: int = 64
    separators: bool = True

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.below is None):
            raise InputError("pruning needs either keep, a number or share of the tokens, or below, a similarity")
        if isinstance(self.scorer, str) and self.scorer not in SCORERS:
            raise InputError(f"unknown scorer {self.scorer!r} of pruning: choose one of {', '.join(SCORERS)}")
        if isinstance(self.keep, float):
            check_ratio(self.keep)
        elif self.keep is not None:
            check_count("keep", self.keep)
        if self.below is not None and (self.scorer != "similarity" or not 0 < self.below <= 1):
            raise InputError(f"below must be above 0 and at most 1, with scorer='similarity', not {self.below!r}")
        check_count("queries", self.queries)

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """The pruning of a text KEEP, KEEP:SCORER or KEEP:SCORER,NAME=NUMBER,...

        KEEP is like 64, 0.25 or below0.95; NAME is layer, queries or separators. Raises InputError for any other text.
        """
        amount, _, rest = text.partition(":")
        scorer, *settings = rest.split(",")
        try:
            below = float(amount.removeprefix("below")) if amount.startswith("below") else None
            keep = None if below is not None else float(amount) if "." in amount else int(amount)
            numbers: dict[str, Any] = {name: int(value) for name, value in (s.split("=") for s in settings)}
            return cls(keep, scorer or "similarity", below, **numbers)
        except InputError:
            raise
        except (ValueError, TypeError):
            form = "write 64, 0.25 or below0.95, then :SCORER, then ,layer=1 or ,queries=1"
            raise InputError(f"cannot read the pruning {text!r}: {form}") from None

    def __str__(self) -> str:
        amount = self.keep if self.below is None else f"below{self.below}"
        scorer = self.scorer if isinstance(self.scorer, str) else self.scorer.__name__
        others = {field.name: getattr(self, field.name) for field in fields(self)[3:]}
        changed = {name: int(value) for name, value in others.items() if value != getattr(Pruning, name)}
        return f"{amount}:{scorer}" + "".join(f",{name}={value}" for name, value in changed.items())

    @property
    def needs_question(self) -> bool:
        """Whether the kept tokens depend on the question."""
        return self.scorer == "question"

    @property
    def needs_decoder(self) -> bool:
        """Whether the scores need the language model's decoder."""
        return self.scorer in ("attention", "question")

    def most(self, plan: Plan) -> int:
        """Maximum number of kept tokens, exact unless `below` is set. Raises InputError if the plan has fewer."""
        separators = len(plan.separator_rows)
        pooled = plan.tokens["total"] - separators
        keep = pooled if self.keep is None else self.keep
        keep = kept_of(keep, pooled) if isinstance(keep, float) else keep
        if keep > pooled:
            raise InputError(f"keep={keep}, and the layout makes {pooled} tokens: lower keep")
        return keep + separators if self.separators else keep

    def kept(
        self,
        tokens: Tensor,
        plan: Plan,
        decoder: nn.Module | None = None,
        before: Tensor | None = None,
        question: Tensor | None = None,
    ) -> Tensor:
        """The positions of the kept tokens.

        Args:
            tokens: [S, D], the tokens of the plan.
            plan: The plan of one video.
            decoder: The language model's decoder, such as LlamaModel, if `needs_decoder`.
            before: Embeddings [n, D] of the text before the video.
            question: Embeddings [n, D] of the text after the video, if `needs_question`.

        Returns:
            int64 [k], ascending.

        Raises:
            InputError: If an argument is missing or wrong, or the scores are.
        """
        if len(plan.lengths) != 1 or tokens.shape[:-1] != (plan.tokens["total"],):
            raise InputError(f"tokens must be [{plan.tokens['total']}, D], one video's, not {list(tokens.shape)}")
        most = self.most(plan)
        scores = self.scores(tokens, plan, decoder, before, question)
        separators = torch.tensor([row for row, _ in plan.separator_rows], dtype=torch.long, device=tokens.device)
        scores = scores.index_fill(0, separators, float("inf") if self.separators else float("-inf"))
        if self.below is None:
            return top(scores, most)
        first = torch.cat([index[:1].flatten() for index in places(plan, tokens.device)])
        return (scores > -self.below).index_fill(0, first, True).nonzero()[:, 0]

    @torch.no_grad()
    def scores(
        self,
        tokens: Tensor,
        plan: Plan,
        decoder: nn.Module | None = None,
        before: Tensor | None = None,
        question: Tensor | None = None,
    ) -> Tensor:
        """Scores float32 [S] of all tokens, including separators. Arguments and errors are those of `kept`."""
        if callable(self.scorer):
            scores = self.scorer(tokens, plan)
        elif self.needs_decoder:
            scores = self._received(tokens, decoder, before, question)
        else:
            scores = novelty(tokens, plan) if self.scorer == "similarity" else tokens.float().norm(dim=-1)
        return check_scores(scores, tokens).float()

    def _received(
        self, tokens: Tensor, decoder: nn.Module | None, before: Tensor | None, question: Tensor | None
    ) -> Tensor:
        if decoder is None or (self.needs_question and question is None):
            needed = "the language model and a question" if self.needs_question else "the language model"
            raise InputError(f"pruning by {self.scorer} needs {needed}")
        start, last = 0 if before is None else len(before), question if self.needs_question else None
        embeds = torch.cat([part for part in (before, tokens, last) if part is not None])
        entered = layer_input(decoder, embeds[None], start, start + len(tokens), self.layer)
        queries, keys = queries_and_keys(entered, min(self.queries, len(tokens if last is None else last)))
        received = attention_received(queries, keys, attention_of(entered.layer).scaling)
        return received[0, entered.start : entered.stop]


def prune_tokens(tokens: Tensor, scores: Tensor, keep: int) -> Pruned:
    """The tokens with the highest scores, in their order. Gradients flow to the tokens, not to the scores.

    Args:
        tokens: [..., S, D].
        scores: [..., S]. Of equal scores the first are kept.
        keep: Number of tokens to keep, 1 to S.

    Raises:
        InputError: If the scores have another shape or NaN, or if `keep` is not 1 to S.
    """
    check_count("keep", keep)
    if keep > tokens.shape[-2]:
        raise InputError(f"keep={keep}, and there are {tokens.shape[-2]} tokens: lower keep")
    kept = top(check_scores(scores, tokens), keep)
    return Pruned(tokens.gather(-2, kept[..., None].expand(*kept.shape, tokens.shape[-1])), kept)


def top(scores: Tensor, keep: int) -> Tensor:
    """Positions int64 [..., keep], ascending, of the highest of scores [..., S]; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(dim=-1).values


def check_scores(scores: Tensor, tokens: Tensor) -> Tensor:
    """The scores, if there is one real number a token. Raises InputError otherwise."""
    if not isinstance(scores, Tensor) or scores.is_complex():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"scores must be a torch.Tensor of real numbers, not {found}")
    if scores.shape != tokens.shape[:-1]:
        raise InputError(f"scores must be {list(tokens.shape[:-1])}, one a token, not {list(scores.shape)}")
    if scores.isnan().any():
        raise InputError("some scores are NaN: check the tokens and the scorer")
    return scores


def novelty(tokens: Tensor, plan: Plan) -> Tensor:
    """How different each token is from its neighbours in time: minus a cosine similarity.

    At each place of a pathway, tokens join a set one by one, beginning with the first frame's. The next one is the
    token that is least similar to the nearest joined tokens in time, before and after it. Its score is minus that
    similarity, but at most the score of the token that joined before it; so the tokens above any threshold are those
    that joined first. A still scene adds no tokens; a slow fade adds its end, then its middle, and so on. Tokens of the
    first frame are compared with the mean of the frame's other tokens.

    Args:
        tokens: [S, D], the tokens of the plan.
        plan: The plan.

    Returns:
        float32 [S], -inf for zeros and separators.
    """
    scores = tokens.new_full((len(tokens),), float("-inf"), dtype=torch.float32)
    for index in places(plan, tokens.device):
        if len(index):
            scores[index] = _novelty(F.normalize(tokens[index].float(), dim=-1))
    return scores


def places(plan: Plan, device: torch.device | None = None) -> list[Tensor]:
    """The tokens of each pathway by frame and place in the frame, int64 [frames, places]."""
    rows = token_rows(plan, device or torch.device("cpu"))
    return [of_path.view(-1, path.tokens_per_frame) for of_path, path in zip(rows, plan.pathways)]


def _novelty(rows: Tensor) -> Tensor:
    """Scores [F, n] of unit vectors [F, n, D]."""
    count, width = rows.shape[:2]
    alike = torch.einsum("fnd,gnd->nfg", rows, rows).round(decimals=5)  # equal tokens have equal similarities
    alike = F.pad(alike, (0, 1), value=-1.0)  # for places after the last frame
    frames, every = torch.arange(count, device=rows.device), torch.arange(width, device=rows.device)
    before, after = frames.new_zeros(width, count), frames.new_full((width, count), count)
    scores, most = rows.new_zeros(width, count), rows.new_full((width,), -1.0)
    scores[:, 0] = -(rows[0] * F.normalize(rows[0].sum(0) - rows[0], dim=-1)).sum(-1)
    joined = (frames == 0).expand(width, count).clone()
    for _ in range(count - 1):
        near = alike.gather(2, torch.stack([before, after], dim=2)).amax(2)
        value, new = near.masked_fill(joined, 2.0).min(1)  # of equal ones the first
        most = most.maximum(value)
        scores[every, new], joined[every, new] = -most, True
        before = before.where(frames <= new[:, None], before.maximum(new[:, None]))
        after = after.where(frames >= new[:, None], after.minimum(new[:, None]))
    return scores.T


class _Reached(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


def layer_input(decoder: Any, embeds: Tensor, start: int, stop: int, number: int) -> LayerInput:
    """The input of a decoder layer. Runs the layers before it.

    Args:
        decoder: The decoder.
        embeds: [B, S, D].
        start: First vision token.
        stop: End of the vision tokens.
        number: The layer, from 0.

    Raises:
        InputError: If the decoder has no such layer.
    """
    if number not in range(len(decoder.layers)):
        raise InputError(f"layer={number}, and the language model has {len(decoder.layers)}: 0 is the first")
    layer: nn.Module = decoder.layers[number]
    seen: dict[str, Any] = {}

    def stop_here(module: nn.Module, positional: tuple, arguments: dict) -> None:
        seen.update(arguments, hidden=positional[0] if positional else arguments["hidden_states"])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop_here, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            decoder(inputs_embeds=embeds, use_cache=False)
    finally:
        handle.remove()
    return LayerInput(seen.pop("hidden"), start, stop, layer, seen)

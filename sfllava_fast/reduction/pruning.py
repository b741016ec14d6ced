"""Pruning of a video's tokens without training: those that matter go into the language model, at the positions that
they had, and every layer then holds no others.

FastV (arXiv 2403.06764) prunes inside the model: its first K layers run on every token, the others on those that the
prompt's last token attends to most in layer K. Here tokens are scored before the model proper, so that its first
layers, and their keys and values, shrink too; by attention, that costs the first layers twice.
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
from .scorers import LayerInput, queries_and_keys

SCORERS = ("similarity", "attention", "question", "norm")
TokenScorer = Callable[[Tensor, Plan], Tensor]

_CPU = torch.device("cpu")


class Pruned(NamedTuple):
    """tokens: [..., k, D]. kept: int64 [..., k], their positions among all tokens, ascending."""

    tokens: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Pruning:
    """Which of a video's tokens the language model gets.

    keep: a number of tokens, or a share of them, a float in (0, 1]; of equal scores the first are kept. below: instead
        of keep, by similarity alone: the first frame of each pathway, and as many as it takes for each token that is
        left out to be at least so similar to one kept at its place, the next before or behind it.
    scorer: "similarity" (see `novelty`); "attention", received from the video's last tokens; "question", received from
        the question's; "norm"; or a function of tokens [S, D] and plan to scores [S], higher = keep.
    layer: the decoder layer whose attention it is, counted from 0; those before it are run. queries: how many last
        tokens attend, at most. FastV with K = 2 has layer 1 and one query, of the question.
    separators: whether those stay, beside what `keep` says; else they go.
    """

    keep: int | float | None = None
    scorer: str | TokenScorer = "similarity"
    below: float | None = None
    layer: int = 1
    queries: int = 64
    separators: bool = True

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.below is None):
            raise InputError("pruning needs keep, a number or share of the tokens, or else below, a similarity")
        if isinstance(self.scorer, str) and self.scorer not in SCORERS:
            raise InputError(f"unknown scorer {self.scorer!r} of pruning: choose one of {', '.join(SCORERS)}")
        if isinstance(self.keep, float):
            check_ratio(self.keep)
        elif self.keep is not None:
            check_count("keep", self.keep)
        if self.below is not None and (self.scorer != "similarity" or not 0 < self.below <= 1):
            raise InputError(f"below={self.below!r}: it is a similarity above 0 and at most 1, of scorer='similarity'")
        check_count("queries", self.queries)

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """KEEP, KEEP:SCORER or KEEP:SCORER,NAME=NUMBER,...; KEEP is 64, 0.25 or below0.95, NAME layer, queries or
        separators."""
        amount, _, rest = text.partition(":")
        scorer, *settings = rest.split(",")
        try:
            below = float(amount.removeprefix("below")) if amount.startswith("below") else None
            keep = None if below is not None else float(amount) if "." in amount else int(amount)
            numbers: dict[str, Any] = {name: int(number) for name, number in (pair.split("=") for pair in settings)}
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
        """Whether another question keeps other tokens."""
        return self.scorer == "question"

    @property
    def needs_decoder(self) -> bool:
        """Whether the scorer runs layers of the language model."""
        return self.scorer in ("attention", "question")

    def most(self, plan: Plan) -> int:
        """How many tokens are kept at most; exactly so many unless `below` decides. Raises InputError where the plan
        has fewer than `keep`."""
        separators = len(plan.separator_rows)
        pooled = plan.tokens["total"] - separators
        keep = pooled if self.keep is None else self.keep
        keep = kept_of(keep, pooled) if isinstance(keep, float) else keep
        if keep > pooled:
            raise InputError(f"keep={keep}, and the layout makes {pooled} tokens: keep at most those")
        return keep + separators * self.separators

    def kept(
        self,
        tokens: Tensor,
        plan: Plan,
        decoder: Any | None = None,
        before: Tensor | None = None,
        question: Tensor | None = None,
    ) -> Tensor:
        """The positions that are kept, int64 [k], ascending.

        tokens: [S, D], those of the plan. decoder: the language model's, such as LlamaModel, where `needs_decoder`.
        before, question: embeddings [n, D] of what stands before the video and behind it; the latter where
        `needs_question`. Raises InputError.
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
        decoder: Any | None = None,
        before: Tensor | None = None,
        question: Tensor | None = None,
    ) -> Tensor:
        """How much each token matters, float32 [S]; separators have scores too. Arguments and errors are `kept`'s."""
        if callable(self.scorer):
            scores = self.scorer(tokens, plan)
        elif self.needs_decoder:
            scores = self._received(tokens, decoder, before, question)
        else:
            scores = novelty(tokens, plan) if self.scorer == "similarity" else tokens.float().norm(dim=-1)
        return check_scores(scores, tokens).float()

    def _received(self, tokens: Tensor, decoder: Any | None, before: Tensor | None, question: Tensor | None) -> Tensor:
        if decoder is None or (self.needs_question and question is None):
            asked = " and a question" * self.needs_question
            raise InputError(f"pruning by {self.scorer} needs the language model{asked}")
        start, last = 0 if before is None else len(before), question if self.needs_question else None
        embeds = torch.cat([part for part in (before, tokens, last) if part is not None])
        entered = layer_input(decoder, embeds[None], start, start + len(tokens), self.layer)
        queries, keys = queries_and_keys(entered, min(self.queries, len(tokens if last is None else last)))
        received = attention_received(queries, keys, entered.layer.self_attn.scaling)
        return received[0, entered.start : entered.stop]


def prune_tokens(tokens: Tensor, scores: Tensor, keep: int) -> Pruned:
    """The `keep` of tokens [..., S, D] whose scores [..., S] are highest, in their order; of equal scores the first.

    Differentiable by the tokens, not by the scores. Raises InputError for scores of another shape, NaN among them, or
    a `keep` that is not 1 to S.
    """
    check_count("keep", keep)
    if keep > tokens.shape[-2]:
        raise InputError(f"keep={keep} of {tokens.shape[-2]} tokens: keep at most those")
    kept = top(check_scores(scores, tokens), keep)
    return Pruned(tokens.gather(-2, kept[..., None].expand(*kept.shape, tokens.shape[-1])), kept)


def top(scores: Tensor, keep: int) -> Tensor:
    """Where the `keep` highest of scores [..., S] are, int64 [..., keep], ascending; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(dim=-1).values


def check_scores(scores: Tensor, tokens: Tensor) -> Tensor:
    """The scores; InputError unless they are one a token, and real numbers."""
    if not isinstance(scores, Tensor) or scores.is_complex():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"scores must be a torch.Tensor of real numbers, not {found}")
    if scores.shape != tokens.shape[:-1]:
        raise InputError(f"scores must be {list(tokens.shape[:-1])}, one a token, not {list(scores.shape)}")
    if scores.isnan().any():
        raise InputError("some scores are NaN: check the tokens and the scorer")
    return scores


def novelty(tokens: Tensor, plan: Plan) -> Tensor:
    """How unlike its neighbours in time each token is, float32 [S]: minus a cosine similarity.

    At each place of a pathway the first frame's token begins, and then joins, again and again, the one that is least
    like its nearest joined ones in time, before and behind it; that is its score, or the least of those that joined
    earlier, so that the tokens above any bound are those that joined first. A still scene adds nothing, and a slow
    fade, almost still from frame to frame, its end, then its middle, and so on. The first frame's tokens, which have
    none before them, are compared with the mean of that frame's others.
    """
    scores = tokens.new_full((len(tokens),), float("-inf"), dtype=torch.float32)  # zeros stand for nothing
    for index in places(plan, tokens.device):
        if len(index):
            scores[index] = _novelty(F.normalize(tokens[index].float(), dim=-1))
    return scores


def places(plan: Plan, device: torch.device = _CPU) -> list[Tensor]:
    """Each pathway's tokens by frame and place, int64 [frames, places]: a column is one place as time goes on."""
    rows = token_rows(plan, device)
    return [of_path.view(-1, path.tokens_per_frame) for of_path, path in zip(rows, plan.pathways)]


def _novelty(rows: Tensor) -> Tensor:
    """Scores [F, n] of unit vectors [F, n, D]."""
    count, width = rows.shape[:2]
    alike = torch.einsum("fnd,gnd->nfg", rows, rows).round(decimals=5)  # tokens that are the same are alike the same
    alike = F.pad(alike, (0, 1), value=-1.0)  # behind the last frame there is none
    frames, every = torch.arange(count, device=rows.device), torch.arange(width, device=rows.device)
    before, behind = frames.new_zeros(width, count), frames.new_full((width, count), count)
    scores, most = rows.new_zeros(width, count), rows.new_full((width,), -1.0)
    scores[:, 0] = -(rows[0] * F.normalize(rows[0].sum(0) - rows[0], dim=-1)).sum(-1)
    joined = (frames == 0).expand(width, count).clone()
    for _ in range(count - 1):
        near = alike.gather(2, torch.stack([before, behind], dim=2)).amax(2)
        value, new = near.masked_fill(joined, 2.0).min(1)  # of equals the first
        most = most.maximum(value)
        scores[every, new], joined[every, new] = -most, True
        before = before.where(frames <= new[:, None], before.maximum(new[:, None]))
        behind = behind.where(frames >= new[:, None], behind.minimum(new[:, None]))
    return scores.T


class _Reached(Exception):
    """Raised out of a forward pass at the layer whose input is wanted."""


def layer_input(decoder: Any, embeds: Tensor, start: int, stop: int, number: int) -> LayerInput:
    """What enters decoder layer `number` for embeds [B, S, D], whose vision tokens are [start, stop); the layers before
    it are run, with whatever attention the model has."""
    if number not in range(len(decoder.layers)):
        raise InputError(f"layer={number}, and the language model has {len(decoder.layers)}: 0 is the first")
    layer = decoder.layers[number]
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

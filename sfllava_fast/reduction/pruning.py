"""Pruning of a video's tokens without training: those that matter go into the language model, at the positions that
they had, and every layer then holds no others.

FastV (arXiv 2403.06764) prunes inside the model: its first K layers run on every token, the others on those that the
prompt's last token attends to most in layer K. Here tokens are scored before the model proper, so that its first
layers, and their keys and values, shrink too; by attention, that costs the first layers twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, check_count
from ..plan import Plan
from .frames import check_ratio, kept_of
from .scorers import AttentionReceived, LayerInput, Norm

SCORERS = ("similarity", "attention", "question", "norm", "random")


class Pruned(NamedTuple):
    """tokens: [..., k, D]. kept: int64 [..., k], their positions among all tokens, ascending."""

    tokens: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Pruning:
    """Which of a video's tokens the language model gets.

    keep: a number of tokens, or a share of them, a float in (0, 1]; of equal scores the first are kept. below: instead
        of keep, for similarity alone: as many as it takes for each token that is left out to be at least so similar to
        one kept beside it.
    scorer: "similarity" (to the tokens at the same place of other frames), "attention" (received from the video's last
        tokens), "question" (the same, from the question), "norm", "random"; or a module that scores a LayerInput as
        those of `scorers` do, shown the video alone.
    layer: whose attention; the layers before it are run. queries: how many last tokens attend.
    separators: whether those stay; they come on top of keep. Without it, they go.
    """

    keep: int | float | None = None
    scorer: str | nn.Module = "similarity"
    below: float | None = None
    layer: int = 1
    queries: int = 1
    separators: bool = True

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.below is None):
            raise InputError("pruning needs keep, a number or share of the tokens, or below, a similarity; not both")
        if isinstance(self.scorer, str) and self.scorer not in SCORERS:
            raise InputError(f"unknown scorer {self.scorer!r} of pruning: choose one of {', '.join(SCORERS)}")
        if isinstance(self.keep, float):
            check_ratio(self.keep)
        elif self.keep is not None:
            check_count("keep", self.keep)
        if self.below is not None and (self.scorer != "similarity" or not 0 < self.below <= 1):
            raise InputError(f"below={self.below!r}: it is a similarity above 0 and at most 1, of scorer='similarity'")

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """KEEP or KEEP:SCORER, where KEEP is 64, 0.25 or below0.95."""
        amount, _, scorer = text.partition(":")
        try:
            if amount.startswith("below"):
                return cls(below=float(amount.removeprefix("below")), scorer=scorer or "similarity")
            return cls(float(amount) if "." in amount else int(amount), scorer or "similarity")
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read the pruning {text!r}: write 64, 0.25 or below0.95, and :SCORER") from None

    def __str__(self) -> str:
        amount = self.keep if self.below is None else f"below{self.below}"
        return f"{amount}:{self.scorer if isinstance(self.scorer, str) else type(self.scorer).__name__}"

    @property
    def needs_question(self) -> bool:
        """Whether another question may keep other tokens."""
        return self.scorer == "question"

    @property
    def needs_decoder(self) -> bool:
        return self.scorer in ("attention", "question")

    def most(self, plan: Plan) -> int:
        """How many tokens are kept at most; exactly so many unless `below` decides."""
        total, separators = plan.tokens["total"], len(plan.separator_rows)
        if self.below is not None:
            return total if self.separators else total - separators
        keep = self.keep if isinstance(self.keep, int) else kept_of(self.keep, total - separators)
        return keep + separators * self.separators

    def kept(
        self,
        tokens: Tensor,
        plan: Plan,
        decoder: nn.Module | None = None,
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
        separators = torch.tensor([row for row, _ in plan.separator_rows], dtype=torch.long, device=tokens.device)
        with torch.no_grad():
            scores = self._scores(tokens, plan, decoder, before, question)
        # What has no score to lose cannot take the place of what has.
        scores = scores.float().index_fill(0, separators, float("inf") if self.separators else float("-inf"))
        if self.below is not None:
            return (check_scores(scores, tokens) > -self.below).nonzero()[:, 0]
        return prune_tokens(tokens, scores, self.most(plan)).kept

    def _scores(
        self, tokens: Tensor, plan: Plan, decoder: nn.Module | None, before: Tensor | None, question: Tensor | None
    ) -> Tensor:
        if self.scorer == "similarity":
            return novelty(tokens, plan)
        if self.scorer == "random":
            return torch.rand(len(tokens), generator=torch.Generator().manual_seed(0)).to(tokens.device)
        if not self.needs_decoder:
            scorer = Norm() if self.scorer == "norm" else self.scorer
            return scorer(LayerInput(tokens[None], 0, len(tokens), None, {}))[0]
        if decoder is None or self.needs_question and question is None:
            raise InputError(f"pruning by {self.scorer} needs the language model's decoder, and by question one")
        start = 0 if before is None else len(before)
        parts = [before, tokens, question if self.needs_question else None]
        embeds = torch.cat([part for part in parts if part is not None])
        at = layer_input(decoder, embeds[None], start, start + len(tokens), self.layer)
        return AttentionReceived(self.queries)(at)[0]


def prune_tokens(tokens: Tensor, scores: Tensor, keep: int) -> Pruned:
    """The `keep` of tokens [..., S, D] whose scores [..., S] are highest, in their order; of equal scores the first.

    Differentiable by the tokens, not by the scores. Raises InputError for scores of another shape, NaN among them, or
    a `keep` that is not 1 to S.
    """
    check_count("keep", keep)
    if keep > tokens.shape[-2]:
        raise InputError(f"keep={keep} of {tokens.shape[-2]} tokens: keep at most all")
    order = check_scores(scores, tokens).argsort(dim=-1, descending=True, stable=True)
    kept = order[..., :keep].sort(dim=-1).values
    return Pruned(tokens.gather(-2, kept[..., None].expand(*kept.shape, tokens.shape[-1])), kept)


def check_scores(scores: Tensor, tokens: Tensor) -> Tensor:
    """The scores; InputError unless they are one a token, and numbers."""
    if scores.shape != tokens.shape[:-1]:
        raise InputError(f"scores must be {list(tokens.shape[:-1])}, one a token, not {list(scores.shape)}")
    if scores.isnan().any():
        raise InputError("some scores are NaN: check the tokens and the scorer")
    return scores


def places(plan: Plan) -> Iterator[Tensor]:
    """Each pathway's tokens by frame and place, int64 [frames, places]: a column is one place as time goes on."""
    firsts: dict[int, list[int]] = defaultdict(list)
    for item in plan.items:
        firsts[item.pathway].append(item.first_token)
    for pathway, first in firsts.items():
        tables = plan.pathways[pathway]
        cells = torch.arange(len(tables.rows))[:, None] * tables.pitch + torch.arange(len(tables.cols))
        yield torch.tensor(first)[:, None] + cells.flatten()


def novelty(tokens: Tensor, plan: Plan) -> Tensor:
    """How unlike its kept neighbours in time each token is, float32 [S]: minus a cosine similarity.

    The first frame of a pathway comes before all else, by how unlike the frame's mean its tokens are. Then at each
    place, which no other touches, the token joins that is least like the joined one before it and the one behind it,
    again and again: a still scene adds nothing, a slow fade adds its end, its middle, and so on. A token's score is
    the least that anything had up to its turn, so that those above any bound are a start of the order.
    """
    scores = tokens.new_full((len(tokens),), float("-inf"), dtype=torch.float32)  # zeros stand for nothing
    for index in places(plan):
        index = index.to(tokens.device)
        scores[index] = _novelty(F.normalize(tokens[index].float(), dim=-1))
    return scores


def _novelty(rows: Tensor) -> Tensor:
    """Scores [F, n] of unit vectors [F, n, D]."""
    count, width = rows.shape[:2]
    alike = torch.einsum("fnd,gnd->nfg", rows, rows)
    alike = F.pad(alike, (0, 1), value=-1.0)  # behind the last frame there is none
    frames, every = torch.arange(count, device=rows.device), torch.arange(width, device=rows.device)
    before, behind = frames.new_zeros(width, count), frames.new_full((width, count), count)
    scores, best = rows.new_zeros(width, count), rows.new_full((width,), -1.0)
    joined = (frames == 0).expand(width, count).clone()
    for _ in range(count - 1):
        near = alike.gather(2, torch.stack([before, behind], dim=2)).amax(2)
        value, new = near.masked_fill(joined, 2.0).min(1)  # of equals the first
        best = best.maximum(value)
        scores[every, new] = -best
        joined[every, new] = True
        before = before.where(frames <= new[:, None], before.maximum(new[:, None]))
        behind = behind.where(frames >= new[:, None], behind.minimum(new[:, None]))
    scores[:, 0] = 2.0 - rows[0] @ F.normalize(rows[0].mean(0), dim=0)
    return scores.T


class _Reached(Exception):
    """Raised out of a forward pass at the layer whose input is wanted."""


def layer_input(decoder: nn.Module, embeds: Tensor, start: int, stop: int, number: int) -> LayerInput:
    """What enters decoder layer `number` for embeds [B, S, D], whose vision tokens are [start, stop); the layers before
    it are run, with whatever attention the model has."""
    layer, seen = decoder.layers[number], {}

    def stop_here(module: nn.Module, positional: tuple, arguments: dict) -> None:
        seen.update(arguments, hidden=positional[0] if positional else arguments["hidden_states"])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop_here, with_kwargs=True)
    try:
        decoder(inputs_embeds=embeds, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return LayerInput(seen.pop("hidden"), start, stop, layer, seen)

"""Auxiliary losses that guide the language model's attention, for all stages but the last.

Attention from a name to the visual tokens of the thing is slow to emerge from answers alone. Therefore:

- Some heads are trained to attend from a word that names a thing to the visual tokens that show it, and from the answer
  to that word.
- Linear heads read from such a word the attributes of the thing and the number of things with that name, and from the
  tokens of the fast pathway their frame and what appeared or vanished since the previous frame.

The linear heads are dropped after training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ...layouts.slowfast import SlowFastLayout
from ...ops.aggregate import slowfast_aggregate
from ..model import LANGUAGE_WIDTH, LAYOUT
from ..scenes import GRID
from .batches import FACTS, IGNORE, MOST_THINGS, ClipBatch, Mode, StepLayout
from .trainer import Score

NEWS_LAYER = 0  # the frame and its changes are read after this layer
NAMING_LAYER, ANSWERING_LAYER = 1, 2  # layers with guided heads
LOOK_WEIGHT, NEWS_WEIGHT, CLOCK_WEIGHT, FACT_WEIGHT = 0.15, 0.2, 1.0, 0.3


def pool_tokens(features: torch.Tensor, slow: int, mode: Mode = "both") -> torch.Tensor:
    """SlowFast tokens of clips of equal length.

    Args:
        features: [B, T, 64, D].
        slow: Slow frames.
        mode: The pathways.

    Returns:
        [B, S, D].
    """
    clips, frames = features.shape[:2]
    layout = replace(SlowFastLayout.parse(LAYOUT), slow_frames=slow)
    if mode != "both":
        layout = layout.only(mode)
    bounds = [clip * frames for clip in range(clips + 1)]
    tokens: torch.Tensor = slowfast_aggregate(features.flatten(0, 1), layout, frame_offsets=bounds)[0]
    return tokens.unflatten(0, (clips, -1))


@dataclass
class Look:
    """The target of one head's attention.

    Attributes:
        layer, head: The head.
        wanted: Which keys each word should attend to, bool [B, Q, L, keys]; keys are the visual tokens, or these and
            the question's words.
    """

    layer: int
    head: int
    wanted: torch.Tensor

    def loss(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Mean of -log of the attention to the wanted keys; scores: before softmax, [B, H, Q, L, 1 + S + L]."""
        asked = self.wanted.any(-1)
        if not asked.any():
            return None
        wanted, rows = self.wanted[asked], scores[:, self.head][asked]
        seen = rows[:, 1 : 1 + wanted.shape[-1]].masked_fill(~wanted, float("-inf"))
        return (rows.logsumexp(-1) - seen.logsumexp(-1)).mean()


class ClipHeads(torch.nn.Module):
    """Linear heads that read visual tokens and words.

    From a visual token: its frame, and colour and shape of what appeared or vanished. From a word that names a thing:
    the thing's attributes.
    """

    def __init__(self):
        super().__init__()
        kinds = (FACTS["colour"] + 1, FACTS["shape"] + 1)
        self.clock = torch.nn.Linear(LANGUAGE_WIDTH, 1)
        self.news = torch.nn.ModuleList(torch.nn.Linear(LANGUAGE_WIDTH, size) for size in kinds * 2)
        self.facts = torch.nn.ModuleList(torch.nn.Linear(LANGUAGE_WIDTH, size + 1) for size in FACTS.values())
        self.how_many = torch.nn.Linear(LANGUAGE_WIDTH, MOST_THINGS)

    def fact_loss(self, words: torch.Tensor, named: torch.Tensor, facts: torch.Tensor, score: Score) -> torch.Tensor:
        """words: [n, D], which name `named` [n, things], of clips with `facts` [n, things, len(FACTS)]."""
        hidden, counts = F.rms_norm(words, words.shape[-1:]), named.sum(-1).long()
        total = F.cross_entropy(self.how_many(hidden), counts)
        one = counts == 1
        true = facts[one, named[one].argmax(-1)]
        for read, target in zip(self.facts, true.T):
            known = target > 0
            if known.any():
                logits = read(hidden[one][known])
                total = total + F.cross_entropy(logits, target[known]) * known.float().mean()
                score["facts hits"] += int((logits.argmax(1) == target[known]).sum())
                score["facts asked"] += int(known.sum())
        return FACT_WEIGHT * total

    def news_loss(self, visual: torch.Tensor, frame: torch.Tensor, news: torch.Tensor, score: Score) -> torch.Tensor:
        """visual: [B, S, D] of the fast pathway. frame: [S], divided by 16. news: int64 [B, S, 4], 0 for none."""
        hidden = F.rms_norm(visual, visual.shape[-1:])
        away = self.clock(hidden)[..., 0] - frame
        total = CLOCK_WEIGHT * away.square().mean()
        for read, target in zip(self.news, news.flatten(0, 1).T):
            logits = read(hidden).flatten(0, 1)
            weight = torch.ones(logits.shape[-1], device=logits.device)
            weight[0] = 0.25
            total = total + NEWS_WEIGHT * F.cross_entropy(logits, target, weight)
            score["news hits"] += int((logits.argmax(1) == target)[target > 0].sum())
            score["news asked"] += int((target > 0).sum())
        score["clock hits"] += float(away.detach().abs().mean())
        score["clock asked"] += 1
        return total


class Guide:
    """Collects the auxiliary losses of one step.

    Attributes:
        visual: Visual tokens after NEWS_LAYER, [B, S, D].
        words: Words after NAMING_LAYER, [B, Q, L, D].
    """

    def __init__(self, batch: ClipBatch, layout: StepLayout, device: torch.device):
        self.layout, self.device = layout, device
        self.slow_tokens = 0 if layout.mode == "fast" else layout.slow * GRID * GRID // 2
        self.visual: torch.Tensor | None = None
        self.words: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.facts = batch.facts.to(device)
        self._watch_things(batch.shown.to(device))
        self.named, self.naming = batch.named.to(device), batch.naming.to(device)
        self.looks = self._looks_at_things(NAMING_LAYER, self.named)
        self.looks += self._looks_at_things(ANSWERING_LAYER, batch.answered.to(device))
        self.looks += self._looks_at_words(self.naming, batch.targets.to(device) != IGNORE)

    def _looks_at_things(self, layer: int, things: torch.Tensor) -> list[Look]:
        return [
            Look(layer, head, torch.einsum("bst,bqlt->bqls", tokens, things) > 0)
            for head, tokens in enumerate((self.slow, self.first, self.last))
        ]

    def _looks_at_words(self, naming: torch.Tensor, answering: torch.Tensor) -> list[Look]:
        """An answer's words attend to the first, and to the last, of the words that name a thing."""
        first = naming & (naming.cumsum(-1) == 1)
        last = naming & (naming.flip(-1).cumsum(-1).flip(-1) == 1)
        wanted = (F.pad(answering[..., None] & word[..., None, :], (self.slow.shape[1], 0)) for word in (first, last))
        return [Look(ANSWERING_LAYER, head, words) for head, words in enumerate(wanted, start=3)]

    def _watch_things(self, shown: torch.Tensor) -> None:
        """Set `slow`, `first` and `last`, float [B, S, things], and `news`.

        They mark slow tokens that show a thing, fast tokens of its first frame, and fast tokens of its last frame and
        the one after it.
        """
        seen = shown.any(2)
        first = (seen & (seen.cumsum(1) == 1))[:, :, None] * shown
        last = (seen & (seen.flip(1).cumsum(1).flip(1) == 1))[:, :, None] * shown
        gone = F.pad(last[:, :-1], (0, 0, 0, 0, 1, 0))
        pools = [pool_tokens(part, self.layout.slow, self.layout.mode) for part in (shown, first, last + gone)]
        self.slow, self.first, self.last = ((part > 0).float() for part in pools)
        self.slow[:, self.slow_tokens :] = 0
        self.first[:, : self.slow_tokens] = self.last[:, : self.slow_tokens] = 0
        first[:, 0] = 0
        self.news = torch.cat([self._kind_of(first), self._kind_of(gone)], -1)

    def _kind_of(self, shown: torch.Tensor) -> torch.Tensor:
        """Colour and shape of the thing with the largest share of each fast token, int64 [B, S, 2]; 0 for none."""
        share, thing = pool_tokens(shown, self.layout.slow, self.layout.mode)[:, self.slow_tokens :].max(-1)
        clips = torch.arange(len(shown), device=self.device)[:, None]
        return self.facts[clips, thing, :2] * (share > 0)[..., None]

    def watch(self, layer: int, scores: torch.Tensor) -> None:
        """Add a layer's losses. scores: attention before softmax, [B, H, Q, L, 1 + S + L]."""
        for look in self.looks:
            loss = look.loss(scores) if look.layer == layer else None
            if loss is not None:
                self.losses.append(loss)

    def loss(self, heads: ClipHeads, score: Score) -> torch.Tensor:
        """The sum of all auxiliary losses, after the forward pass."""
        assert self.visual is not None and self.words is not None, "loss() comes after the forward pass"
        total = LOOK_WEIGHT * sum(self.losses, torch.zeros((), device=self.device))
        score["look hits"] += float(sum(loss.detach() for loss in self.losses)) / max(1, len(self.losses))
        score["look asked"] += 1
        if self.naming.any():
            clips = self.naming.nonzero()[:, 0]
            total = total + heads.fact_loss(self.words[self.naming], self.named[self.naming], self.facts[clips], score)
        news = self.visual[:, self.slow_tokens :]
        if not news.shape[1]:
            return total
        frame = torch.arange(self.layout.frames, device=self.device)
        frame = frame.repeat_interleave(news.shape[1] // self.layout.frames)
        return total + heads.news_loss(news, frame / 16, self.news, score)

"""Accuracy of the embedded model with fewer video tokens in its language model.

The clips are drawn and were not in the training data; each has 16 questions. An answer is right if each of its tokens
is the most likely one, which is what greedy decoding gives. The model was trained with all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from sfllava_fast import SlowFastLlava, slowfast_aggregate
from sfllava_fast.embedded.questions import TYPES
from sfllava_fast.embedded.training.batches import IGNORE, clip_batch
from sfllava_fast.model.transformers_release import cache_argument
from sfllava_fast.ops.rows import gather_rows
from sfllava_fast.reduction.pruning import SCORERS, Pruning, layer_input, prune_tokens

from ..harness.progress import progress
from ..harness.record import ResultError, machine
from ..harness.tables import make_table, show_machine

KEPT = (144, 96, 64, 48, 32, 16, 8)
RANDOM, IN_PLACE = "random", "question, in place"
_IN_PLACE_LAYERS = 2  # FastV's K: the layers before pruning
_CHOSEN_BY = {
    "similarity": "similarity between frames",
    "question": "attention from the question",
    IN_PLACE: "the same, pruned after layer 2 (FastV)",
    "attention": "attention from the video's last tokens",
    "norm": "norm",
    RANDOM: "random",
}


class ExamClip(NamedTuple):
    """A clip and its questions.

    Attributes:
        number: Of the clip.
        tokens: [S, D].
        ids: Questions with their answers, [Q, L].
        targets: The next token within answers, else IGNORE, [Q, L].
        types: Indices of the questions' types, [Q].
    """

    number: int
    tokens: Tensor
    ids: Tensor
    targets: Tensor
    types: Tensor

    def questions(self) -> list[Tensor]:
        """Ids of each question up to its answer."""
        return [row[: int((target != IGNORE).int().argmax()) + 1] for row, target in zip(self.ids, self.targets)]


class PrunedModel:
    """The embedded model, evaluated on clips with some of their tokens."""

    def __init__(self) -> None:
        self.model = SlowFastLlava.from_pretrained()
        self.plan = self.model.pipeline.plan(self.model.frames)
        language = self.model.pipeline.language
        self.decoder, self.head = language.core, language.head
        self.before = language.embed_tokens(self.model.pipeline.prompts.shortest().before)

    def draw(self, number: int) -> ExamClip:
        model, encoder = self.model, self.model.pipeline.encoder
        batch = clip_batch(model.checkpoint.tokenizer, "pruning exam", 0, number, 1, model.frames)
        tokens = slowfast_aggregate(encoder.project(encoder.encode(batch.pixels)), model.layout)
        return ExamClip(number, tokens, batch.ids[0], batch.targets[0], batch.types[0])

    def scores(self, clip: ExamClip, scorer: str) -> Tensor:
        """Scores of the tokens, [S], or [Q, S] if they depend on the question."""
        if scorer == RANDOM:  # different for every clip
            return torch.rand(len(clip.tokens), generator=torch.Generator().manual_seed(clip.number))
        pruning = Pruning(1, scorer)
        asked = [self.decoder.embed_tokens(ids) for ids in clip.questions()] if pruning.needs_question else [None]
        each = [pruning.scores(clip.tokens, self.plan, self.decoder, self.before, question) for question in asked]
        return torch.stack(each) if pruning.needs_question else each[0]

    def answer(self, clip: ExamClip, kept: Tensor) -> Tensor:
        """Whether each question is answered right, bool [Q], with the tokens `kept`, [k] or [Q, k]."""
        count, start = len(clip.ids), len(self.before)
        kept = kept.expand(count if kept.dim() == 2 else 1, -1)
        positions = torch.cat([torch.arange(start).expand(len(kept), -1), start + kept], dim=1)
        embeds = torch.cat([self.before.expand(len(kept), -1, -1), clip.tokens[kept]], dim=1)
        cache = DynamicCache(config=self.decoder.config)
        held = cache_argument(self.decoder, cache)
        self.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=True, **held)
        cache.batch_repeat_interleave(count // len(kept))
        positions_after = start + len(clip.tokens) + torch.arange(clip.ids.shape[1]).expand(count, -1)
        hidden = self.decoder(input_ids=clip.ids, position_ids=positions_after, use_cache=True, **held)
        return self._is_right(clip, hidden.last_hidden_state)

    def enter(self, clip: ExamClip) -> tuple[Tensor, Tensor, Tensor]:
        """The input [Q, n, D] of the first layer after pruning in place, and its rotary cos and sin."""
        visual = torch.cat([self.before, clip.tokens]).expand(len(clip.ids), -1, -1)
        embeds = torch.cat([visual, self.decoder.embed_tokens(clip.ids)], dim=1)
        entered = layer_input(self.decoder, embeds, len(self.before), visual.shape[1], _IN_PLACE_LAYERS)
        turns = (part.expand(len(embeds), -1, -1) for part in entered.arguments["position_embeddings"])
        return entered.hidden, *turns

    def answer_in_place(self, clip: ExamClip, entered: tuple[Tensor, Tensor, Tensor], kept: Tensor) -> Tensor:
        """As `answer`, but pruned after the first layers (FastV, arXiv 2403.06764)."""
        start, text = len(self.before), clip.ids.shape[1]
        stays = torch.ones(entered[0].shape[:2], dtype=torch.bool)
        stays[:, start:-text] = False
        index = stays.scatter(1, start + kept, True).nonzero()[:, 1].view(len(kept), -1)
        hidden, cos, sin = (gather_rows(part, index) for part in entered)
        for layer in self.decoder.layers[_IN_PLACE_LAYERS:]:
            hidden = layer(hidden, position_embeddings=(cos, sin))
        return self._is_right(clip, self.decoder.norm(hidden)[:, -text:])

    def _is_right(self, clip: ExamClip, hidden: Tensor) -> Tensor:
        return ((self.head(hidden).argmax(-1) == clip.targets) | (clip.targets == IGNORE)).all(1)


@torch.inference_mode()
def run(clips: int, save: Callable[[dict], None]) -> dict:
    """Every scorer at every number of tokens kept; `save` gets the result after each clip."""
    if clips < 1:
        raise ResultError(f"{clips} clips ask nothing: give --clips 1 or more")
    model = PrunedModel()
    total = model.plan.tokens["total"]
    result = {"kind": "pruning", "machine": machine("cpu"), "clips": 0, "tokens": total, "asked": [0] * len(TYPES)}
    result |= {"types": TYPES, "works": {}, "errors": {}}
    for number in progress(range(clips)):
        clip = model.draw(number)
        result["clips"] += 1
        result["asked"] = (torch.tensor(result["asked"]) + clip.types.bincount(minlength=len(TYPES))).tolist()
        for name, kept, right in _examine(model, clip):
            rows = result["works"].setdefault(name, {"bars": {}, "providers": {}})["providers"]
            row = rows.setdefault(str(kept), {"right": [0] * len(TYPES)})
            row["right"] = (torch.tensor(row["right"]) + clip.types[right].bincount(minlength=len(TYPES))).tolist()
            row["ratio"] = sum(row["right"]) / sum(result["asked"])
        save(result)
    return result


def _examine(model: PrunedModel, clip: ExamClip) -> Iterator[tuple[str, int, Tensor]]:
    """Yields (scorer, number of tokens kept, which questions are answered right)."""
    yield "all", len(clip.tokens), model.answer(clip, torch.arange(len(clip.tokens)))
    entered = model.enter(clip)
    for scorer in (*SCORERS, RANDOM):
        scores = model.scores(clip, scorer)
        for count in KEPT:
            kept = prune_tokens(clip.tokens.expand(*scores.shape[:-1], -1, -1), scores, count).kept
            yield scorer, count, model.answer(clip, kept)
            if scorer == "question":
                yield IN_PLACE, count, model.answer_in_place(clip, entered, kept)


def show(result: dict, console: Console) -> None:
    show_machine(result, console, f"; {result['clips']} clips, {sum(result['asked'])} questions")
    columns = ("chosen by", str(result["tokens"]), *map(str, KEPT))
    table = make_table("per cent right, by how many video tokens are kept", columns)
    whole = _percent(result["works"]["all"]["providers"][str(result["tokens"])])
    for name, label in _CHOSEN_BY.items():
        rows = result["works"][name]["providers"]
        table.add_row(label, whole, *(_percent(rows[str(kept)]) for kept in KEPT))
    console.print(table)


def _percent(row: dict) -> str:
    return f"{100 * row['ratio']:.1f}"


def plot(result: dict, path: Path) -> None:
    """Write a picture of accuracy against tokens kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    total = result["tokens"]
    whole = 100 * result["works"]["all"]["providers"][str(total)]["ratio"]
    for name, label in _CHOSEN_BY.items():
        rows = result["works"][name]["providers"]
        values = [100 * rows[str(kept)]["ratio"] for kept in KEPT]
        style = {"linestyle": "--"} if name in ("norm", RANDOM) else {}
        axes.plot([total, *KEPT], [whole, *values], marker="o", markersize=4, label=label, **style)
    axes.set(xscale="log", xlabel=f"video tokens kept, of {total}", ylabel="per cent right", ylim=(0, 100))
    axes.set_xticks([total, *KEPT], [str(kept) for kept in (total, *KEPT)], minor=False)
    axes.minorticks_off()
    axes.set_title(f"the embedded model, {result['clips']} clips, {sum(result['asked'])} questions", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

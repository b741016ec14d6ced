"""Trains compression tokens: `python -m sfllava_fast.embedded.training.train --train compression --out DIR`.

VoCo-LLaMA (arXiv 2406.12275) on the embedded model: k learned tokens behind the video, through which alone questions
see it, and the decoder along with them. Answers alone teach tokens slowly what to hold; so until the last stage heads
that are dropped after training read the scene from them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import LANGUAGE_WIDTH, decoder_weights, load_model
from ..questions import WHEN
from ..scenes import COLOURS, DIRECTIONS, SHAPES
from .batches import FACTS, IGNORE, MOST_THINGS, ClipBatch, Diet, clip_batch
from .packing import encode_frames, packed_logits, use_packed_attention
from .trainer import Stage, Trainer

TOKENS = 4
READ_LAYERS = (1, 2)  # behind these the scene is read from the tokens
SCENE_WEIGHT = 2.0
STAGES = (
    Stage("held few", "compression", 300, 1.5e-3, 1.5e-3, diet=Diet((1, 2), (0, 1), 8, True, 0.2), guided=True),
    Stage("held some", "compression", 250, 1.5e-3, 1.5e-3, diet=Diet((2, 3), (1, 2), 16, True, 0.2), guided=True),
    Stage("held full", "compression", 800, 1.5e-3, 7e-4, diet=Diet(frames=16, short_names=True), guided=True),
    Stage("held", "compression", 1000, 7e-4, 2e-5, diet=Diet(frames=16, short_names=True)),
)


class SceneHeads(torch.nn.Module):
    """Read from a clip's compression tokens what is where, what comes first and last, what moves which way and when,
    how many there are of each kind, and the sign's number."""

    KINDS = len(COLOURS) + 1, len(SHAPES) + 1
    SIZES = (*KINDS * (9 + 2 + len(DIRECTIONS) + len(WHEN)), *[5] * (len(COLOURS) + len(SHAPES)), MOST_THINGS, 11, 11)

    def __init__(self, tokens: int):
        super().__init__()
        self.read = torch.nn.Linear(tokens * LANGUAGE_WIDTH, sum(self.SIZES))

    def loss(self, held: Tensor, targets: Tensor, score: Counter) -> Tensor:
        """held: [B, k, D]. targets: int64 [B, len(SIZES)], 0 = nothing."""
        logits = self.read(F.rms_norm(held, held.shape[-1:]).flatten(1)).split(self.SIZES, -1)
        losses = []
        for logit, target in zip(logits, targets.T):
            losses.append(F.cross_entropy(logit, target, ignore_index=IGNORE, reduction="sum") / len(target))
            shown = target > 0
            score["scene hits"] += int((logit.argmax(1) == target)[shown].sum())
            score["scene asked"] += int(shown.sum())
        return torch.stack(losses).mean()


def scene_targets(batch: ClipBatch) -> Tensor:
    """What SceneHeads read, int64 [B, len(SIZES)]: 0 = nothing, IGNORE where two things or none of a name fit."""
    return torch.tensor([_targets(*clip) for clip in zip(batch.facts.tolist(), batch.shown)])


def _targets(facts: list[list[int]], shown: Tensor) -> list[int]:
    """Of one clip: the facts of its things, and float [T, 64, things], which patches show them."""
    seen = [frames.nonzero()[:, 0].tolist() for frames in shown.any(1).T]
    things = [(dict(zip(FACTS, fact)), when) for fact, when in zip(facts[:-1], seen) if fact[1]]
    stills = [thing for thing, _ in things if thing["column"]]
    passing = [(thing, when) for thing, when in things if not thing["column"] and when]
    ends = sorted(passing, key=lambda item: item[1][0])[:1], sorted(passing, key=lambda item: -item[1][-1])[:1]
    groups = [[t for t in stills if (t["row"], t["column"]) == cell] for cell in product((1, 2, 3), repeat=2)]
    groups += [[t for t, _ in end] for end in ends]
    for key, count in (("direction", len(DIRECTIONS)), ("when", len(WHEN))):
        groups += [[t for t, _ in passing if t[key] == value] for value in range(1, count + 1)]
    counts = [
        min(4, sum(thing[key] == value for thing, _ in things))
        for key, names in (("colour", COLOURS), ("shape", SHAPES))
        for value in range(1, len(names) + 1)
    ]
    kinds = [value for group in groups for value in _kind(group)]
    return [*kinds, *counts, min(MOST_THINGS - 1, len(things)), *facts[-1][-2:]]


def _kind(found: list[dict[str, int]]) -> list[int]:
    if len(found) > 1:
        return [IGNORE, IGNORE]
    return [found[0]["colour"] or IGNORE, found[0]["shape"]] if found else [0, 0]


class CompressionTrainer(Trainer):
    """Trains the tokens and the decoder; tower, projector and words stay as they are."""

    STAGES = STAGES

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int):
        self.model = load_model(args.start).requires_grad_(False)
        use_packed_attention(self.model)
        decoder = self.model.get_decoder()
        torch.manual_seed(args.seed)
        self.tokens = torch.nn.Embedding(TOKENS, LANGUAGE_WIDTH)
        with torch.no_grad():
            self.tokens.weight.normal_(0, decoder.embed_tokens.weight.std())
        self.heads = torch.nn.ModuleDict({str(layer): SceneHeads(TOKENS) for layer in READ_LAYERS})
        self.held: dict[str, Tensor] = {}  # [B, k, D] behind each of READ_LAYERS
        for layer in READ_LAYERS:
            decoder.layers[layer].register_forward_hook(self._keep(str(layer)), with_kwargs=True)
        self.decoder = decoder_weights(self.model)
        super().__init__(args, rank, ranks, {"model": self.model, "tokens": self.tokens, "scene_heads": self.heads})

    def _keep(self, layer: str):
        def keep(module, inputs, arguments, output):
            packing = arguments["packing"]
            stop = output.shape[1] - packing.questions * packing.length
            self.held[layer] = output[:, stop - TOKENS : stop]

        return keep

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.tokens.parameters(), *self.decoder.values(), *self.heads.parameters()]

    def loss(self, share: int) -> Tensor:
        stage, layout = self.now, self.now.diet.layout(self.now.name, self.step)
        clips = layout.clips
        batch = clip_batch(self.tokenizer, stage.name, self.step, share * clips, clips, layout.frames, stage.diet)
        with torch.no_grad():
            features = encode_frames(self.model, batch.pixels.to(self.device)).unflatten(0, (clips, -1))
        where = batch.targets != IGNORE
        logits = packed_logits(
            self.model,
            features,
            batch.ids.to(self.device),
            where.to(self.device),
            layout.slow,
            compression=self.tokens.weight,
        )
        target = batch.targets[where].to(self.device)
        self.count_hits(batch.types, where, (logits.argmax(1) == target).cpu())
        loss = F.cross_entropy(logits, target)
        if stage.guided:
            targets = scene_targets(batch).to(self.device)
            for layer, head in self.heads.items():
                loss = loss + SCENE_WEIGHT * head.loss(self.held[layer], targets, self.score)
        return loss

    def export(self, directory: str | Path) -> None:
        """compression.safetensors: `tokens` [k, D], and the decoder's weights by their names, in bfloat16."""
        from safetensors.torch import save_file

        Path(directory).mkdir(parents=True, exist_ok=True)
        tensors = {"tokens": self.tokens.weight, **self.decoder}
        save_file(
            {name: tensor.detach().bfloat16().cpu() for name, tensor in tensors.items()},
            Path(directory) / "compression.safetensors",
        )

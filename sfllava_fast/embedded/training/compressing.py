"""Trains compression tokens: `python -m sfllava_fast.embedded.training.train --train compression --out DIR`.

VoCo-LLaMA (arXiv 2406.12275) on the embedded model: k learned tokens follow the video, and questions attend to it only
through them; the decoder is trained with them. Answers alone are a weak signal. Therefore, in all stages but the last,
auxiliary heads read the scene from the tokens; they are dropped after training.
"""

from __future__ import annotations

import argparse
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
from .trainer import Score, Stage, Trainer

TOKENS = 4
READ_LAYERS = (1, 2)  # the scene is read from the tokens after these layers
SCENE_WEIGHT = 2.0
STAGES = (
    Stage("held few", "compression", 300, 1.5e-3, 1.5e-3, diet=Diet((1, 2), (0, 1), 8, True, 0.2), guided=True),
    Stage("held some", "compression", 250, 1.5e-3, 1.5e-3, diet=Diet((2, 3), (1, 2), 16, True, 0.2), guided=True),
    Stage("held full", "compression", 800, 1.5e-3, 7e-4, diet=Diet(frames=16, short_names=True), guided=True),
    Stage("held", "compression", 1000, 7e-4, 2e-5, diet=Diet(frames=16, short_names=True)),
)


class SceneHeads(torch.nn.Module):
    """Linear heads that read a scene from a clip's compression tokens.

    They read colour and shape of the thing at each place, of the first and the last one, by direction and by time; the
    number of things of each colour and shape; and the sign's digits.
    """

    KINDS = len(COLOURS) + 1, len(SHAPES) + 1
    SIZES = (*KINDS * (9 + 2 + len(DIRECTIONS) + len(WHEN)), *[5] * (len(COLOURS) + len(SHAPES)), MOST_THINGS, 11, 11)

    def __init__(self, tokens: int):
        super().__init__()
        self.read = torch.nn.Linear(tokens * LANGUAGE_WIDTH, sum(self.SIZES))

    def loss(self, held: Tensor, targets: Tensor, score: Score) -> Tensor:
        """held: compression tokens [B, k, D]. targets: int64 [B, len(SIZES)], as `scene_targets` gives them."""
        logits = self.read(F.rms_norm(held, held.shape[-1:]).flatten(1)).split(self.SIZES, -1)
        losses = []
        for logit, target in zip(logits, targets.T):
            losses.append(F.cross_entropy(logit, target, ignore_index=IGNORE, reduction="sum") / len(target))
            shown = target > 0
            score["scene hits"] += int((logit.argmax(1) == target)[shown].sum())
            score["scene asked"] += int(shown.sum())
        return torch.stack(losses).mean()


def scene_targets(batch: ClipBatch) -> Tensor:
    """Targets of SceneHeads, int64 [B, len(SIZES)]: 0 for nothing, IGNORE if ambiguous or without a name."""
    return torch.tensor([_targets(*clip) for clip in zip(batch.facts.tolist(), batch.shown)])


def _targets(facts: list[list[int]], shown: Tensor) -> list[int]:
    """Targets of one clip. facts: attributes of its things. shown: patches of each thing, float [T, 64, things]."""
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
    """Trains the tokens and the decoder; tower, projector and word embeddings are frozen."""

    STAGES = STAGES

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int):
        self.model = load_model(args.start).requires_grad_(False)
        use_packed_attention(self.model)
        decoder = self.model.get_decoder()
        torch.manual_seed(args.seed)
        self.tokens = torch.nn.Embedding(TOKENS, LANGUAGE_WIDTH)
        with torch.no_grad():
            self.tokens.weight.normal_(0, decoder.embed_tokens.weight.std())
        self.heads = {str(layer): SceneHeads(TOKENS) for layer in READ_LAYERS}
        self.held: dict[str, Tensor] = {}  # the tokens after each of READ_LAYERS, [B, k, D]
        for layer in READ_LAYERS:
            decoder.layers[layer].register_forward_hook(self._keep(str(layer)), with_kwargs=True)
        self.decoder = decoder_weights(self.model)
        heads = torch.nn.ModuleDict(self.heads)
        super().__init__(args, rank, ranks, {"model": self.model, "tokens": self.tokens, "scene_heads": heads})

    def _keep(self, layer: str):
        def keep(module, inputs, arguments, output):
            packing = arguments["packing"]
            stop = output.shape[1] - packing.questions * packing.length
            self.held[layer] = output[:, stop - TOKENS : stop]

        return keep

    def parameters(self) -> list[torch.nn.Parameter]:
        heads = [p for head in self.heads.values() for p in head.parameters()]
        return [*self.tokens.parameters(), *self.decoder.values(), *heads]

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
        """Write compression.safetensors: `tokens` [k, D] and decoder weights by their names, in bfloat16."""
        from safetensors.torch import save_file

        Path(directory).mkdir(parents=True, exist_ok=True)
        tensors = {"tokens": self.tokens.weight, **self.decoder}
        save_file(
            {name: tensor.detach().bfloat16().cpu() for name, tensor in tensors.items()},
            Path(directory) / "compression.safetensors",
        )

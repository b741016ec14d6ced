"""Trains a mixture of depths: `python -m sfllava_fast.embedded.training.train --train mixture --out DIR`.

VideoLLM-MoD (arXiv 2408.16730) on the embedded model; every other layer is mixed. First the layers' scorers learn which
tokens the plain model's questions attend to in their layer. Then the decoder learns, together with them, to answer from
the chosen tokens; its targets are the right answers and the plain model's logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layouts.slowfast import SlowFastLayout
from ...ops.token_offsets import token_frames
from ...reduction.mixture.wrapper import MixtureOfDepths
from ...reduction.scorers import LayerInput
from ..model import LAYOUT, decoder_weights, load_model
from ..scenes import GRID
from .batches import IGNORE, Diet, clip_batch
from .packing import encode_frames, packed_logits, use_packed_attention
from .trainer import Stage, Trainer

RATIO = 0.2
FRAMES = 16
DIET = Diet(frames=FRAMES, short_names=True)
STAGES = (
    Stage("looks", "experts", 150, 2e-2, 1e-3, diet=DIET),
    Stage("depths", "decoder", 400, 1e-3, 1e-5, diet=DIET),
)


class _AttentionRecorder:
    """Records by layer how much the questions attend to each visual token."""

    visual: Tensor | None = None
    words: Tensor | None = None

    def __init__(self, real: Tensor, tokens: int) -> None:
        self.real, self.tokens = real, tokens
        self.most: dict[int, Tensor] = {}

    def watch(self, layer: int, scores: Tensor) -> None:
        """Record the maximum over heads and words. scores: before softmax, [B, H, Q, L, 1 + S + L]."""
        attention = scores.softmax(-1)[..., 1 : 1 + self.tokens]
        self.most[layer] = (attention * self.real[:, None, :, :, None]).amax((1, 2, 3))


class MixtureTrainer(Trainer):
    """Trains the scorers ("experts"), then the decoder with them ("decoder")."""

    STAGES = STAGES

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int):
        self.teacher, self.model = (load_model(args.start).requires_grad_(False) for _ in range(2))
        for model in (self.teacher, self.model):
            use_packed_attention(model)
        torch.manual_seed(args.seed)
        self.mixture = MixtureOfDepths(self.model, RATIO, "learned")
        self.slow = SlowFastLayout.parse(LAYOUT).slow_frames
        self.frames = token_frames(SlowFastLayout.parse(LAYOUT).plan(FRAMES, (GRID, GRID)), start=1)
        self.decoder = decoder_weights(self.model)
        self.entering: dict[int, Tensor] = {}  # the plain model's hidden states, by mixed layer
        self.scores: dict[int, Tensor] = {}  # of the scorers, by mixed layer
        for number in self.mixture.layers:
            layer = self.teacher.model.language_model.layers[number]
            layer.register_forward_pre_hook(lambda _, inputs, number=number: self.entering.update({number: inputs[0]}))
            scorer = self.mixture.scorers[str(number)]
            scorer.register_forward_hook(lambda _, __, scores, number=number: self.scores.update({number: scores}))
        super().__init__(args, rank, ranks, {"model": self.model, "experts": self.mixture})

    def parameters(self) -> list[torch.nn.Parameter]:
        decoder = self.decoder.values() if self.now.trains == "decoder" else ()
        return [*self.mixture.parameters(), *decoder]

    def loss(self, share: int) -> Tensor:
        """Cross entropy of the scores, as log odds, against the recorded attention; in the stage "decoder" also that of
        the logits against the right answers and the plain model's logits."""
        stage, clips = self.now, self.now.diet.layout(self.now.name, self.step).clips
        batch = clip_batch(self.tokenizer, stage.name, self.step, share * clips, clips, FRAMES, stage.diet)
        ids, where = batch.ids.to(self.device), batch.targets.to(self.device) != IGNORE
        start, stop = self.frames[0], self.frames[-1]
        recorder = _AttentionRecorder(ids != self.tokenizer.pad_token_id, stop - start)
        with torch.no_grad():
            features = encode_frames(self.model, batch.pixels.to(self.device)).unflatten(0, (clips, -1))
            taught = packed_logits(self.teacher, features, ids, where, self.slow, guide=recorder)
        total = torch.zeros((), device=self.device)
        if stage.trains == "decoder":
            with self.mixture.on_frames(self.frames):
                logits = packed_logits(self.model, features, ids, where, self.slow)
            target = batch.targets.to(self.device)[where]
            self.count_hits(batch.types, where.cpu(), (logits.argmax(1) == target).cpu())
            total = F.cross_entropy(logits, target) + F.cross_entropy(logits, taught.softmax(-1))
        else:
            for number in self.mixture.layers:
                layer = self.model.model.language_model.layers[number]
                self.mixture.scorers[str(number)](LayerInput(self.entering[number], start, stop, layer, {}))
        for number, scores in self.scores.items():
            total = total + F.binary_cross_entropy_with_logits(scores, recorder.most[number])
        return total

    def export(self, directory: str | Path) -> None:
        """Write mixture.safetensors: scorers and decoder weights by their names, in bfloat16."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.mixture.weights = {name: weight.bfloat16() for name, weight in self.decoder.items()}
        self.mixture.save(Path(directory) / "mixture.safetensors")

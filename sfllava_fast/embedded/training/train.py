"""Trains the embedded model from scratch: `python -m sfllava_fast.embedded.training.train --out DIR`.

The stages have fixed lengths:

1. On single frames, the vision tower is trained on patch labels.
2. On single frames, projector and word embeddings are aligned: a projected patch predicts the words for what it shows.
3. On clips with few and then many shapes, the language model is trained; some of its heads are guided (guidance.py)
   until the last stage.

Ranks are data-parallel processes. `--train mixture` and `--train compression` start from a trained model: see mixing.py
and compressing.py.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..model import VISION_WIDTH, build_model, export
from ..scenes import COLOURS, GRID, NO_NAME, SHAPES
from .batches import IGNORE, Diet, clip_batch, image_batch, patch_words
from .compressing import CompressionTrainer
from .guidance import ClipHeads, Guide
from .mixing import MixtureTrainer
from .packing import encode_frames, packed_logits, use_packed_attention
from .trainer import Score, Stage, Trainer, run

FORM = Diet(tinted=0.5)  # colours without a name, so that shapes are learned independently of colours
STAGES = (
    Stage("tower", "tower", 1600, 1.5e-3, 4.5e-5, warmup=100, diet=FORM),
    # With visual tokens close to word embeddings the language model learns to read them in few steps.
    Stage("align", "words", 200, 3e-3, 1e-3, diet=FORM),
    # Attention from a name to its thing is learned in scenes with few things; in full ones it takes far longer.
    Stage("few", "language", 250, 1.5e-3, 1.5e-3, diet=Diet((1, 2), (0, 1), 8, True, 0.3), guided=True),
    Stage("some", "language", 500, 1.5e-3, 1.5e-3, diet=Diet((2, 3), (1, 2), 16, True, 0.3), guided=True),
    Stage("full", "language", 1100, 1.5e-3, 1.2e-3, diet=Diet(frames=16, short_names=True, tinted=0.3), guided=True),
    Stage("mixed", "language", 1000, 1.2e-3, 1e-3, diet=Diet(short_names=True, tinted=0.3), guided=True),
    Stage("last", "language", 1000, 1e-3, 3e-5, diet=Diet(short_names=True, tinted=0.15)),
)
WORDED_IMAGES = 8
IMAGES_PER_RANK = 32


class PatchHeads(torch.nn.Module):
    """Linear heads that read `patch_labels`, row and column from each patch; dropped after training."""

    SIZES: ClassVar[dict[str, int]] = {
        "shape": len(SHAPES) + 1,
        "colour": len(COLOURS) + 1,
        "tens": 11,
        "units": 11,
        "across": 4,
        "down": 4,
    }

    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        sizes = self.SIZES | {"offset": 2, "row": GRID, "column": GRID}
        self.reads = torch.nn.ModuleDict({key: torch.nn.Linear(width, n) for key, n in sizes.items()})

    def loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor], score: Score) -> torch.Tensor:
        """The loss; counts hits on patches that show something. features: [N, 64, D]. labels: [N, 8, 8]."""
        hidden = self.norm(features)
        owned = labels["shape"].flatten() > 0
        away = self.reads["offset"](hidden).flatten(0, 1)[owned] - labels["offset"].flatten(0, 2)[owned]
        total = away.abs().mean() + self._cell_loss(hidden)
        for key, size in self.SIZES.items():
            logits, target = self.reads[key](hidden).flatten(0, 1), labels[key].flatten()
            weight = torch.ones(size, device=logits.device)
            weight[0] = 0.25
            total = total + F.cross_entropy(logits, target, weight, ignore_index=NO_NAME)
            shown = target > 0
            score[f"{key} hits"] += int((logits.argmax(1) == target)[shown].sum())
            score[f"{key} asked"] += int(shown.sum())
        return total

    def _cell_loss(self, hidden: torch.Tensor) -> torch.Tensor:
        """Cross entropy of row and column, read with weights of unit norm.

        The unit norm forces large position features; small ones would be lost after the projector.
        """
        cells = torch.arange(GRID * GRID, device=hidden.device).repeat(len(hidden))
        total = torch.zeros((), device=hidden.device)
        for key, target in (("row", cells // GRID), ("column", cells % GRID)):
            read = self.reads[key]
            assert isinstance(read, torch.nn.Linear)
            logits = F.linear(hidden, F.normalize(read.weight, dim=1), read.bias)
            total = total + 0.5 * F.cross_entropy(logits.flatten(0, 1), target)
        return total


class ModelTrainer(Trainer):
    """Trains the model itself: "tower", "words" (projector and embeddings) or "language" (those and the decoder)."""

    STAGES = STAGES

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int):
        self.model = build_model(args.seed)
        use_packed_attention(self.model)
        self.patch_heads = PatchHeads(VISION_WIDTH)
        self.clip_heads = ClipHeads()
        modules = {"model": self.model, "patch_heads": self.patch_heads, "clip_heads": self.clip_heads}
        super().__init__(args, rank, ranks, modules)

    def export(self, directory: str | Path) -> None:
        export(self.model, directory)

    def parameters(self) -> list[torch.nn.Parameter]:
        inner = self.model.model
        if self.now.trains == "tower":
            tower = [p for key, p in inner.vision_tower.named_parameters() if "post_layernorm" not in key]
            return [*tower, *self.patch_heads.parameters()]
        words = [*inner.multi_modal_projector.parameters(), *self.model.get_input_embeddings().parameters()]
        if self.now.trains == "words":
            return words
        decoder = [p for key, p in inner.language_model.named_parameters() if "embed_tokens" not in key]
        return [*words, *decoder, *self.clip_heads.parameters()]

    def loss(self, share: int) -> torch.Tensor:
        return self._image_loss(share) if self.now.trains in ("tower", "words") else self._language_loss(share)

    def _images(self, share: int, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Patch features and labels of `count` single frames."""
        pixels, labels = image_batch(self.now.name, self.step, share * count, count, self.now.diet.tinted)
        return self._encode(pixels), {key: value.to(self.device) for key, value in labels.items()}

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.now.trains == "tower"):
            return encode_frames(self.model, pixels.to(self.device))

    def _image_loss(self, share: int) -> torch.Tensor:
        features, labels = self._images(share, IMAGES_PER_RANK)
        if self.now.trains == "words":
            return self._align_loss(features, labels)
        return self.patch_heads.loss(features, labels, self.score)

    def _align_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of the language head's logits of a projected patch against the words for what it shows."""
        language = self.model.model.language_model
        logits = self.model.lm_head(language.norm(self.model.model.multi_modal_projector(features)))
        words, shown = patch_words(self.tokenizer, labels)
        loss = -(words * logits.log_softmax(-1)).sum(-1)
        return loss[shown].mean() + 0.2 * loss[~shown].mean()

    def _language_loss(self, share: int) -> torch.Tensor:
        stage, layout = self.now, self.now.diet.layout(self.now.name, self.step)
        clips = layout.clips
        batch = clip_batch(self.tokenizer, stage.name, self.step, share * clips, clips, layout.frames, stage.diet)
        features = self._encode(batch.pixels).unflatten(0, (clips, -1))
        where = batch.targets != IGNORE
        guide = Guide(batch, layout, self.device) if stage.guided else None
        questions = batch.ids.to(self.device), where.to(self.device)
        logits = packed_logits(self.model, features, *questions, layout.slow, layout.mode, guide)
        target = batch.targets[where].to(self.device)
        if layout.mode == "both":
            self.count_hits(batch.types, where, (logits.argmax(1) == target).cpu())
        loss = F.cross_entropy(logits, target)
        if guide is not None:
            loss = loss + guide.loss(self.clip_heads, self.score)
            loss = loss + 0.3 * self._align_loss(*self._images(share, WORDED_IMAGES))
        return loss


TRAINERS = {"model": ModelTrainer, "mixture": MixtureTrainer, "compression": CompressionTrainer}


def _rank_main(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(max(1, args.threads // args.ranks))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    try:
        run(TRAINERS[args.train](args, rank, args.ranks))
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m sfllava_fast.embedded.training.train",
        description=__doc__.split("\n\n")[0],
        epilog="example: python -m sfllava_fast.embedded.training.train --out out/embedded --ranks 2",
    )
    parser.add_argument(
        "--train",
        choices=tuple(TRAINERS),
        default="model",
        help="the model (default); or a mixture of depths or compression tokens for a trained one",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="DIR",
        help="the trained model to start from (default: the one that ships)",
    )
    parser.add_argument("--out", required=True, help="output: a Hugging Face directory")
    parser.add_argument(
        "--work", default="runs/embedded", help="folder of checkpoint.pt and log.jsonl (default: runs/embedded)"
    )
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2 if (os.cpu_count() or 1) > 1 else 1)
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="of all ranks together (default: 2)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (one rank)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights; the data has fixed seeds")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage (default: 1)"
    )
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints (default: 240)")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --work")
    parser.add_argument("--smoke", action="store_true", help="train for about 20 steps in all, as a test")
    args = parser.parse_args(argv)
    if args.start and args.train == "model":
        parser.error("the model is trained from scratch: use --from with --train mixture or compression")
    if args.start and not (Path(args.start) / "config.json").is_file():
        parser.error(f"--from {args.start} has no config.json: name the output folder of a training")
    if args.smoke:
        args.steps_scale = 20 / sum(stage.steps for stage in TRAINERS[args.train].STAGES)
    if args.device != "cpu":
        args.ranks = 1
    return args


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    args = parse(argv)
    if args.ranks == 1:
        torch.set_num_threads(args.threads)
        run(TRAINERS[args.train](args, 0, 1))
        return 0
    torch.multiprocessing.spawn(_rank_main, (args, _free_port()), nprocs=args.ranks)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; continue with --resume")

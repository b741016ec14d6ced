"""Trains the embedded model from scratch: `python -m sfllava_fast.embedded.train --out DIR`.

Stages of fixed length, one after the other. On single frames: the vision tower, from patch labels (tower,
places, cells), and the projector, until a patch reads as the words for what it shows (align). On clips, the
tower frozen: projector and language model. Ranks are processes that average their gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .batches import IGNORE, ClipBatch, Layout, clip_batch, draw_layout, image_batch, patch_words
from .model import LANGUAGE_WIDTH, build_model, build_tokenizer, export
from .packing import Guide, encode_frames, packed_logits, pool_tokens, use_packed_attention
from .questions import TYPES
from .scenes import COLOURS, GRID, SHAPES

LOG_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own parameters, steps and peak learning rates."""

    name: str
    steps: int
    language_rate: float
    tower_rate: float
    decays: bool = True
    warmup: int = 100


STAGES = (
    Stage("tower", 1300, 0.0, 1.5e-3),
    # The language model needs few steps to read what a patch shows once its tokens resemble words.
    Stage("align", 300, 3e-3, 0.0, warmup=30),
    Stage("language", 579, 1.2e-3, 0.0, decays=False),
    # Dense in one kind of question, short clips: the first lookup by content is the hard one to learn.
    Stage("lookup", 500, 1.5e-3, 0.0, decays=False, warmup=30),
    Stage("video", 290, 1.2e-3, 0.0, decays=False, warmup=30),
    # The tower had forgotten where a patch lies; now it tells, and from "cells" on loudly enough to be heard.
    Stage("places", 200, 0.0, 8e-4, warmup=20),
    Stage("clips", 178, 1.2e-3, 0.0, decays=False, warmup=30),
    Stage("cells", 250, 0.0, 1.5e-3, warmup=20),
    Stage("mixed", 1, 1.2e-3, 0.0, decays=False, warmup=30),
    Stage("find", 250, 1.5e-3, 0.0, decays=False, warmup=30),
    Stage("time", 250, 1.2e-3, 0.0, decays=False, warmup=30),
    # From here two heads are shown where to look, and from "worded" on the projector goes on being aligned.
    Stage("guided", 230, 1.2e-3, 0.0, decays=False, warmup=30),
    Stage("worded", 201, 1.2e-3, 0.0, decays=False, warmup=30),
    Stage("spots", 220, 1.5e-3, 0.0, decays=False, warmup=10),
    Stage("last", 430, 1.2e-3, 0.0, warmup=10),
)
IMAGE_STAGES = ("tower", "align", "places", "cells")
GUIDED_STAGES = ("guided", "worded", "spots", "last")
WORDED_STAGES = ("worded", "spots", "last")  # the projector goes on being aligned
WORDED_IMAGES = 12
IMAGES_PER_RANK = 32
BATCH_RANKS = 2  # the global batch is always that of two ranks


class PatchHeads(torch.nn.Module):
    """Reads shape, colour, two digits and the way to the centre from each patch; dropped after training."""

    SIZES = {
        "shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "tens": 11, "units": 11, "offset": 2,
        "row": GRID, "column": GRID,
    }

    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.reads = torch.nn.ModuleDict({key: torch.nn.Linear(width, n) for key, n in self.SIZES.items()})
        self.clock = torch.nn.Linear(LANGUAGE_WIDTH, 1)

    def loss(
        self, features: torch.Tensor, labels: dict[str, torch.Tensor], stage: str
    ) -> tuple[torch.Tensor, Counter]:
        """Loss, and hits on patches that show something; `features` [N, 64, D], labels [N, 8, 8].

        In the stage "places" each patch must also tell its row and its column; in "cells" so plainly that
        readers of unit length see it, else it drowns in what the projector passes on.
        """
        hidden, total, score = self.norm(features), torch.zeros(()), Counter()
        total = total.to(features.device)
        for key in ("shape", "colour", "tens", "units"):
            logits, target = self.reads[key](hidden).flatten(0, 1), labels[key].flatten()
            weight = torch.ones(self.SIZES[key], device=logits.device)
            weight[0] = 0.25
            total = total + F.cross_entropy(logits, target, weight)
            shown = target > 0
            score[f"{key} hits"] += int((logits.argmax(1) == target)[shown].sum())
            score[f"{key} asked"] += int(shown.sum())
        owned = labels["shape"].flatten() > 0
        away = self.reads["offset"](hidden).flatten(0, 1)[owned] - labels["offset"].flatten(0, 2)[owned]
        total = total + away.abs().mean()
        if stage in ("places", "cells"):
            cells = torch.arange(GRID * GRID, device=features.device).repeat(len(features))
            for key, target in (("row", cells // GRID), ("column", cells % GRID)):
                weight, bias = self.reads[key].weight, self.reads[key].bias
                weight = F.normalize(weight, dim=1) if stage == "cells" else weight
                total = total + 0.5 * F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), target)
        return total, score


class Trainer:
    """One rank's model, optimiser and place in the schedule."""

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int):
        self.args, self.rank, self.ranks = args, rank, ranks
        self.device = torch.device(args.device)
        self.tokenizer = build_tokenizer()
        self.model = build_model(args.seed)
        use_packed_attention(self.model)
        self.heads = PatchHeads(self.model.config.vision_config.hidden_size)
        self.model.to(self.device).train()
        self.heads.to(self.device)
        self.stage, self.step, self.score, self.seconds = 0, 0, Counter(), 0.0
        self.optimizer = self._optimizer()

    @property
    def stages(self) -> list[Stage]:
        scale = self.args.steps_scale
        return [
            replace(s, steps=max(1, round(s.steps * scale)), warmup=math.ceil(s.warmup * scale))
            for s in STAGES
        ]

    def _groups(self) -> list[list[torch.nn.Parameter]]:
        """The parameters that this stage trains: language side, then tower side."""
        name = self.stages[self.stage].name
        language, tower = [], []
        for key, parameter in self.model.named_parameters():
            if "post_layernorm" not in key:
                (tower if "vision_tower" in key else language).append(parameter)
        if name in ("tower", "places", "cells"):
            return [[], tower + list(self.heads.parameters())]
        if name == "align":
            embeddings = self.model.get_input_embeddings().parameters()
            return [[*self.model.model.multi_modal_projector.parameters(), *embeddings], []]
        if name in GUIDED_STAGES:
            language += self.heads.clock.parameters()
        return [language, []]

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": group} for group in self._groups() if group]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.03)

    def _set_rates(self) -> None:
        stage = self.stages[self.stage]
        warm = min(1.0, (self.step + 1) / max(1, stage.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / stage.steps)) if stage.decays else 1.0
        scale = warm * (0.03 + 0.97 * fall)
        rates = [rate for rate in (stage.language_rate, stage.tower_rate) if rate]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate * scale

    def train_step(self) -> float:
        """One update; returns this rank's loss."""
        self._set_rates()
        name = self.stages[self.stage].name
        self.optimizer.zero_grad(set_to_none=True)
        shares = range(self.rank, BATCH_RANKS, self.ranks)
        losses = []
        for share in shares:
            on_images = name in IMAGE_STAGES
            loss = self._image_loss(name, share) if on_images else self._language_loss(name, share)
            (loss / len(shares)).backward()
            losses.append(loss.item())
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        self._average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return sum(losses) / len(losses)

    def _image_loss(self, name: str, share: int) -> torch.Tensor:
        pixels, labels = image_batch(name, self.step, share * IMAGES_PER_RANK, IMAGES_PER_RANK)
        labels = {key: value.to(self.device) for key, value in labels.items()}
        with torch.set_grad_enabled(name != "align"):
            features = encode_frames(self.model, pixels.to(self.device))
        if name == "align":
            return self._align_loss(features, labels)
        loss, score = self.heads.loss(features, labels, name)
        self.score.update(score)
        return loss

    def _align_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy of a projected patch, read as a word, against the words for what it shows."""
        language = self.model.model.language_model
        logits = self.model.lm_head(language.norm(self.model.model.multi_modal_projector(features)))
        words, shown = patch_words(self.tokenizer, labels)
        loss = -(words * logits.log_softmax(-1)).sum(-1)
        return loss[shown].mean() + 0.2 * loss[~shown].mean()

    def _language_loss(self, name: str, share: int) -> torch.Tensor:
        layout = draw_layout(name, self.step)
        clips = layout.clips
        batch = clip_batch(self.tokenizer, name, self.step, share * clips, clips, layout.frames)
        with torch.no_grad():
            features = encode_frames(self.model, batch.pixels.to(self.device))
        where = batch.targets != IGNORE
        features = features.unflatten(0, (clips, -1))
        guide = self._guide(batch, layout) if name in GUIDED_STAGES else None
        questions = batch.ids.to(self.device), where.to(self.device)
        logits = packed_logits(self.model, features, *questions, layout.slow, layout.mode, guide)
        target = batch.targets[where].to(self.device)
        if layout.mode == "both":
            self._count_hits(batch.types, where, (logits.argmax(1) == target).cpu())
        loss = F.cross_entropy(logits, target)
        if guide is not None:
            loss = loss + self._guide_loss(guide, layout)
        if name in WORDED_STAGES:
            pixels, labels = image_batch(name, self.step, share * WORDED_IMAGES, WORDED_IMAGES)
            labels = {key: value.to(self.device) for key, value in labels.items()}
            with torch.no_grad():
                features = encode_frames(self.model, pixels.to(self.device))
            loss = loss + 0.3 * self._align_loss(features, labels)
        return loss

    def _guide(self, batch: ClipBatch, layout: Layout) -> Guide:
        """What the questions of a batch are about, token by token."""
        tokens = pool_tokens(batch.shown, layout.slow, layout.mode) > 0  # [B, S, things]
        about = torch.einsum("bst,bqt->bqs", tokens.float(), batch.about) > 0
        start = (batch.targets != IGNORE).int().argmax(-1)
        slow = 0 if layout.mode == "fast" else layout.slow * GRID * GRID // 2
        return Guide(about.to(self.device), start.to(self.device), slow)

    def _guide_loss(self, guide: Guide, layout: Layout) -> torch.Tensor:
        moments = (torch.arange(layout.frames) + 0.5) / layout.frames
        moments = moments[None, :, None, None].expand(1, -1, GRID * GRID, 1)
        target = pool_tokens(moments.contiguous(), layout.slow, layout.mode)[0, :, 0].to(self.device)
        told = self.heads.clock(F.rms_norm(guide.visual, guide.visual.shape[-1:]))[..., 0]
        self.score["guide hits"] += float(sum(-loss.detach() for loss in guide.losses))
        self.score["guide asked"] += 1
        self.score["clock hits"] += float((told - target).abs().mean().detach())
        self.score["clock asked"] += 1
        return 0.15 * sum(guide.losses) + 2 * (told - target).square().mean()

    def _count_hits(self, types: torch.Tensor, where: torch.Tensor, hits: torch.Tensor) -> None:
        """Questions answered rightly, word for word, given the words before."""
        wrong = torch.zeros_like(where)
        wrong[where] = ~hits
        right = ~wrong.any(-1)
        for kind, ok in zip(types.flatten().tolist(), right.flatten().tolist()):
            self.score[f"{TYPES[kind]} hits"] += ok
            self.score[f"{TYPES[kind]} asked"] += 1

    def _average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        if self.ranks == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.div_(self.ranks).split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))

    def finished_stage(self) -> bool:
        return self.step >= self.stages[self.stage].steps

    def next_stage(self) -> bool:
        """Moves on; False where there is no stage left."""
        if self.stage + 1 == len(self.stages):
            return False
        self.stage, self.step, self.score = self.stage + 1, 0, Counter()
        self.optimizer = self._optimizer()
        return True

    def save(self, path: Path) -> None:
        """Writes everything that a resumed run needs, never half of it."""
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(), "stage": self.stage, "step": self.step,
            "scale": self.args.steps_scale,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["scale"] != self.args.steps_scale:
            sys.exit(f"{path} was trained with --steps-scale {state['scale']}: pass the same to resume it")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def run(args: argparse.Namespace, rank: int, ranks: int) -> None:
    """The whole schedule on one rank; rank 0 reports, saves and exports."""
    trainer = Trainer(args, rank, ranks)
    work = Path(args.work)
    checkpoint = work / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        trainer.load(checkpoint)
    lead = rank == 0
    work.mkdir(parents=True, exist_ok=True)
    with Report(work, trainer, lead) as report:
        running = True
        while running:
            saved = time.monotonic()
            while not trainer.finished_stage():
                begun = time.monotonic()
                loss = trainer.train_step()
                trainer.seconds += time.monotonic() - begun
                report.step(loss)
                if lead and time.monotonic() - saved > args.save_every:
                    saved = time.monotonic()
                    trainer.save(checkpoint)
                    export(trainer.model, args.out)
            report.flush()
            running = trainer.next_stage()
            if lead:
                trainer.save(checkpoint)
                export(trainer.model, args.out)


class Report:
    """Progress on stderr and one JSON line each LOG_EVERY steps in log.jsonl; silent on other ranks."""

    def __init__(self, work: Path, trainer: Trainer, lead: bool):
        self.trainer, self.lead, self.losses = trainer, lead, []
        self.path = work / "log.jsonl"

    def __enter__(self) -> Report:
        if self.lead:
            from rich.console import Console
            from rich.progress import Progress

            self.progress = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
            self.progress.start()
            self.bars = {s.name: self.progress.add_task(s.name, total=s.steps) for s in self.trainer.stages}
        return self

    def __exit__(self, *error) -> None:
        if self.lead:
            self.progress.stop()

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        if not self.lead:
            return
        self.progress.update(self.bars[self._stage()], completed=self.trainer.step)
        if self.trainer.step % LOG_EVERY == 0:
            self.flush()

    def _stage(self) -> str:
        return self.trainer.stages[self.trainer.stage].name

    def flush(self) -> None:
        if not self.lead or not self.losses:
            return
        score = self.trainer.score
        kinds = [key.removesuffix(" asked") for key in score if key.endswith(" asked") and score[key]]
        rates = {kind: round(score[f"{kind} hits"] / score[f"{kind} asked"], 3) for kind in kinds}
        line = {
            "stage": self._stage(), "step": self.trainer.step,
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "seconds": round(self.trainer.seconds), "right": rates,
        }
        with self.path.open("a") as log:
            log.write(json.dumps(line) + "\n")
        head = f"{line['stage']} {line['step']} loss {line['loss']} {line['seconds']} s"
        self.progress.console.print(f"{head} {rates}")
        self.losses, self.trainer.score = [], Counter()


def _rank_main(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(max(1, args.threads // args.ranks))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    try:
        run(args, rank, args.ranks)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sfllava_fast.embedded.train", description=__doc__.split("\n\n")[0],
        epilog="example: python -m sfllava_fast.embedded.train --out out/embedded --ranks 2",
    )
    parser.add_argument("--out", required=True, help="where the Hugging Face directory goes")
    parser.add_argument("--work", default="runs/embedded", help="where checkpoint.pt and log.jsonl go")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2 if (os.cpu_count() or 1) > 1 else 1)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1),
                        help="of all ranks together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (one rank)")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; the data has fixed seeds")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="shortens or lengthens every stage")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--smoke", action="store_true", help="some 20 steps in all, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps_scale = 20 / sum(stage.steps for stage in STAGES)
    if args.device != "cpu":
        args.ranks = 1
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.ranks == 1:
        torch.set_num_threads(args.threads)
        run(args, 0, 1)
        return 0
    torch.multiprocessing.spawn(_rank_main, (args, _free_port()), nprocs=args.ranks)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; go on with --resume")

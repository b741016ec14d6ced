"""The training loop of the embedded model: stages, data-parallel ranks, checkpoints, a log."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ..model import build_tokenizer
from ..questions import TYPES
from .batches import Diet

LOG_EVERY = 50
Score = defaultdict[str, float]  # counts "NAME hits" and "NAME asked"
BATCH_RANKS = 2  # the batch has two shares for any number of ranks


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
        name: Of the stage.
        trains: The part of the model that it trains.
        steps: Number of updates.
        rate, end_rate: The learning rate's peak and end.
        warmup: Steps of linear warm-up.
        diet: The distribution of its data.
        guided: Whether auxiliary losses are used.
    """

    name: str
    trains: str
    steps: int
    rate: float
    end_rate: float
    warmup: int = 30
    diet: Diet = field(default_factory=Diet)
    guided: bool = False

    def rate_at(self, step: int) -> float:
        """The learning rate: linear warm-up, then a cosine from `rate` to `end_rate`."""
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / max(1, self.warmup)) * (self.end_rate + (self.rate - self.end_rate) * fall)


class Trainer:
    """One rank's modules, optimizer and progress. Subclasses define the stages, parameters, loss and export.

    Args:
        args: The command's options.
        rank, ranks: Number of this process, and of all.
        modules: What checkpoints contain, by name.
    """

    STAGES: tuple[Stage, ...]

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, modules: dict[str, torch.nn.Module]):
        self.args, self.rank, self.ranks = args, rank, ranks
        self.device = torch.device(args.device)
        self.tokenizer = build_tokenizer()
        self.modules = {name: module.to(self.device).train() for name, module in modules.items()}
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.score: Score = defaultdict(float)
        self.optimizer = self._optimizer()

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that this stage trains."""
        raise NotImplementedError

    def loss(self, share: int) -> torch.Tensor:
        """The loss of one of the BATCH_RANKS shares of this step's batch."""
        raise NotImplementedError

    def export(self, directory: str | Path) -> None:
        """Write the trained weights."""
        raise NotImplementedError

    @property
    def stages(self) -> list[Stage]:
        """The stages, scaled by --steps-scale."""
        scale = self.args.steps_scale
        return [
            replace(s, steps=max(1, round(s.steps * scale)), warmup=math.ceil(s.warmup * scale)) for s in self.STAGES
        ]

    @property
    def now(self) -> Stage:
        """The current stage."""
        return self.stages[self.stage]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.03)

    def train_step(self) -> float:
        """Do one update; returns this rank's loss."""
        self.optimizer.param_groups[0]["lr"] = self.now.rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        shares = range(self.rank, BATCH_RANKS, self.ranks)
        losses = []
        for share in shares:
            loss = self.loss(share)
            (loss / len(shares)).backward()
            losses.append(loss.item())
        parameters = self.parameters()
        for p in parameters:  # a head without targets on this rank may have some on the other
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self._average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return sum(losses) / len(losses)

    def count_hits(self, types: torch.Tensor, where: torch.Tensor, hits: torch.Tensor) -> None:
        """Count questions whose tokens are all predicted, each from the right ones before it.

        Args:
            types: int64 [B, Q].
            where: Tokens of answers, bool [B, Q, L].
            hits: Whether each of these is predicted, bool [A].
        """
        wrong = torch.zeros_like(where)
        wrong[where] = ~hits
        right = ~wrong.any(-1)
        for kind, ok in zip(types.flatten().tolist(), right.flatten().tolist()):
            self.score[f"{TYPES[kind]} hits"] += ok
            self.score[f"{TYPES[kind]} asked"] += 1

    def _average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        if self.ranks == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.div_(self.ranks).split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def finished_stage(self) -> bool:
        """Whether all steps of the current stage are done."""
        return self.step >= self.now.steps

    def next_stage(self) -> bool:
        """Start the next stage; False if there is none."""
        if self.stage + 1 == len(self.stages):
            return False
        trained = self.now.trains
        self.stage, self.step, self.score = self.stage + 1, 0, defaultdict(float)
        if self.now.trains != trained:
            self.optimizer = self._optimizer()
        return True

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state = {name: module.state_dict() for name, module in self.modules.items()} | {
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "scale": self.args.steps_scale,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint; exits if it is of another training."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if not self.modules.keys() <= state.keys():
            sys.exit(f"{path} is of another training: give each one its own --work")
        if state["scale"] != self.args.steps_scale:
            sys.exit(f"{path} was trained with --steps-scale {state['scale']}: pass the same to resume it")
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def run(trainer: Trainer) -> None:
    """Train all stages on one rank; rank 0 logs, saves and exports."""
    args, lead = trainer.args, trainer.rank == 0
    work = Path(args.work)
    checkpoint = work / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        trainer.load(checkpoint)
    work.mkdir(parents=True, exist_ok=True)
    with TrainingLog(work, trainer, lead) as log:
        running = True
        while running:
            saved = time.monotonic()
            while not trainer.finished_stage():
                start = time.monotonic()
                loss = trainer.train_step()
                trainer.seconds += time.monotonic() - start
                log.step(loss)
                if lead and time.monotonic() - saved > args.save_every:
                    saved = time.monotonic()
                    trainer.save(checkpoint)
                    trainer.export(args.out)
            log.flush()
            running = trainer.next_stage()
            if lead:
                trainer.save(checkpoint)
                trainer.export(args.out)


class TrainingLog:
    """A progress bar on stderr, and a JSON line in log.jsonl after every LOG_EVERY steps; on rank 0 alone."""

    def __init__(self, work: Path, trainer: Trainer, lead: bool):
        self.trainer, self.lead = trainer, lead
        self.losses: list[float] = []
        self.path = work / "log.jsonl"

    def __enter__(self) -> TrainingLog:
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
        """Record the loss of a step."""
        self.losses.append(loss)
        if not self.lead:
            return
        self.progress.update(self.bars[self.trainer.now.name], completed=self.trainer.step)
        if self.trainer.step % LOG_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        """Write the line of the steps since the last one."""
        if not self.lead or not self.losses:
            return
        score = self.trainer.score
        kinds = [key.removesuffix(" asked") for key in score if key.endswith(" asked") and score[key]]
        rates = {kind: round(score[f"{kind} hits"] / score[f"{kind} asked"], 3) for kind in kinds}
        line = {
            "stage": self.trainer.now.name,
            "step": self.trainer.step,
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "seconds": round(self.trainer.seconds),
            "right": rates,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        head = f"{line['stage']} {line['step']} loss {line['loss']} {line['seconds']} s"
        self.progress.console.print(f"{head} {rates}")
        self.losses, self.trainer.score = [], defaultdict(float)

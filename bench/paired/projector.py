"""The commuted projector against the standard order: errors against float64 first, then paired ratios."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

from sfllava_fast import SlowFastLayout
from sfllava_fast.ops.projector import project_and_aggregate

from ..harness import pairs
from ..harness.tables import make_table, pair_cells, pair_columns, show_machine, show_notes
from ..harness.timers import CpuTimer, CudaTimer, paired_rows

EXACT, COMMUTED = "exact", "commuted"
FRAMES, GRID, VISION, LANGUAGE = 50, (24, 24), 1024, 4096
_CHECKED_FRAMES = 4  # in float64
# Of the exact order's; the maximum in the slow pathway makes it exceed 1 by chance.
_MOST_ERROR = 1.01
_SLOW_ROUNDS = 3  # a call takes a minute if 16-bit products are emulated


@dataclass(frozen=True)
class ProjectorCall:
    """The paper's layout with a slow pooling, on LLaVA-NeXT-7B's projector; `bars` are target ratios by device."""

    dtype: torch.dtype
    pool: str
    bars: dict[str, float]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.pool}"

    def layout(self, frames: int) -> SlowFastLayout:
        return SlowFastLayout(max(1, frames // 5), self.pool)


_MAX, _MEAN = "spatial_1d_max_pool", "spatial_1d_avg_pool"
WORKS = (
    ProjectorCall(torch.bfloat16, _MAX, {"cpu": 1.95, "cuda": 2.1}),
    ProjectorCall(torch.bfloat16, _MEAN, {"cpu": 2.0, "cuda": 2.7}),
    ProjectorCall(torch.float32, _MAX, {}),
    ProjectorCall(torch.float32, _MEAN, {}),
)


def run(device: str, rounds: int, only: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Time both orders of every work chosen by `only`; `save` gets the result after each."""
    return pairs.run("projector", WORKS, _measure, device, rounds, only, save)


def show(result: dict, console: Console) -> None:
    show_machine(result, console)
    title = "projector and aggregator, 50 frames of 24x24 patches, 1024 -> 4096"
    columns = (*pair_columns(EXACT, COMMUTED), "bar", "error / exact's: slow", "fast")
    table = make_table(title, columns)
    for work, figures in result["works"].items():
        (bar,), errors = figures["bars"].values(), figures["error_over_exact"]
        target = f"{bar['bar']:.2f}" if bar["bar"] else ""
        cells = [*pair_cells(figures, EXACT, COMMUTED), target, f"{errors['slow']:.3f}", f"{errors['fast']:.3f}"]
        table.add_row(work, *cells)
    console.print(table)
    show_notes(result, console)


@torch.inference_mode()
def _measure(work: ProjectorCall, device: str, timer: CpuTimer | CudaTimer, rounds: int) -> dict:
    projector = make_projector(work.dtype, device)
    errors = _errors(work, projector, device)
    if max(errors.values()) > _MOST_ERROR:
        raise AssertionError(f"the commuted order's error is {max(errors.values()):.3f} of the exact one's")
    hidden = _hidden(FRAMES, work.dtype, device)
    samples = {
        mode: timer.prepare(partial(_call, hidden, projector, work.layout(FRAMES), mode), 1, capture=False)
        for mode in (COMMUTED, EXACT)
    }
    slow = device == "cpu" and work.dtype is not torch.float32
    times = timer.times(samples, min(rounds, _SLOW_ROUNDS) if slow else rounds)
    tokens = work.layout(FRAMES).count_tokens(FRAMES, GRID)
    rows = paired_rows(times, COMMUTED, tokens)
    patches = FRAMES * math.prod(GRID)
    return {
        "flop": 2 * patches * LANGUAGE * (VISION + LANGUAGE),
        "bytes": hidden.nbytes,
        "tokens": tokens,
        "gb_per_s": hidden.nbytes / rows[COMMUTED]["p50_ms"] / 1e6,
        "error_over_exact": errors,
        "providers": rows,
        "best_peer": EXACT,
        "bars": {f"{COMMUTED}: {EXACT}": {"bar": work.bars.get(device), "ratio": rows[EXACT]["ratio"]}},
    }


def _call(hidden: Tensor, projector: nn.Module, layout: SlowFastLayout, mode: str, number: int) -> Tensor:
    return project_and_aggregate(hidden, projector, layout, mode=mode)


def make_projector(dtype: torch.dtype, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(VISION, LANGUAGE), nn.GELU(), nn.Linear(LANGUAGE, LANGUAGE))
    return layers.to(device, dtype).requires_grad_(False)


def _hidden(frames: int, dtype: torch.dtype, device: str) -> Tensor:
    """The vision tower's output without the class token, as a view."""
    generator = torch.Generator(device).manual_seed(0)
    shape = frames, math.prod(GRID) + 1, VISION
    return torch.randn(shape, generator=generator, device=device).to(dtype)[:, 1:]


def _errors(work: ProjectorCall, projector: nn.Sequential, device: str) -> dict[str, float]:
    """By pathway, the RMS error of the commuted order over that of the exact one, both against float64."""
    hidden = _hidden(_CHECKED_FRAMES, work.dtype, device)
    layout = work.layout(_CHECKED_FRAMES)
    wide = project_and_aggregate(hidden.double(), make_wide(projector), layout)
    tokens = {mode: project_and_aggregate(hidden, projector, layout, mode=mode) for mode in (EXACT, COMMUTED)}
    slow = layout.plan(_CHECKED_FRAMES, GRID).tokens["slow"]
    parts = {"slow": slice(0, slow), "fast": slice(slow, None)}
    off = {mode: {name: _rms(got[rows] - wide[rows]) for name, rows in parts.items()} for mode, got in tokens.items()}
    return {name: off[COMMUTED][name] / off[EXACT][name] for name in parts}


def make_wide(projector: nn.Sequential) -> nn.Sequential:
    """The same weights in float64."""
    return copy.deepcopy(projector).double()


def _rms(error: Tensor) -> float:
    return error.double().pow(2).mean().sqrt().item()

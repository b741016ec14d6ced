"""The named layouts at their published frames and grids: our op against each code base's own poolings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from sfllava_fast import slowfast_aggregate
from sfllava_fast.layouts.presets import Preset, find_preset

from ..harness import pairs
from ..harness.tables import make_table, pair_cells, pair_columns, show_machine, show_notes
from ..harness.timers import CpuTimer, CudaTimer, paired_rows
from .published import LAYOUTS

OURS, PUBLISHED = "op", "published"
_NAMES = (
    "sf_llava",
    "llava_next_image",
    "llava_next_video-max-newline_frame",
    "llava_next_video-bilinear-newline_grid",
    "llava_video_slowfast-avg-every_10-newline_grid",
    "pllava",
    "video_chatgpt",
    "videollm_online-interval",
)
CHANNELS = {"after": 4096, "before": 1024}
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class PresetCall:
    """A named layout on random features of its published frames and grid."""

    name: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def preset(self) -> Preset:
        return find_preset(self.name)

    def make(self, device: str) -> tuple[Tensor, Tensor | None]:
        """Features [T, N, D], and separators [K, D] if the layout has any."""
        layout, generator = self.preset.layout, torch.Generator(device).manual_seed(0)
        patches, channels = math.prod(self.preset.grid) + layout.class_token, CHANNELS[layout.stage]
        shapes = (self.preset.frames, patches, channels), (len(layout.separators), channels)
        features, separators = (torch.randn(s, generator=generator, device=device).to(self.dtype) for s in shapes)
        return features, separators if len(separators) else None


WORKS = tuple(PresetCall(name, dtype) for name in _NAMES for dtype in (torch.float32, torch.bfloat16))


def run(device: str, rounds: int, only: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Time both forms of every work chosen by `only`; `save` gets the result after each."""
    return pairs.run("layouts", WORKS, measure, device, rounds, only, save)


def show(result: dict, console: Console) -> None:
    show_machine(result, console)
    table = make_table("layouts at their published frames and grids", (*pair_columns(PUBLISHED, OURS), "GB/s"))
    for work, figures in result["works"].items():
        table.add_row(work, *pair_cells(figures, PUBLISHED, OURS), f"{figures['gb_per_s']:.1f}")
    console.print(table)
    show_notes(result, console)


@torch.inference_mode()
def measure(work: PresetCall, device: str, timer: CpuTimer | CudaTimer, rounds: int) -> dict:
    """Check the tokens of both forms, then time them."""
    sets = [work.make(device)]
    grid, published = work.preset.grid, LAYOUTS[work.name]

    def ours(number: int) -> Tensor:
        features, separators = sets[number]
        return slowfast_aggregate(features, work.name, grid=grid, separators=separators)

    def theirs(number: int) -> Tensor:
        features, separators = sets[number]
        return published(features, grid, separators).contiguous()

    forms = {OURS: ours, PUBLISHED: theirs}
    tokens, tolerance = [call(0) for call in forms.values()], _CLOSE[work.dtype]
    torch.testing.assert_close(*tokens, rtol=tolerance, atol=tolerance)
    moved, count = sets[0][0].nbytes + tokens[0].nbytes, len(tokens[0])
    tokens.clear()
    sets += [work.make(device) for _ in range(timer.sets(moved) - 1)]
    samples = {form: timer.prepare(call, len(sets)) for form, call in forms.items()}
    times = timer.times(samples, rounds)
    rows = paired_rows(times, OURS, count)
    return {
        "bytes": moved,
        "tokens": count,
        "gb_per_s": moved / rows[OURS]["p50_ms"] / 1e6,
        "providers": rows,
        "best_peer": PUBLISHED,
        "bars": {f"{OURS}: {PUBLISHED}": {"bar": 1.0, "ratio": rows[PUBLISHED]["ratio"]}},
    }

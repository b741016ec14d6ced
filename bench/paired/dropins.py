"""The drop-ins in the code bases that they are for: each method as published (written for this benchmark) and patched.

50 frames of 24x24 patches after the projector; every call allocates its tokens, as in those code bases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from sfllava_fast import SlowFastLayout
from sfllava_fast.patch import Patch, patch_llava_next, patch_slowfast_llava

from ..harness import pairs
from ..harness.tables import make_table, pair_cells, pair_columns, show_machine, show_notes
from ..harness.timers import CpuTimer, CudaTimer, paired_rows

PATCHED, PUBLISHED = "patched", "published"
FRAMES, GRID, CHANNELS = 50, (24, 24), 4096
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


_POOLS = {
    "spatial_2d_avg_pool": lambda planes: F.avg_pool2d(planes, 2),
    "spatial_temporal_pool": lambda planes: F.adaptive_avg_pool3d(planes, (16, 12, 12)),
}
_POOLS_1D = {"spatial_1d_max_pool": F.max_pool1d, "spatial_1d_avg_pool": F.avg_pool1d}


class SlowFastCode:
    """The interface of the published SF-LLaVA code, and the order of its axes: [D, T, rows, columns]."""

    def prepare_slowfast(self, image_features: Tensor, temporal_aggregation: str) -> Tensor:
        layout = SlowFastLayout.parse(temporal_aggregation)
        slow_frames = torch.linspace(0, len(image_features), layout.slow_frames + 1)[:-1].int().tolist()
        slow = self.temporal_aggregation(image_features[slow_frames], layout.slow_pool)
        fast = F.adaptive_avg_pool2d(self._planes(image_features), layout.fast_grid)
        return torch.cat((slow, self._rows(fast)), dim=1)

    def temporal_aggregation(self, image_features: Tensor, temporal_aggregation: str) -> Tensor:
        if temporal_aggregation in _POOLS:
            return self._rows(_POOLS[temporal_aggregation](self._planes(image_features)))
        pooled = _POOLS_1D[temporal_aggregation](image_features.transpose(1, 2), 2, 2)
        return pooled.transpose(1, 2).reshape(1, -1, image_features.shape[2])

    def _planes(self, features: Tensor) -> Tensor:
        return features.permute(2, 0, 1).unflatten(2, GRID)

    def _rows(self, planes: Tensor) -> Tensor:
        return planes.permute(1, 2, 3, 0).reshape(1, -1, planes.shape[0])


class NextCode:
    """The interface of LLaVA-NeXT / LLaVA-Video code."""

    def __init__(self, mode: str, newline: Tensor) -> None:
        self.config = SimpleNamespace(mm_spatial_pool_mode=mode, add_faster_video=False)
        self.model = SimpleNamespace(image_newline=newline)

    def get_vision_tower(self) -> SimpleNamespace:
        return SimpleNamespace(num_patches_per_side=GRID[0])

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        frames, _, channels = image_feature.shape
        planes = image_feature.unflatten(1, GRID).permute(0, 3, 1, 2).contiguous()
        pool = {
            "average": lambda x: F.avg_pool2d(x, stride),
            "max": lambda x: F.max_pool2d(x, stride),
            "bilinear": lambda x: F.interpolate(x, [math.ceil(n / stride) for n in x.shape[2:]], mode="bilinear"),
        }[self.config.mm_spatial_pool_mode]
        return pool(planes).permute(0, 2, 3, 1).view(frames, -1, channels)

    def add_token_per_grid(self, image_feature: Tensor) -> Tensor:
        frames, patches, channels = image_feature.shape
        side = math.isqrt(patches)
        planes = image_feature.view(frames, side, side, channels).permute(3, 0, 1, 2).reshape(channels, -1, side)
        newline = self.model.image_newline[:, None, None].expand(channels, frames * side, 1)
        return torch.cat((planes, newline), dim=2).flatten(1).transpose(0, 1)

    def add_token_per_frame(self, image_feature: Tensor) -> Tensor:
        newline = self.model.image_newline.expand(len(image_feature), 1, -1)
        return torch.cat((image_feature, newline), dim=1)


@dataclass(frozen=True)
class DropinCall:
    """A call of a method, or of two in a row, with `name`."""

    method: str
    name: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.method} {self.name} {str(self.dtype).removeprefix('torch.')}"

    def model(self, features: Tensor) -> SlowFastCode | NextCode:
        return NextCode(self.name, features[0, 0]) if self.method == _POOL else SlowFastCode()

    def patch(self, model: SlowFastCode | NextCode) -> Patch:
        return (patch_llava_next if self.method == _POOL else patch_slowfast_llava)(model)

    def call(self, model: SlowFastCode | NextCode, features: Tensor, number: int = 0) -> Tensor:
        if self.method == _POOL:
            return model.add_token_per_grid(model.get_2dPool(features)).contiguous()
        return getattr(model, self.method)(features, self.name)


_POOL = "get_2dPool and add_token_per_grid,"
_CALLS = (
    ("prepare_slowfast", str(SlowFastLayout())),
    ("temporal_aggregation", "spatial_1d_avg_pool"),
    ("temporal_aggregation", "spatial_2d_avg_pool"),
    ("temporal_aggregation", "spatial_temporal_pool"),
    (_POOL, "average"),
    (_POOL, "max"),
    (_POOL, "bilinear"),
)
WORKS = tuple(DropinCall(*call, dtype) for call in _CALLS for dtype in (torch.float32, torch.bfloat16))


def run(device: str, rounds: int, only: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Time both forms of every work chosen by `only`; `save` gets the result after each."""
    return pairs.run("dropins", WORKS, _measure, device, rounds, only, save)


def show(result: dict, console: Console) -> None:
    show_machine(result, console)
    title = "drop-ins, 50 frames of 24x24 patches of 4096"
    table = make_table(title, (*pair_columns(PUBLISHED, PATCHED), "same bits"))
    for work, figures in result["works"].items():
        table.add_row(work, *pair_cells(figures, PUBLISHED, PATCHED), "yes" if figures["same_bits"] else "no")
    console.print(table)
    show_notes(result, console)


@torch.inference_mode()
def _measure(work: DropinCall, device: str, timer: CpuTimer | CudaTimer, rounds: int) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    shape = FRAMES, math.prod(GRID), CHANNELS
    features = torch.randn(shape, generator=generator, device=device).to(work.dtype)
    models = {PATCHED: work.model(features), PUBLISHED: work.model(features)}
    work.patch(models[PATCHED])
    tokens = {form: work.call(model, features) for form, model in models.items()}
    tolerance = _CLOSE[work.dtype]
    torch.testing.assert_close(*tokens.values(), rtol=tolerance, atol=tolerance)
    same_bits, size = torch.equal(*tokens.values()), tokens[PATCHED].nbytes
    count = tokens[PATCHED].numel() // CHANNELS
    tokens.clear()
    samples = {
        form: timer.prepare(partial(work.call, model, features), 1, capture=False) for form, model in models.items()
    }
    times = timer.times(samples, rounds)
    rows = paired_rows(times, PATCHED, count)
    moved = features.nbytes + size
    return {
        "bytes": moved,
        "tokens": count,
        "gb_per_s": moved / rows[PATCHED]["p50_ms"] / 1e6,
        "same_bits": same_bits,
        "providers": rows,
        "best_peer": PUBLISHED,
        "bars": {f"{PATCHED}: {PUBLISHED}": {"bar": 1.0, "ratio": rows[PUBLISHED]["ratio"]}},
    }

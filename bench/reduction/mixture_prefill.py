"""Prefill of a mixture of depths against the plain model, by the share of vision tokens kept.

Hidden states are checked first; then time, FLOP, KV cache and peak memory are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.model.transformers_release import cache_argument
from sfllava_fast.ops.token_offsets import kept_of, token_frames
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths
from sfllava_fast.reduction.scorers import LayerInput

from ..harness import peak_memory as memory
from ..harness.timers import CpuTimer, CudaTimer, Sample, paired_rows
from ..pipeline import costs
from ..pipeline.dummy import dummy_decoder, on_the_same_weights

PLAIN, SWEPT, OTHERS = "plain", "learned", ("norm", "text", "attention")
RATIOS, RATIO = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1), 0.2
# Targets by device, as shares of the plain model's, for every scorer at RATIO in every other layer.
BARS = {device: {"time": time, "FLOP": 0.65, "peak memory": 0.8} for device, time in (("cpu", 0.75), ("cuda", 0.7))}
FRAMES, GRID, BEFORE, AFTER = 50, (24, 24), 35, 25  # BEFORE, AFTER: the text of a published prompt around the video
MID_SIZE = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16, vocab_size=64)
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Forward = Callable[[], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Mixed:
    """A mixture of depths: a share of the vision tokens in every other layer, chosen by a scorer."""

    scorer: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.scorer} {self.ratio}"

    def wrap(self, decoder: nn.Module) -> tuple[nn.Module, MixtureOfDepths]:
        """A mixed decoder that shares the weights of this one, and its mixture."""
        decoder = on_the_same_weights(decoder)
        torch.manual_seed(0)
        return decoder, MixtureOfDepths(decoder, self.ratio, self.scorer).to(decoder.device)


MIXED = (*(Mixed(SWEPT, ratio) for ratio in RATIOS), *(Mixed(scorer, RATIO) for scorer in OTHERS))


@dataclass(frozen=True)
class MixturePrefill:
    """Prefills of SF-LLaVA's prompt; shape as in `dummy_decoder`."""

    name: str
    shape: str | dict
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"prefill {self.name} {str(self.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def measure(self, device: str, timer: CpuTimer | CudaTimer, rounds: int) -> dict:
        decoder = dummy_decoder(self.shape, torch.device(device), self.dtype)
        frames = token_frames(SlowFastLayout().plan(FRAMES, GRID), BEFORE)
        shape = 1, frames[-1] + AFTER, decoder.config.hidden_size
        embeds = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(self.dtype)
        wrapped = {mixed: mixed.wrap(decoder) for mixed in MIXED}
        calls = {PLAIN: partial(prefill, decoder, embeds)}
        calls |= {str(mixed): partial(prefill_mixed, *pair, embeds, frames) for mixed, pair in wrapped.items()}
        held = _check(decoder, embeds, frames, wrapped, calls)
        # The check was the warm-up; a call takes seconds, so that one call is a sample.
        timer = CpuTimer(warm_up=0) if isinstance(timer, CpuTimer) else timer
        times = timer.times({name: Sample(call) for name, call in calls.items()}, rounds)
        counted = {str(mixed): flop(decoder.config, mixed, frames, embeds.shape[1]) for mixed in MIXED}
        counted[PLAIN] = costs.mixture_of_depths(decoder.config, embeds.shape[1], 0, 0)
        rows = paired_rows(times, PLAIN)
        rows = {name: row | {"flop": counted[name]} | held[name] for name, row in rows.items()}
        for name in (PLAIN, str(Mixed(SWEPT, RATIO))):
            rows[name]["parts_ms"] = parts(calls[name], device)
        return {
            "tokens": embeds.shape[1],
            "vision_tokens": frames[-1] - frames[0],
            "providers": rows,
            "best_peer": PLAIN,
            "bars": bars(rows, BARS[device]),
        }


def prefill(decoder: nn.Module, embeds: Tensor) -> tuple[Tensor, Any]:
    """Hidden states [1, S, D] and the KV cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=decoder.config)
    arguments = cache_argument(decoder, cache)
    return decoder(inputs_embeds=embeds, use_cache=True, **arguments).last_hidden_state, cache


def prefill_mixed(
    decoder: nn.Module, mixture: MixtureOfDepths, embeds: Tensor, frames: Sequence[int]
) -> tuple[Tensor, Any]:
    with mixture.on_frames(frames):
        return prefill(decoder, embeds)


def flop(text: Any, mixed: Mixed, frames: Sequence[int], tokens: int) -> dict[str, int]:
    """FLOP of a mixed prefill, counted from shapes."""
    vision = frames[-1] - frames[0]
    kept = tokens - vision + sum(kept_of(mixed.ratio, stop - start) for start, stop in zip(frames, frames[1:]))
    scores = costs.score(text, mixed.scorer, tokens, vision) if mixed.ratio < 1 else 0
    return costs.mixture_of_depths(text, tokens, kept, text.num_hidden_layers // 2, scores)


def shares(rows: dict[str, dict], name: str) -> dict[str, float]:
    """Time, FLOP, cache and peak memory as shares of the plain model's."""
    plain, row = rows[PLAIN], rows[name]
    return {
        "time": row["ratio"],
        "FLOP": sum(row["flop"].values()) / sum(plain["flop"].values()),
        "cache": row["cache_bytes"] / plain["cache_bytes"],
        "peak memory": row["peak_bytes"] / plain["peak_bytes"],
    }


def bars(rows: dict[str, dict], limits: dict[str, float]) -> dict[str, dict]:
    """Upper limits as ratios limit / measured with target 1."""
    return {
        f"{name}: {limits[what]:g} of {PLAIN}'s {what}": {"bar": 1.0, "ratio": limits[what] / share}
        for name in rows
        if name.endswith(f" {RATIO}")
        for what, share in shares(rows, name).items()
        if what in limits
    }


# --- checks before timing


def _check(
    decoder: nn.Module, embeds: Tensor, frames: Sequence[int], wrapped: dict, calls: dict[str, Forward]
) -> dict[str, dict]:
    """Bytes of the cache and of a call's peak, by name; AssertionError if hidden states are wrong."""
    prefill(decoder, embeds[:, :AFTER])  # warm-up
    plain, held = _held(calls[PLAIN], embeds.device)
    found = {PLAIN: held}
    for mixed, (_, mixture) in wrapped.items():
        hidden, found[str(mixed)] = _held(calls[str(mixed)], embeds.device)
        if mixed.ratio == 1 and not torch.equal(hidden, plain):
            raise AssertionError(f"{mixed} differs from the plain model")
        if mixed.ratio == RATIO:
            close, expected = _CLOSE[embeds.dtype], reference_hidden(decoder, mixture, RATIO, embeds, frames)
            torch.testing.assert_close(hidden, expected, rtol=close, atol=close)
    return found


def _held(call: Forward, device: torch.device) -> tuple[Tensor, dict[str, int]]:
    results = []
    peak = memory.tensor_peak(device, lambda: results.append(call()))
    [(hidden, cache)] = results
    held = memory.size(part for layer in cache.layers for part in (layer.keys, layer.values))
    return hidden, {"cache_bytes": held, "peak_bytes": peak}


def reference_hidden(
    decoder: nn.Module, mixture: MixtureOfDepths, ratio: float, embeds: Tensor, frames: Sequence[int]
) -> Tensor:
    """Hidden states of a mixed decoder, computed with the plain one.

    In each mixed layer the best tokens of each frame are found by sorting in Python, and the plain layer runs on them
    and on the text, at their positions.
    """
    tokens, hidden = embeds.shape[1], embeds
    cos, sin = decoder.rotary_emb(hidden, torch.arange(tokens, device=hidden.device)[None])
    for number, layer in enumerate(decoder.layers):
        rows = list(range(tokens))
        if number % 2:
            arguments = {"position_embeddings": (cos, sin)}
            given = LayerInput(hidden, frames[0], frames[-1], layer, arguments)
            scores = mixture.scorers[str(number)](given)[0].tolist()
            rows = [row for row in rows if not frames[0] <= row < frames[-1]]
            for start, stop in zip(frames, frames[1:]):
                ranked = sorted(range(start, stop), key=lambda row: -scores[row - frames[0]])
                rows += ranked[: ceil(Fraction(str(ratio)) * (stop - start))]
        index = torch.tensor(sorted(rows), device=hidden.device)
        hidden = hidden.clone()
        hidden[:, index] = layer(hidden[:, index], position_embeddings=(cos[:, index], sin[:, index]))
    return decoder.norm(hidden)


# --- time by part

# Prefixes of the operators of each part.
_PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": tuple(f"aten::_{name}" for name in ("scaled_dot", "flash_att", "efficient_att", "cudnn_att")),
    "choosing and moving rows": ("sfllava_fast::",),
}


def parts(call: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of a call by part; on a GPU, kernels that are not PyTorch operators count as rest."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        total = (time.perf_counter() - start) * 1e3
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    spent = {
        part: sum(getattr(event, clock) for event in events if event.key.startswith(names)) / 1e3
        for part, names in _PARTS.items()
    }
    return spent | {"rest": total - sum(spent.values())}

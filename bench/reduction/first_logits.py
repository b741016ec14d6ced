"""Prefill of a video and the logits of a first question, with each reduction.

Logits are checked first, with nothing left out; then time and KV cache are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.model.checkpoint import Checkpoint
from sfllava_fast.model.generation import LanguageModel
from sfllava_fast.model.kv_cache import KvCache
from sfllava_fast.ops.token_offsets import token_frames
from sfllava_fast.reduction.compression import Compression
from sfllava_fast.reduction.prefilling import Place, Prefilling, make_prefilling

from ..harness.timers import CpuTimer, CudaTimer, Sample, paired_rows
from ..pipeline.dummy import dummy_checkpoint, on_the_same_weights
from . import mixture_prefill
from .mixture_prefill import AFTER, BEFORE, PLAIN

COMPRESSED = 4  # tokens
REDUCTIONS = (None, "mixture:0.2:norm", "prune:0.2", "prune:0.2:attention", f"compress:{COMPRESSED}")
_MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # relative; other shapes round differently in every layer
_SHORT = SlowFastLayout(2), 3, (6, 6)  # layout, frames and grid with small masks


@dataclass(frozen=True)
class FirstLogits:
    """SF-LLaVA's prompt in two parts: the text before the video with the video, and the question with its logits.

    Attributes:
        shape: One of dummy.NAMES.
        dtype: Of the weights.
    """

    shape: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"question {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def measure(self, device: str, timer: CpuTimer | CudaTimer, rounds: int) -> dict:
        checkpoint, _ = dummy_checkpoint(self.shape, device, self.dtype, "sdpa")
        _check(checkpoint)
        video, question, place = _prompt(checkpoint, SlowFastLayout(), mixture_prefill.FRAMES, mixture_prefill.GRID)
        calls = {
            reduction or PLAIN: partial(ask, _prefilling(checkpoint, reduction), video, question, place)
            for reduction in REDUCTIONS
        }
        held = {name: call()[1].nbytes for name, call in calls.items()}
        timer = CpuTimer(warm_up=0) if isinstance(timer, CpuTimer) else timer  # the calls above were the warm-up
        times = timer.times({name: Sample(call) for name, call in calls.items()}, rounds)
        rows = {name: row | {"cache_bytes": held[name]} for name, row in paired_rows(times, PLAIN).items()}
        return {"tokens": place.token_offsets[-1] + AFTER, "providers": rows, "best_peer": PLAIN, "bars": {}}


def ask(prefilling: Prefilling, video: Tensor, question: Tensor, place: Place) -> tuple[Tensor, KvCache]:
    """Logits [1, V] after a question, and the cache."""
    chosen = prefilling.choose(video, place)
    places = prefilling.length(video.shape[1]) + question.shape[1]
    cache = prefilling.language.new_cache(1, places, chosen.skipped)
    prefilling.prefill(cache, chosen, place)
    return prefilling.language.extend(cache, question), cache


def _prompt(checkpoint: Checkpoint, layout: SlowFastLayout, frames: int, grid: tuple) -> tuple[Tensor, Tensor, Place]:
    model, plan = checkpoint.model, layout.plan(frames, grid)
    place = Place(BEFORE, token_frames(plan, BEFORE), plan)
    shape = 1, place.token_offsets[-1] + AFTER, model.config.text_config.hidden_size
    generator = torch.Generator(model.device).manual_seed(0)
    embeds = torch.randn(shape, generator=generator, device=model.device).to(model.dtype)
    return embeds[:, : place.token_offsets[-1]], embeds[:, place.token_offsets[-1] :], place


def _prefilling(checkpoint: Checkpoint, reduction: str | None) -> Prefilling:
    """A prefilling on modules of its own that share the checkpoint's weights."""
    model = on_the_same_weights(checkpoint.model)
    settings = _compression(checkpoint) if reduction == REDUCTIONS[-1] else reduction
    return make_prefilling(settings, LanguageModel(model, checkpoint.attention), model, checkpoint.context)


def _compression(checkpoint: Checkpoint) -> Compression:
    shape = COMPRESSED, checkpoint.model.config.text_config.hidden_size
    return Compression(torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(checkpoint.model.device)


def _check(checkpoint: Checkpoint) -> None:
    """AssertionError if logits on a short video differ from the stock model's.

    Nothing is left out; for compression, the stock model gets a mask.
    """
    video, question, place = _prompt(checkpoint, *_SHORT)
    whole = torch.cat([video, question], dim=1)
    spans = [(place.start, place.token_offsets[-1])]
    stock: dict[str, Callable[[], Tensor]] = {
        **dict.fromkeys((PLAIN, "mixture:1", "prune:1.0"), partial(checkpoint.model, inputs_embeds=whole)),
        REDUCTIONS[-1]: partial(_compression(checkpoint), checkpoint.model, whole, spans),
    }
    for name, call in stock.items():
        expected = call().logits[:, -1]
        logits, _ = ask(_prefilling(checkpoint, None if name == PLAIN else name), video, question, place)
        error = ((logits - expected).norm() / expected.norm()).item()
        if not error <= _MOST_ERROR[checkpoint.model.dtype]:
            raise AssertionError(f"{name}: logits are off by {error:.2g} of theirs")

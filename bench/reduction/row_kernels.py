"""The kernels of the reductions against PyTorch's operators: results are checked first, then paired times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.ops import rows
from sfllava_fast.ops.token_offsets import kept_of, token_frames

from ..harness.timers import CpuTimer, CudaTimer, paired_rows

OURS, TORCH = "ours", "torch"
WIDTH, HEADS, QUERIES, RATIO = 4096, 32, 32, 0.2
_ROUNDS = 3  # per round of a prefill: these calls take milliseconds
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # PyTorch's logits are rounded to the keys' dtype


@dataclass(frozen=True)
class RowKernel:
    """An op of `sfllava_fast.ops.rows` on SF-LLaVA's 3680 vision tokens with a 7B model's width."""

    name: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def measure(self, device: str, timer: CpuTimer | CudaTimer, rounds: int) -> dict:
        forms = dict(zip((OURS, TORCH), _FORMS[self.name](self._make(device), _frames())))
        results = [call() for call in forms.values()]
        sums = self.name == "attention_received"
        torch.testing.assert_close(*results, rtol=_CLOSE[self.dtype] if sums else 0, atol=0)
        samples = {name: timer.prepare(lambda _, call=call: call(), 1, capture=False) for name, call in forms.items()}
        times = timer.times(samples, _ROUNDS * rounds)
        found = paired_rows(times, OURS)
        bar = {"bar": 1.0, "ratio": found[TORCH]["ratio"]}
        return {"providers": found, "best_peer": TORCH, "bars": {f"{OURS}: {TORCH}": bar}}

    def _make(self, device: str) -> Callable[..., Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        return lambda *shape: torch.randn(shape, generator=generator, device=device).to(self.dtype)


def _frames() -> tuple[int, ...]:
    return token_frames(SlowFastLayout().plan(50, (24, 24)))


# Each returns our call and PyTorch's. make: draws a tensor with a shape.


def _top(make: Callable[..., Tensor], frames: Sequence[int]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    scores = make(1, frames[-1])

    def best() -> Tensor:
        bounds = list(zip(frames, frames[1:]))
        kept = [a + scores[:, a:b].topk(kept_of(RATIO, b - a)).indices.sort().values for a, b in bounds]
        return torch.cat(kept, dim=1)

    return lambda: rows.top_per_frame(scores, frames, RATIO), best


def _gather(make: Callable[..., Tensor], frames: Sequence[int]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    hidden, index = make(1, frames[-1], WIDTH), _kept(make, frames)
    return lambda: rows.gather_rows(hidden, index), lambda: hidden.index_select(1, index[0])


def _scatter(make: Callable[..., Tensor], frames: Sequence[int]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    hidden, index = make(1, frames[-1], WIDTH), _kept(make, frames)
    new = make(1, index.shape[1], WIDTH)
    return lambda: rows.scatter_rows(hidden, index, new), lambda: hidden.index_copy(1, index[0], new)


def _received(make: Callable[..., Tensor], frames: Sequence[int]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    width, total = WIDTH // HEADS, frames[-1] + QUERIES
    queries, keys = make(1, HEADS, QUERIES, width), make(1, HEADS, total, width)
    hidden = torch.ones(QUERIES, total, dtype=torch.bool, device=keys.device).triu(total - QUERIES + 1)

    def received() -> Tensor:
        logits = (queries @ keys.transpose(2, 3)) * width**-0.5
        return logits.masked_fill(hidden, float("-inf")).float().softmax(-1).mean((1, 2))

    return lambda: rows.attention_received(queries, keys, width**-0.5), received


def _kept(make: Callable[..., Tensor], frames: Sequence[int]) -> Tensor:
    return rows.top_per_frame(make(1, frames[-1]), frames, RATIO)


_FORMS = {"top_per_frame": _top, "gather_rows": _gather, "scatter_rows": _scatter, "attention_received": _received}
_FLOAT32, _BOTH = (torch.float32,), (torch.float32, torch.bfloat16)
WORKS = tuple(RowKernel(name, dtype) for name in _FORMS for dtype in (_FLOAT32 if name == "top_per_frame" else _BOTH))

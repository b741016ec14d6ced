"""The aggregator against its peers: correctness first, then paired ratios."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfllava_fast import backends, reference

from .measure import machine, median_ratio, paired_times, summary
from .peers import CONFIG, providers

_OURS = "cpu"
# Of these the fastest is the peer that a bar is set against; the copy is the memory's own speed.
_CONTESTED = ("best eager", "compiled plain", "compiled best")
_COPY = "copy_"
_SLOW = ("plain eager", "torch")  # tens of times slower: few rounds tell enough


@dataclass(frozen=True)
class Work:
    """T=50 frames of a 24 x 24 grid in the default layout, and the bars that it must reach."""

    dtype: torch.dtype
    channels: int
    cls_token: bool
    peer_bar: float
    copy_bar: float

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} D={self.channels}{' behind CLS' if self.cls_token else ''}"

    def features(self) -> Tensor:
        torch.manual_seed(0)
        skip = int(self.cls_token)
        return torch.randn(50, 576 + skip, self.channels).to(self.dtype)[:, skip:]

    def bytes_moved(self) -> int:
        """Every patch read once, every token written once."""
        return (50 * 576 + 3680) * self.channels * self.dtype.itemsize


WORKS = (
    Work(torch.float32, 4096, False, 1.4, 0.88),
    Work(torch.bfloat16, 4096, False, 1.8, 0.82),
    Work(torch.float16, 4096, False, 1.8, 0.82),
    Work(torch.bfloat16, 1024, True, 2.2, 0.90),
    Work(torch.float16, 1024, True, 2.2, 0.90),
)


def run(rounds: int, slow_peers: bool) -> dict:
    """Times every provider on every work; raises AssertionError where one computes the wrong tokens."""
    result = {"machine": machine(), "isa": backends.cpu_library().sfllava_isa().decode(), "works": {}}
    for work in WORKS:
        result["works"][str(work)] = _run_work(work, rounds, slow_peers)
    return result


def _run_work(work: Work, rounds: int, slow_peers: bool) -> dict:
    features = work.features()
    out = torch.zeros(3680, work.channels, dtype=work.dtype)
    runs = {name: (lambda fill=fill: fill(features, out)) for name, fill in providers().items()}
    _check(runs, features, out)
    runs[_COPY] = _copy_of(work.bytes_moved())
    slow = {name: runs.pop(name) for name in _SLOW}
    times = paired_times(runs, rounds)
    ours = times[_OURS]
    rows = {name: summary(t) | {"ratio": median_ratio(t, ours)} for name, t in times.items()}
    if slow_peers:
        for name, fill in slow.items():
            pair = paired_times({name: fill, _OURS: runs[_OURS]}, 5)
            rows[name] = summary(pair[name]) | {"ratio": median_ratio(pair[name], pair[_OURS])}
    best = min(_CONTESTED, key=lambda name: rows[name]["p50_ms"])
    return {
        "bytes": work.bytes_moved(),
        "gb_per_s": work.bytes_moved() / rows[_OURS]["p50_ms"] / 1e6,
        "providers": rows,
        "best_peer": best,
        "bars": {
            "best peer": {"bar": work.peer_bar, "ratio": rows[best]["ratio"]},
            "copy_": {"bar": work.copy_bar, "ratio": rows[_COPY]["ratio"]},
        },
    }


def _check(runs: dict, features: Tensor, out: Tensor) -> None:
    """Ours must equal the reference bit for bit; peers may round elsewhere, within two units of the last place."""
    expected = reference.aggregate(features, CONFIG.plan(50, (24, 24)))
    near = 4 * torch.finfo(features.dtype).eps
    for name, fill in runs.items():
        out.fill_(float("nan"))
        fill()
        right = torch.equal(out, expected) if name in backends.BACKENDS else None
        if right is None:
            right = torch.allclose(out.float(), expected.float(), rtol=near, atol=near)
        assert right, f"{name} computes other tokens than the reference"


def _copy_of(bytes_moved: int):
    """copy_ that moves as many bytes: half of them read, half written."""
    source = torch.ones(bytes_moved // 8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)

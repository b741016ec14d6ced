"""The aggregation against its peers: values are checked, then ratios are taken. Failures are recorded and skipped."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sfllava_fast import SlowFastLayout, slowfast_aggregate
from sfllava_fast.ops.backends import aggregate as backends

from ..gpu.copies import Copy, gpu_copies, large_copy, torch_copy
from ..harness.progress import progress
from ..harness.record import ResultError, guarded, machine
from ..harness.timers import CpuTimer, CudaTimer, Run, Sample, median_ratio, paired_rows, summary
from . import works
from .peers import peers
from .works import OpWork

COPY, PLAIN, BEST_PEER, FAIREST = "copy_", "plain eager", "best peer", "fairest copy"
# The fastest of these is the best peer.
_CONTESTED = ("best eager", "eager means", "compiled plain", "compiled best")
_REFERENCE = "torch"
_SLOW_ROUNDS = 5
_HOST_BAR_US, _HOST_STRETCH_US, _HOST_ROUNDS, _HOST_CALLS = 10, 7, 50, 100
_Sets = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DeviceSetup:
    """What is measured on a device, and how.

    Attributes:
        device: "cpu" or "cuda".
        works: What is measured.
        ours: Backends; ratios are relative to the first.
        slow: Providers that are tens of times slower and get few rounds.
        timer: The clock.
        compile_mode: Of torch.compile.
        unavailable: Backends and copies that cannot be measured, with the reasons.
        copies: By name; targets refer to the fastest.
    """

    device: str
    works: tuple[OpWork, ...]
    ours: tuple[str, ...]
    slow: tuple[str, ...]
    timer: CpuTimer | CudaTimer
    compile_mode: str | None = None
    unavailable: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Copy] = field(default_factory=lambda: {COPY: torch_copy})


def cpu_setup() -> DeviceSetup:
    return DeviceSetup("cpu", works.CPU_WORKS, ("cpu",), (PLAIN, _REFERENCE), CpuTimer())


def cuda_setup() -> DeviceSetup:
    """ResultError without a GPU or a backend for it."""
    if not torch.cuda.is_available():
        raise ResultError("no CUDA device was found")
    unavailable = {name: backends.BACKENDS[name].why_unavailable(None) for name in ("cuda", "triton")}
    ours = tuple(name for name, reason in unavailable.items() if not reason)
    unavailable = {name: reason for name, reason in unavailable.items() if reason}
    if not ours:
        raise ResultError("; ".join(f"{name}: {reason}" for name, reason in unavailable.items()))
    mode = "max-autotune-no-cudagraphs"  # the timer captures graphs, for every contender alike
    copies, why_not = gpu_copies()
    return DeviceSetup("cuda", works.CUDA_WORKS, ours, (_REFERENCE,), CudaTimer(), mode, unavailable | why_not, copies)


SETUPS = {"cpu": cpu_setup, "cuda": cuda_setup}


def run(setup: DeviceSetup, rounds: int, slow_peers: bool, only: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Measure host overhead, then every provider on every work.

    Args:
        setup: The device.
        rounds: Paired rounds.
        slow_peers: Also time slow providers without a target.
        only: Names of works, as in `works.chosen`.
        save: Gets the result after each work.

    Returns:
        The result, with "errors" by name.
    """
    chosen, result = works.chosen(setup.works, only), {"machine": machine(setup.device)}
    result |= {"unavailable": setup.unavailable, "works": {}, "skipped": {}, "errors": {}}
    errors = result["errors"]
    guarded("host overhead", errors, lambda: result.update(host=host_overhead(setup)))
    if isinstance(setup.timer, CudaTimer):
        guarded(
            "a large copy", errors, lambda: result.update(large_copy_gb_per_s=large_copy(setup.timer, setup.device))
        )
    save(result)
    for work in progress(chosen):
        guarded(str(work), errors, partial(_measure, work, setup, rounds, slow_peers, result))
        save(result)
    guarded("works compared", errors, lambda: _compare_works(result))
    save(result)
    return result


def _measure(work: OpWork, setup: DeviceSetup, rounds: int, slow_peers: bool, result: dict) -> None:
    size = work.bytes_moved()
    count = setup.timer.sets(size)
    if reason := setup.timer.why_no_room(
        ((1 + len(setup.copies)) * count + 8) * size
    ):  # 8: temporaries of the reference
        result["skipped"][str(work)] = reason
        return
    generator = torch.Generator(setup.device).manual_seed(0)  # a failed capture breaks the default generator
    sets = [work.make_set(setup.device, generator) for _ in range(count)]
    samples = _samples(work, setup, sets, result["errors"])
    ours = tuple(name for name in setup.ours if name in samples)
    if not ours:
        raise RuntimeError("none of our backends computes it")
    slow = {name: samples.pop(name) for name in setup.slow if name in samples}
    times = setup.timer.times(samples, rounds)

    def makes(name: str) -> int:
        return 0 if name in setup.copies else work.tokens

    rows = {name: _row(samples[name], t, times[ours[0]], makes(name)) for name, t in times.items()}
    for name, sample in slow.items():
        if not slow_peers and name not in work.bars:
            continue
        pair = setup.timer.times({name: sample, ours[0]: samples[ours[0]]}, _SLOW_ROUNDS)
        rows[name] = _row(sample, pair[name], pair[ours[0]], makes(name))
    contested = [name for name in _CONTESTED if name in times]
    best = min(contested, key=lambda name: rows[name]["p50_ms"], default=None)
    fairest = min(setup.copies.keys() & times.keys(), key=lambda name: rows[name]["p50_ms"], default=None)
    result["works"][str(work)] = {
        "bytes": size,
        "tokens": work.tokens,
        "gb_per_s": size / rows[ours[0]]["p50_ms"] / 1e6,
        "providers": rows,
        "best_peer": best,
        "fairest_copy": fairest,
        "bars": (bars := _bars(work, setup, ours, times, best, fairest)),
    }
    if _REFERENCE in rows and _REFERENCE in work.bars:
        bars[_REFERENCE] = _bar(rows[_REFERENCE]["ratio"], *work.bars[_REFERENCE])
    for backend in ours if not work.backward else ():
        measure_memory = partial(_measure_memory, work, setup, backend, sets[0][0], bars)
        guarded(f"{work}: memory of {backend}", result["errors"], measure_memory)


def _samples(work: OpWork, setup: DeviceSetup, sets: _Sets, errors: dict[str, str]) -> dict[str, Sample]:
    """Samples of every provider that computes the right values."""
    runs = {name: partial(_fill, fill, sets) for name, fill in peers(work, setup.device, setup.compile_mode).items()}
    reference = (_REFERENCE,) if _REFERENCE in setup.slow and (work.peers == "all" or _REFERENCE in work.bars) else ()
    for name in (*reference, *setup.ours):
        runs[name] = run_backward(work, sets, name) if work.backward else partial(run_forward, work, sets, name)
    samples: dict[str, Sample] = {}
    expected = work.expected(*sets[0])

    def prepare(name: str, run: Run) -> None:
        if name not in setup.copies:
            check(name, run, expected, work)
        # The reference copies from the host, which cannot be captured.
        samples[name] = setup.timer.prepare(run, len(sets), capture=name != _REFERENCE)

    def prepare_copy(name: str, copy: Copy) -> None:
        prepare(name, copy(work.bytes_moved(), len(sets), setup.device))

    for name, run in runs.items():
        guarded(f"{work}: {name}", errors, partial(prepare, name, run))
    for name, copy in setup.copies.items():
        guarded(f"{work}: {name}", errors, partial(prepare_copy, name, copy))
    return samples


def _fill(fill: Callable[[Tensor, Tensor], None], sets: _Sets, number: int) -> Tensor:
    fill(*sets[number])
    return sets[number][1]


def run_forward(work: OpWork, sets: _Sets, backend: str, number: int) -> Tensor:
    features, out = sets[number]
    slowfast_aggregate(features, work.layout, out=out, backend=backend, frame_offsets=work.frame_offsets)
    return out


def run_backward(work: OpWork, sets: _Sets, backend: str) -> Run:
    gradients = [torch.empty_like(features, memory_format=torch.contiguous_format) for features, _ in sets]

    def run(number: int) -> Tensor:
        features, grad = sets[number]
        backends.BACKENDS[backend].run_backward(grad, features, work.plan, gradients[number])
        return gradients[number]

    return run


def check(name: str, run: Run, expected: Tensor, work: OpWork, exact: bool = False) -> None:
    """Check a provider's values against the reference's.

    Args:
        name: Of the provider. Our backends must be bit-identical; peers may differ by rounding.
        run: The provider's call.
        expected: The reference's values.
        work: What is computed.
        exact: Peers must be bit-identical, too.

    Raises:
        AssertionError: The values differ.
    """
    run(0).fill_(math.nan)  # values that another provider wrote must not count
    got = run(0)
    right = torch.equal(got, expected)
    if not right and not exact and name not in backends.BACKENDS:
        near = 4 * torch.finfo(work.dtype).eps
        right = torch.allclose(got.float(), expected.float(), rtol=near, atol=near)
    if not right:
        raise AssertionError("computes other values than the reference")


def _row(sample: Sample, times: list[float], ours: list[float], tokens: int) -> dict:
    row = summary(times, tokens) | {"ratio": median_ratio(times, ours)}
    return row if sample.graph is None else row | {"graph": sample.graph}


def _bars(
    work: OpWork,
    setup: DeviceSetup,
    ours: tuple[str, ...],
    times: dict[str, list[float]],
    best: str | None,
    fairest: str | None,
) -> dict[str, dict]:
    copy = {FAIREST: fairest} if isinstance(setup.timer, CudaTimer) else {COPY: COPY}
    against = copy | {BEST_PEER: best, PLAIN: PLAIN}
    return {
        _bar_name(backend, what): _bar(median_ratio(times[name], times[backend]), *work.bars.get(what, ()))
        for backend in ours
        for what, name in against.items()
        if name in times
    }


def _measure_memory(work: OpWork, setup: DeviceSetup, backend: str, features: Tensor, bars: dict[str, dict]) -> None:
    """Add the ratio of the tokens' bytes to all bytes that a call allocates: 1 if it allocates only the tokens."""
    size = work.tokens * work.channels * work.dtype.itemsize
    call = partial(slowfast_aggregate, features, work.layout, backend=backend, frame_offsets=work.frame_offsets)
    if growth := setup.timer.memory_growth(call):
        bars[_bar_name(backend, "memory")] = _bar(size / growth, 0.99)


def _bar(ratio: float, bar: float | None = None, stretch: float | None = None) -> dict:
    return {"bar": bar, "ratio": ratio} | ({"stretch": stretch} if stretch else {})


def _bar_name(backend: str, against: str) -> str:
    return against if backend == "cpu" else f"{backend}: {against}"


def host_overhead(setup: DeviceSetup) -> dict:
    """Host time of an asynchronous call on tiny features, and of torch's copy_ for comparison."""
    layout = SlowFastLayout(1, fast_grid=(2, 2))
    features, out = torch.ones(2, 16, 8, device=setup.device), torch.zeros(16, 8, device=setup.device)
    source = torch.ones_like(out)
    runs = {name: partial(slowfast_aggregate, features, layout, out=out, backend=name) for name in setup.ours}
    runs[COPY] = partial(out.copy_, source)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(_HOST_ROUNDS + 2):
        for name, call in runs.items():
            setup.timer.synchronize()
            start = time.perf_counter()
            for _ in range(_HOST_CALLS):
                call()
            if round_ >= 2:
                times[name].append((time.perf_counter() - start) / _HOST_CALLS)
    rows = paired_rows(times, setup.ours[0])
    ratios = {name: _HOST_BAR_US / rows[name]["p50_ms"] / 1e3 for name in setup.ours}
    bar = (
        (None,) if setup.device == "cpu" else (1, _HOST_BAR_US / _HOST_STRETCH_US)
    )  # on a CPU the kernel's time is included
    bars = {_bar_name(name, f"{_HOST_BAR_US} us"): _bar(ratio, *bar) for name, ratio in ratios.items()}
    return {"providers": rows, "best_peer": None, "bars": bars}


def _compare_works(result: dict) -> None:
    """Add the figures that depend on several works: many videos against one, and the growth over T."""
    measured = result["works"]
    many, one = (measured.get(str(work), {}).get("bars", {}) for work in (works.VIDEOS, works.ONE_VIDEO))
    for name in [name for name in many if name in one and name.endswith(FAIREST)]:
        ratio = many[name]["ratio"] / one[name]["ratio"]
        many[name.replace(FAIREST, "one video")] = _bar(ratio, works.ONE_VIDEO_BAR)
    sweep = [measured[str(work)] for work in works.SWEEP if str(work) in measured]
    if len(sweep) > 1:
        sizes, times = zip(*[(math.log(row["bytes"]), math.log(row["bytes"] / row["gb_per_s"])) for row in sweep])
        result["sweep"] = {"time grows as bytes to the power of": statistics.linear_regression(sizes, times).slope}

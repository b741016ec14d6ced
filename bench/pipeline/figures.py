"""The figures of a run as the JSON has them: times, costs, rates and targets."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace

from ..harness.ceilings import Ceilings
from ..harness.timers import median_ratio, summary
from . import costs
from .costs import Cost, Job

OURS, PLAIN = "ours", "plain"
COMPILED = "torch.compile"  # of the plain aggregation alone
# Our pipeline decodes and preprocesses in the background; "wait" is the time that the tower waited for pixels.
STAGES = ("preprocess", "vision", "projector", "aggregate", "prefill", "generate")
TO_FIRST_TOKEN = ("decode", "wait", *STAGES[:-1])
FROM_FRAMES, WITH_DECODING = "first token, from decoded frames", "first token, decoding included"
SECOND, STEP = "second question's first token", "decode step"


@dataclass(frozen=True)
class Bars:
    """Targets; None for no target. Ratios are plain's time over ours."""

    from_frames: float | None = None
    with_decoding: float | None = None
    first_token_ms: float | None = None
    second_share: float | None = None  # of the first question's time
    five_questions: float | None = None  # to the first token of each, over the prefill of one
    step_over_floor: float | None = None  # the floor: weights and cache over the copy's bandwidth
    extra_gb: float | None = None  # peak memory beyond the weights
    first_token_hoped_ms: float | None = None


# By device (its folder in bench/results; "cpu" for any CPU) and model, for the default clip, frames and layout.
BARS = {
    ("cpu", "embedded"): Bars(from_frames=2.5, with_decoding=1.6),
    ("cpu", "small"): Bars(five_questions=1.4),
    ("nvidia-h200", "7b"): Bars(
        # costs.py counts 70.4 TFLOP to the first token, 92 ms at a large product's 770 TFLOP/s. The target is 1.5 times
        # that, the hope 1.25 times.
        first_token_ms=138,
        first_token_hoped_ms=115,
        second_share=0.1,
        five_questions=1.4,
        step_over_floor=1.4,
        extra_gb=4,
    ),
}


@dataclass
class Times:
    """Seconds of each round, by pipeline and stage; equal positions are the same round."""

    stages: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add_stages(self, who: str, seconds: dict[str, float]) -> None:
        for stage, value in seconds.items():
            self.stages.setdefault(who, {}).setdefault(stage, []).append(value)

    def add_first(self, who: str, what: str, seconds: float) -> None:
        self.first.setdefault(who, {}).setdefault(what, []).append(seconds)


def figures(
    job: Job, steps: dict[str, int], times: Times, ceilings: Ceilings, memory: dict[str, dict], bars: Bars
) -> dict:
    """The measured part of a result.

    Args:
        job: The answer's shapes.
        steps: By pipeline, the tokens of the timed answer after the first.
        times: Of all rounds.
        ceilings: The device's limits.
        memory: As `PipelinePair.memory` gives it.
        bars: Targets.
    """
    counted = {
        OURS: costs.ours(replace(job, new_tokens=steps[OURS] + 1)),
        PLAIN: costs.plain(replace(job, new_tokens=steps[PLAIN] + 1)),
    }
    gemm, copy = statistics.median(ceilings.gemm), statistics.median(ceilings.copy)
    video_tokens = job.plan.offsets[-1]
    tokens = {"aggregate": video_tokens, "prefill": job.tokens}
    works = {stage: _work(stage, times.stages, counted, tokens.get(stage, 0)) for stage in ("decode", "wait", *STAGES)}
    works |= {name: _work(name, times.first, {}, video_tokens) for name in (FROM_FRAMES, WITH_DECODING)}
    works[SECOND] = _work(SECOND, times.first, {})
    if steps[OURS] and steps[PLAIN]:
        works[STEP] = _step(steps, times, counted, copy)
    second, prefill = _ours_ms(works[SECOND]), _ours_ms(works["prefill"])
    works[SECOND] |= {"share": second / _ours_ms(works[FROM_FRAMES]), "five_over_one": 1 + 4 * second / prefill}
    set_bars(works, bars, memory)
    measured = {"gemm_flop_per_s": gemm, "copy_bytes_per_s": copy}
    return {"ceilings": measured, "works": works, "rates": _rates(works), "memory": memory}


def _step(steps: dict[str, int], times: Times, counted: dict[str, dict[str, Cost]], copy: float) -> dict:
    """The mean decode step of each answer; its floor is the bytes moved over the copy's bandwidth."""
    seconds = {who: {STEP: [t / count for t in times.stages[who]["generate"]]} for who, count in steps.items()}
    totals = {who: counted[who]["generate"] for who in steps}
    mean = {who: {STEP: Cost(total.flop // steps[who], total.bytes // steps[who])} for who, total in totals.items()}
    work, floor_ms = _work(STEP, seconds, mean, tokens=1), mean[OURS][STEP].bytes / copy * 1e3
    return work | {"floor_ms": floor_ms, "over_floor": _ours_ms(work) / floor_ms}


def _rates(works: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Tokens per second by pipeline, from the medians."""
    names = {
        "visual tokens/s of the aggregator": "aggregate",
        "prefill tokens/s": "prefill",
        "decode tokens/s": STEP,
    }
    return {
        name: {who: row["tokens_per_s"] for who, row in works[work]["providers"].items()}
        for name, work in names.items()
        if work in works
    }


def _ours_ms(work: dict) -> float:
    return work["providers"][OURS]["p50_ms"]


def _work(
    name: str, seconds: dict[str, dict[str, list[float]]], counted: dict[str, dict[str, Cost]], tokens: int = 0
) -> dict:
    """Times by pipeline with their FLOP, bytes and tokens per second, and the ratios of paired rounds."""
    found = {who: by_name[name] for who, by_name in seconds.items() if name in by_name}
    providers = {who: summary(times, tokens) for who, times in found.items()}
    for who, row in providers.items():
        if cost := counted.get(who, {}).get(name):
            row |= asdict(cost)
    peers = [who for who in found if who != OURS]
    bars = {f"{OURS}: {who}": _bar(median_ratio(found[who], found[OURS])) for who in peers}
    return {"providers": providers, "best_peer": None, "bars": bars}


def _bar(ratio: float, bar: float | None = None) -> dict:
    return {"bar": bar, "ratio": ratio}


def set_bars(works: dict[str, dict], bars: Bars, memory: dict[str, dict]) -> None:
    """Add the targets; an upper limit becomes the ratio limit / measured with target 1."""
    against = f"{OURS}: {PLAIN}"
    works[FROM_FRAMES]["bars"][against]["bar"] = bars.from_frames
    works[WITH_DECODING]["bars"][against]["bar"] = bars.with_decoding
    weights, peak = ((memory[OURS][name] or 0) / 1e9 for name in ("weights_bytes", "peak_bytes"))
    limits = (
        (FROM_FRAMES, "{} ms", bars.first_token_ms, 0, _ours_ms(works[FROM_FRAMES])),
        (FROM_FRAMES, "weights + {} GB", bars.extra_gb, weights, peak),
        (SECOND, "{} of the first", bars.second_share, 0, works[SECOND]["share"]),
        (SECOND, "{} prefills for five questions", bars.five_questions, 0, works[SECOND]["five_over_one"]),
        (STEP, "{} times its floor", bars.step_over_floor, 0, works.get(STEP, {}).get("over_floor")),
    )
    for work, name, limit, more, measured in limits:
        if limit and measured:
            works[work]["bars"][f"{OURS}: {name.format(f'{limit:g}')}"] = _bar((limit + more) / measured, 1)
    if bars.first_token_ms and bars.first_token_hoped_ms:
        first = works[FROM_FRAMES]["bars"][f"{OURS}: {bars.first_token_ms:g} ms"]
        first["stretch"] = bars.first_token_ms / bars.first_token_hoped_ms

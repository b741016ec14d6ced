"""Tunings of the tile kernels: the bits of every variant are checked, then its time is compared with copies.

`make gpu-pick` writes the best of each kind into the sources.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from torch import Tensor

from sfllava_fast.ops.backends import registry
from sfllava_fast.ops.backends.plan_table import device_table, plan_table

from ..harness.progress import progress
from ..harness.record import BUILT, ROOT, ResultError, guarded, machine
from ..harness.tables import make_table, show_machine, show_notes
from ..harness.timers import Run, Sample, median_ratio, summary
from ..op import works
from ..op.run import DeviceSetup, check, run_backward, run_forward
from ..op.works import OpWork
from .copies import Copy, c_function, large_copy, raise_reason

FORWARD, BACKWARD = "forward", "backward"
CUDA_FILE, TRITON_FILE = ROOT / "csrc/cuda/tuning.h", ROOT / "kernels/triton/tuning.py"


@dataclass(frozen=True)
class Tuning:
    """The tuning of a kernel, as in csrc/cuda/tuning.h."""

    warps: int
    blocks: int
    load: str
    store: str
    slow_first: bool
    by_strip: bool

    @classmethod
    def parse(cls, text: str) -> Tuning:
        """A tuning from C++, such as {4, 0, kLoad, kStore, false, false}."""
        words = re.findall(r"\w+", text)
        return cls(*({"true": True, "false": False}.get(word, int(word) if word.isdigit() else word) for word in words))

    def __str__(self) -> str:
        values = (str(value).lower() if isinstance(value, bool) else str(value) for value in asdict(self).values())
        return f"{{{', '.join(values)}}}"


# Values of one axis at a time, then promising combinations.
_VALUES = {
    "warps": (1, 2, 4, 8),
    "load": ("kLoad", "kLoadNoAllocate", "kLoadStreaming"),
    "store": ("kStore", "kStoreStreaming"),
    "slow_first": (False, True),
}
# More blocks leave too few registers and spill.
_VALUES_OF = {FORWARD: _VALUES, BACKWARD: _VALUES | {"blocks": (4, 5), "by_strip": (False, True)}}
_STREAMING = {"load": "kLoadNoAllocate", "store": "kStoreStreaming"}
_TOGETHER = {
    FORWARD: (_STREAMING, _STREAMING | {"slow_first": True}, {"warps": 2, "slow_first": True}),
    BACKWARD: (
        _STREAMING | {"slow_first": True},
        _STREAMING | {"by_strip": True},
        {"slow_first": True, "by_strip": True},
        {"warps": 2, "by_strip": True},
    ),
}
_TRITON_WARPS, _TRITON_VECTORS = (1, 2, 4), (1, 2)


@dataclass(frozen=True)
class Variant:
    """The CUDA kernel of a direction with one tuning, a library of its own."""

    direction: str
    tuning: Tuning

    @property
    def definitions(self) -> list[str]:
        tuning = str(self.tuning).replace(" ", "").replace(",", r"\,")  # nvcc splits definitions at commas
        return [f"-DVARIANT_DIRECTION=k{self.direction.capitalize()}", f"-DSFLLAVA_TUNING={tuning}"]

    @property
    def library(self) -> Path:
        return BUILT / "bench" / f"{self.direction}-{'-'.join(re.findall(r'[A-Za-z0-9]+', str(self.tuning)))}.so"

    @property
    def built(self) -> bool:
        return self.library.exists()

    @cached_property
    def _call(self) -> Callable[..., bytes | None]:
        sizes = ["pointer", "int64", "int64", "pointer", "pointer", "int64", "int64"]
        return c_function(self.library, "sfllava_variant", ["pointer", "pointer", *sizes, "pointer"])

    def run(self, work: OpWork, features: Tensor, tokens: Tensor, gradient: Tensor | None) -> None:
        """Fill `tokens`, or in a backward fill `gradient` from the tokens' gradient `tokens`."""
        plan = work.plan
        grad, out = (None, tokens) if gradient is None else (tokens.data_ptr(), gradient)
        strides = features.stride(0), features.stride(1)
        tables = plan_table(plan).data_ptr(), device_table(plan, features.device).data_ptr()
        stream = torch.cuda.current_stream().cuda_stream  # the current one: a capture uses its own
        raise_reason(
            self._call(
                *tables,
                features.data_ptr(),
                *strides,
                grad,
                out.data_ptr(),
                tokens.stride(0),
                features.shape[2],
                stream,
            )
        )


def defaults() -> dict[str, Tuning]:
    """The default tunings of both directions, from the sources."""
    found = re.findall(r"constexpr Tuning k(Forward|Backward)Tuning(\{.*\});", CUDA_FILE.read_text())
    return {direction.lower(): Tuning.parse(text) for direction, text in found}


def variants() -> list[Variant]:
    """All variants, the default of each direction first."""
    return [Variant(direction, tuning) for direction, base in defaults().items() for tuning in _around(direction, base)]


def _around(direction: str, base: Tuning) -> list[Tuning]:
    changes = [{name: value} for name, values in _VALUES_OF[direction].items() for value in values]
    return list(dict.fromkeys([base, *(changed(base, change) for change in (*changes, *_TOGETHER[direction]))]))


def changed(base: Tuning, change: dict[str, object]) -> Tuning:
    """A changed tuning; with fewer warps there are more blocks, so that a lane keeps its registers."""
    blocks = base.blocks * base.warps // change.get("warps", base.warps)
    return replace(base, **{"blocks": blocks} | change)


# --- the sweep


def run(setup: DeviceSetup, rounds: int, only: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Time every tuning on works.MAIN; `save` gets the result after each work."""
    result = {"kind": "tune", "machine": machine(setup.device), "unavailable": setup.unavailable}
    result |= {"works": {}, "skipped": {}, "errors": {}}
    errors = result["errors"]
    guarded("a large copy", errors, lambda: result.update(large_copy_gb_per_s=large_copy(setup.timer, setup.device)))
    for work in progress(works.chosen(works.MAIN, only)):
        guarded(str(work), errors, lambda work=work: result["works"].update({str(work): _measure(work, setup, rounds)}))
        save(result)
    result["best"] = {direction: best_over(result["works"], direction) for direction in (FORWARD, BACKWARD)}
    save(result)
    return result


def _measure(work: OpWork, setup: DeviceSetup, rounds: int) -> dict:
    size, wrong = work.bytes_moved(), {}
    count = setup.timer.sets(size)
    if reason := setup.timer.why_no_room(((2 + len(setup.copies)) * count + 8) * size):
        raise RuntimeError(reason)
    generator = torch.Generator(setup.device).manual_seed(0)
    sets = [work.make_set(setup.device, generator) for _ in range(count)]
    expected, samples = work.expected(*sets[0]), {}

    def prepare(name: str, contender: Run) -> None:
        check(name, contender, expected, work, exact=True)
        samples[name] = setup.timer.prepare(contender, count)

    contenders = cuda_runs(work, sets)
    if "triton" in setup.ours:
        contenders |= triton_runs(work, sets)
    for name, contender in contenders.items():
        guarded(name, wrong, partial(prepare, name, contender))
    copies: dict[str, Sample] = {}

    def prepare_copy(name: str, copy: Copy) -> None:
        copies[name] = setup.timer.prepare(copy(size, count, setup.device), count)

    for name, copy in setup.copies.items():
        guarded(name, wrong, partial(prepare_copy, name, copy))
    samples |= copies
    times = setup.timer.times(samples, rounds)
    rows = {name: _row(name, times, size, copies) | {"graph": sample.graph} for name, sample in samples.items()}
    best = {kind: _fastest(rows, kind) for kind in ("cuda", "triton")}
    return {"bytes": size, "providers": rows, "wrong": wrong, "best": best, "best_peer": None, "bars": {}}


def _row(name: str, times: dict[str, list[float]], size: int, copies: Sequence[str]) -> dict:
    row = summary(times[name])
    shares = {copy: median_ratio(times[copy], times[name]) for copy in copies}
    return row | {"tb_per_s": size / row["p50_ms"] / 1e9, "of": shares}


def cuda_runs(work: OpWork, sets: list[tuple[Tensor, Tensor]]) -> dict[str, Run]:
    """The calls of the built variants, named "cuda {...}"."""
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) if work.backward else None for x, _ in sets]

    def run(variant: Variant, number: int) -> Tensor:
        features, tokens = sets[number]
        variant.run(work, features, tokens, gradients[number])
        return tokens if gradients[number] is None else gradients[number]

    ready = [v for v in variants() if v.direction == direction_of(work) and v.built]
    return {f"cuda {variant.tuning}": partial(run, variant) for variant in ready}


def triton_runs(work: OpWork, sets: list[tuple[Tensor, Tensor]]) -> dict[str, Run]:
    """The calls of Triton's tunings, named "triton Tuning(...)"."""
    untuned = run_backward(work, sets, "triton") if work.backward else partial(run_forward, work, sets, "triton")
    direction, kind = direction_of(work), _triton_module().Tuning

    def run(tuning: object, number: int) -> Tensor:
        with _triton_tuning(direction, tuning):
            return untuned(number)

    tunings = [kind(warps=warps, vectors=vectors) for warps in _TRITON_WARPS for vectors in _TRITON_VECTORS]
    return {f"triton {tuning}": partial(run, tuning) for tuning in tunings}


def _triton_module() -> ModuleType:
    return import_module(".tuning", registry.triton_kernels().__name__)


@contextmanager
def _triton_tuning(direction: str, tuning: object) -> Iterator[None]:
    table = _triton_module().TUNING
    before, table[direction] = table[direction], tuning
    try:
        yield
    finally:
        table[direction] = before


def direction_of(work: OpWork) -> str:
    return BACKWARD if work.backward else FORWARD


def _fastest(rows: dict[str, dict], kind: str) -> str | None:
    return min((name for name in rows if name.startswith(f"{kind} ")), key=lambda n: rows[n]["p50_ms"], default=None)


def best_over(measured: dict[str, dict], direction: str) -> dict[str, str]:
    """By kind, the tuning with the least geometric mean of times over all works of a direction."""
    rows = [measured[str(work)]["providers"] for work in works.MAIN
            if direction_of(work) == direction and str(work) in measured]  # fmt: skip
    common = set.intersection(*map(set, rows)) if rows else set()
    logs = {name: {"p50_ms": math.fsum(math.log(row[name]["p50_ms"]) for row in rows)} for name in sorted(common)}
    found = {kind: _fastest(logs, kind) for kind in ("cuda", "triton")}
    return {kind: name for kind, name in found.items() if name}


def show(result: dict, console: Console) -> None:
    show_machine(result, console)
    large = result.get("large_copy_gb_per_s")
    if large:
        console.print(f"copy_ of gigabytes: {large / 1e3:.2f} TB/s")
    for work, figures in result["works"].items():
        copies = list(next(iter(figures["providers"].values()))["of"])
        columns = ("tuning", "us", "TB/s", *(f"% of {copy}" for copy in copies), "% of the large copy")
        table = make_table(f"{work}: {figures['bytes'] / 1e6:.0f} MB", columns)
        for name, row in sorted(figures["providers"].items(), key=lambda item: item[1]["p50_ms"]):
            shares = (f"{share:.1%}" for share in row["of"].values())
            of_large = f"{row['tb_per_s'] * 1e3 / large:.1%}" if large else ""
            table.add_row(name, f"{row['p50_ms'] * 1e3:.2f}", f"{row['tb_per_s']:.2f}", *shares, of_large)
        console.print(table)
        for name, reason in figures["wrong"].items():
            console.print(f"left out: {name}: {reason}")
    for direction, found in result["best"].items():
        for name in found.values():
            console.print(f"best {direction} over its works: {name}")
    show_notes(result, console)


# --- the choice


def pick(result: Path, cuda: Path = CUDA_FILE, triton: Path = TRITON_FILE) -> list[str]:
    """Write the best tunings of a result into the sources.

    Args:
        result: A result of `bench tune`.
        cuda, triton: The sources.

    Returns:
        What was written, one line per kind and direction.

    Raises:
        ResultError: The file has no best tuning.
    """
    try:
        best = json.loads(result.read_text())["best"]
        chosen = [(direction, *name.split(" ", 1)) for direction, found in best.items() for name in found.values()]
    except OSError as error:
        raise ResultError(f"{result} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{result} is not a result of python -m bench tune") from error
    if not chosen:
        raise ResultError(f"{result} has no best tuning: the sweep did not finish")
    texts = {path: path.read_text() for path in (cuda, triton)}
    for direction, kind, tuning in chosen:
        if kind == "cuda":
            line = rf"(constexpr Tuning k{direction.capitalize()}Tuning)\{{.*?\}}"
            texts[cuda] = _replaced(cuda, texts, line, tuning)
        else:
            texts[triton] = _replaced(triton, texts, rf'("{direction}": )Tuning\(.*?\)', tuning)
    for path, text in texts.items():
        path.write_text(text)
    return [f"{direction}, {kind}: {tuning}" for direction, kind, tuning in chosen]


def _replaced(path: Path, texts: dict[Path, str], pattern: str, tuning: str) -> str:
    text, count = re.subn(pattern, lambda match: match[1] + tuning, texts[path])
    if count != 1:
        raise ResultError(f"{path} has {count} lines for this tuning, not one")
    return text

"""Cost of a prefill with fewer vision tokens in the language model, and of the kernels that choose and move rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..harness import pairs
from ..harness.record import ResultError, device_name
from ..harness.tables import make_table, show_bars, show_machine, show_notes
from . import row_kernels
from .first_logits import FirstLogits
from .mixture_prefill import BARS, MID_SIZE, PLAIN, RATIO, RATIOS, SWEPT, Mixed, MixturePrefill, shares
from .row_kernels import OURS, TORCH

# float32 on a CPU: many emulate 16-bit products.
PREFILLS = {
    "cpu": MixturePrefill("mid-size", MID_SIZE, torch.float32),
    "cuda": MixturePrefill("7b", "7b", torch.bfloat16),
}
QUESTIONS = {"cpu": FirstLogits("small", torch.float32), "cuda": FirstLogits("7b", torch.bfloat16)}


def run(device: str, rounds: int, only: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Measure every work chosen by `only`; `save` gets the result after each."""
    works = PREFILLS[device], QUESTIONS[device], *row_kernels.WORKS
    return pairs.run("reduction", works, lambda work, *how: work.measure(*how), device, rounds, only, save)


def show(result: dict, console: Console) -> None:
    show_machine(result, console)
    for name, work in result["works"].items():
        if name.startswith("prefill"):
            console.print(_prefills(name, work), _parts(work), sep="\n")
        elif name.startswith("question"):
            console.print(_questions(name, work))
    if kernels := {name: work for name, work in result["works"].items() if work["best_peer"] == TORCH}:
        console.print(_kernels(kernels))
    show_bars(result["works"], console)
    show_notes(result, console)


def _prefills(name: str, work: dict) -> Table:
    columns = ("scorer, r", "p50 ms", "cache MB", "peak MB", "time", "FLOP", "cache", "peak memory")
    table = make_table(f"{name}, {work['tokens']} tokens; shares of the plain model's", columns)
    for contender, row in work["providers"].items():
        held = (f"{row[key] / 1e6:.1f}" for key in ("cache_bytes", "peak_bytes"))
        of_plain = (f"{share:.3f}" for share in shares(work["providers"], contender).values())
        table.add_row(contender, f"{row['p50_ms']:.4g}", *held, *of_plain)
    return table


def _questions(name: str, work: dict) -> Table:
    title = f"{name}, {work['tokens']} tokens: video prefilled and first logits"
    table = make_table(title, ("reduction", "p50 ms", "of plain's", "cache MB", "of plain's"))
    whole = work["providers"][PLAIN]["cache_bytes"]
    for reduction, row in work["providers"].items():
        held = row["cache_bytes"]
        cells = f"{row['p50_ms']:.4g}", f"{row['ratio']:.3f}", f"{held / 1e6:.2f}", f"{held / whole:.4f}"
        table.add_row(reduction, *cells)
    return table


def _parts(work: dict) -> Table:
    """Time by part of the plain model and of the mixed one that the bars are about, beside the FLOP."""
    plain, mixed = (work["providers"][name] for name in (PLAIN, str(Mixed(SWEPT, RATIO))))
    columns = ("part", "plain ms", "mixed ms", "mixed / plain", "FLOP, mixed / plain")
    table = make_table("time by part, profiled once", columns)
    for part, spent in plain["parts_ms"].items():
        flop = f"{mixed['flop'][part] / plain['flop'][part]:.3f}" if part in plain["flop"] else ""
        less = mixed["parts_ms"][part]
        table.add_row(part, f"{spent:.4g}", f"{less:.4g}", f"{less / spent:.3f}" if spent else "", flop)
    return table


def _kernels(works: dict[str, dict]) -> Table:
    table = make_table("kernels, 3680 tokens of 4096", ("kernel", "torch ms", "ours ms", "torch / ours"))
    for name, work in works.items():
        ours, torch_ = (work["providers"][form] for form in (OURS, TORCH))
        table.add_row(name, f"{torch_['p50_ms']:.4g}", f"{ours['p50_ms']:.4g}", f"{torch_['ratio']:.2f}")
    return table


def plot(result: dict, path: Path) -> None:
    """Write a picture of a prefill's time, FLOP, cache and peak memory against the share of tokens kept.

    Raises:
        ResultError: The result has no prefill.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    name = next((name for name in result["works"] if name.startswith("prefill")), None)
    if name is None:
        raise ResultError("no prefill is in this result: run bench reduction without --only")
    work, swept = result["works"][name], [str(Mixed(SWEPT, ratio)) for ratio in RATIOS]
    rows, figure = work["providers"], Figure(figsize=(10, 3.6), layout="constrained")
    of_plain, megabytes = figure.subplots(1, 2)
    for what, style in {"time": "o-", "FLOP": "s--", "cache": "^:"}.items():
        [line] = of_plain.plot(RATIOS, [shares(rows, contender)[what] for contender in swept], style, label=what)
        if (limit := BARS["cuda" if "gpu" in result["machine"] else "cpu"].get(what)) is not None:
            of_plain.plot(RATIO, limit, "_", ms=22, mew=2, color=line.get_color(), label=f"target for {what}")
    of_plain.set(ylabel="of the plain model's prefill", ylim=(0, None))
    for key, label in {"peak_bytes": "tensors at the peak of a prefill", "cache_bytes": "key/value cache"}.items():
        megabytes.plot(RATIOS, [rows[contender][key] / 1e6 for contender in swept], "o-", label=label)
    megabytes.set(ylabel="MB", ylim=(0, None))
    for axes in (of_plain, megabytes):
        axes.set(xlabel="r, share of vision tokens kept in every other layer")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{name}, {work['tokens']} tokens, scorer {SWEPT}: {device_name(result)}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)

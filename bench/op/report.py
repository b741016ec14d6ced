"""A result of `bench op` as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..gpu.copies import KERNEL
from ..harness.tables import make_table, show_machine, show_notes, token_rate, verdict
from .run import BEST_PEER, COPY, FAIREST

_OURS = ("cpu", "cuda", "triton")


def show(result: dict, console: Console) -> None:
    """Prints a table for each work, then what every ratio with a target came to."""
    show_machine(result, console, "; medians, caches cold")
    for work, figures in result["works"].items():
        console.print(_table(work, figures, result.get("large_copy_gb_per_s")))
        for name, bar in figures["bars"].items():
            if bar["bar"] is not None:
                name = name.replace(BEST_PEER, str(figures["best_peer"]))
                name = name.replace(FAIREST, f"{FAIREST}, {figures.get('fairest_copy')}")
                console.print("  " + verdict(name, bar))
    for name, row in result.get("host", {"providers": {}})["providers"].items():
        console.print(f"host time of a call, {name}: {row['p50_ms'] * 1e3:.1f} us")
    for name, figure in result.get("sweep", {}).items():
        console.print(f"T = 8 ... 4096: {name} {figure:.3f}")
    show_notes(result, console)


def _table(work: str, figures: dict, large_copy: float | None) -> Table:
    """large_copy: GB/s of a copy of gigabytes."""
    rows = figures["providers"]
    copies = [name for name in (COPY, KERNEL) if name in rows]
    columns = ["provider", "p20 ms", "p50 ms", "p80 ms", "GB/s", "tokens/s", *(f"% of {copy}" for copy in copies)]
    if large_copy:
        columns.append("% of a large copy")
    title = f"{work}: {figures['bytes'] / 1e6:.0f} MB, {figures['gb_per_s']:.1f} GB/s"
    table = make_table(title, [*columns, "time / ours"])
    for name, row in rows.items():
        rate = figures["bytes"] / row["p50_ms"] / 1e6
        cells = [f"{row[key]:.4g}" for key in ("p20_ms", "p50_ms", "p80_ms")]
        cells += [f"{rate:.1f}", token_rate(row)]
        cells += [f"{rows[copy]['ratio'] / row['ratio']:.0%}" for copy in copies]
        if large_copy:
            cells.append(f"{rate / large_copy:.0%}")
        table.add_row(_label(name, row), *cells, f"{row['ratio']:.2f}")
    return table


def _label(name: str, row: dict) -> str:
    label = f"ours ({name})" if name in _OURS else name
    return label if row.get("graph", True) else f"{label} (no graph)"

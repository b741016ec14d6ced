"""What every benchmark prints: the machine, tables, tokens per second, targets reached or missed, errors."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .record import device_name


def make_console() -> Console:
    """A console as wide as the widest table, so that logs and terminals get the same lines."""
    return Console(width=165, highlight=False, markup=False)


def make_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def show_machine(result: dict, console: Console, more: str = "") -> None:
    """Prints the device, torch, the number of threads and the commit."""
    facts = result["machine"]
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    console.print(f"{device_name(result)}, torch {facts['torch']}{threads}, commit {facts['commit']}{more}")


def show_notes(result: dict, console: Console) -> None:
    """Prints what was unavailable, skipped or failed, with the reason."""
    for kind in ("unavailable", "skipped", "errors"):
        for name, reason in result.get(kind, {}).items():
            console.print(f"{kind.removesuffix('s')}: {name}: {reason}")


def show_bars(works: dict[str, dict], console: Console) -> None:
    """Prints every ratio that has a target."""
    for name, work in works.items():
        for against, bar in work["bars"].items():
            if bar["bar"] is not None:
                console.print(f"  {name}, {verdict(against.removeprefix('ours: '), bar)}")


def verdict(name: str, bar: dict) -> str:
    """A measured ratio and its target in words."""
    word = "reached" if bar["ratio"] >= bar["bar"] else "target missed"
    stretch = f" (hoped for {bar['stretch']:.2f})" if "stretch" in bar else ""
    return f"against {name}: {bar['ratio']:.2f} of {bar['bar']:.2f}{stretch}, {word}"


def pair_columns(peer: str, ours: str) -> tuple[str, ...]:
    """The columns of a work with two forms, which `pair_cells` fills."""
    return ("work", f"{peer} ms", f"{ours} ms", f"{peer} / {ours}", f"{peer} tokens/s", f"{ours} tokens/s")


def pair_cells(figures: dict, peer: str, ours: str) -> list[str]:
    """Milliseconds of both forms, their ratio, and tokens per second of both."""
    forms = [figures["providers"][form] for form in (peer, ours)]
    times = [f"{row['p50_ms']:.4g}" for row in forms]
    return [*times, f"{forms[0]['ratio']:.2f}", *(token_rate(row) for row in forms)]


def token_rate(row: dict) -> str:
    """Tokens per second of a row; empty for a call that makes none, and in results that lack the figure."""
    return f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""

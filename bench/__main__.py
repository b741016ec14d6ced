"""python -m bench op: the aggregator against its peers, as a table and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import op
from .measure import write_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("op", help="the aggregator on the CPU, T=50, 24x24, default layout, one thread")
    option = command.add_argument
    option("--rounds", type=int, default=15, metavar="N", help="paired rounds (default 15)")
    option("--slow-peers", action="store_true", help="also time the plain eager form and the reference")
    option("--json", type=Path, metavar="FILE", help="write the figures here")
    option("--gate", type=float, metavar="MARGIN", help="exit 1 where a ratio misses MARGIN times its bar")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = op.run(args.rounds, args.slow_peers)
    _print(result)
    if args.json:
        write_json(args.json, result)
    return 0 if args.gate is None or _passes(result, args.gate) else 1


def _print(result: dict) -> None:
    console = Console(width=110)
    facts = result["machine"]
    console.print(f"{facts['cpu']}, {result['isa']} kernels, torch {facts['torch']}, {facts['threads']} thread, "
                  f"commit {facts['commit']}; medians, outputs warm, caches cold")
    for work, figures in result["works"].items():
        title = f"{work}: {figures['bytes'] / 1e6:.0f} MB, {figures['gb_per_s']:.1f} GB/s"
        table = Table(title=title, title_justify="left")
        for name in ("provider", "p20 ms", "p50 ms", "p80 ms", "time / ours"):
            table.add_column(name, justify="left" if name == "provider" else "right")
        for name, row in figures["providers"].items():
            table.add_row(name, *(f"{row[key]:.2f}" for key in ("p20_ms", "p50_ms", "p80_ms", "ratio")))
        console.print(table)
        for name, bar in figures["bars"].items():
            word = "reached" if bar["ratio"] >= bar["bar"] else "NOT reached"
            peer = figures["best_peer"] if name == "best peer" else name
            console.print(f"  against {peer}: {bar['ratio']:.2f} of {bar['bar']:.2f}, {word}")


def _passes(result: dict, margin: float) -> bool:
    bars = (bar for figures in result["works"].values() for bar in figures["bars"].values())
    return all(bar["ratio"] >= bar["bar"] * margin for bar in bars)


if __name__ == "__main__":
    raise SystemExit(main())

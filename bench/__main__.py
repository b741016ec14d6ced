"""python -m bench: the aggregator against its peers, the pipeline against the plain one; results compared; pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sfllava_fast.cli.options import add_bench_options
from sfllava_fast.errors import SfllavaError

from .gpu import carried, sanitize, tune
from .gpu import run as gpu
from .gpu.copies import KERNEL
from .harness.compare import compare
from .harness.record import ROOT, ResultError, device_name, passes, read_result, write_json
from .op import run as op
from .op.roofline import plot
from .op.run import BEST_PEER, COPY, FAIREST
from .op.works import PEERS, capped
from .paired import dropins, layouts, projector

_ROUNDS = {"cpu": 15, "cuda": 31}


def main() -> int:
    args = _parser().parse_args()
    try:
        return args.run(args)
    except (ResultError, SfllavaError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("op", help="measure; exit 1 where something failed")
    command.set_defaults(run=_op)
    option = command.add_argument
    option("--device", choices=op.LABS, default="cpu", help="cpu (the default, one thread) or cuda")
    option("--rounds", type=int, metavar="N", help="paired rounds (default 15, on a GPU 31)")
    _add_only(command)
    option("--peers", choices=PEERS, default="all", help="no more peers than these: eager leaves torch.compile out")
    option("--slow-peers", action="store_true", help="also time the reference, and on the CPU the plain eager form")
    option("--json", type=Path, metavar="FILE", help="write the figures here, as they come")
    option("--gate", type=float, metavar="MARGIN", help="exit 1 where a ratio misses MARGIN times its bar")

    command = commands.add_parser("projector", help="with the aggregator: the commuted order against the exact one")
    command.set_defaults(run=_projector)
    _add_paired_options(command)

    command = commands.add_parser("dropins", help="methods of other code bases, as published and patched")
    command.set_defaults(run=_dropins)
    _add_paired_options(command)

    command = commands.add_parser("layouts", help="the field's layouts, as published and as our op")
    command.set_defaults(run=_layouts)
    _add_paired_options(command)

    command = commands.add_parser("pipeline", help="video and question to answer; exit 1 where the answers differ")
    command.set_defaults(run=_pipeline)
    add_bench_options(command)

    command = commands.add_parser("stream", help="an hour of a stream at a frame a second: does it stay flat?")
    command.set_defaults(run=_stream)
    command.add_argument("--minutes", type=int, default=60, metavar="N", help="of the stream (default 60)")
    command.add_argument("--only", default="", metavar="TEXT", help="only the modes whose names contain it")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, as they come")
    command.add_argument("--gate", type=float, metavar="MARGIN", help="exit 1 where a ratio misses it times its bar")

    command = commands.add_parser("reduction", help="mixture of depths: what a prefill takes; its kernels")
    command.set_defaults(run=_reduction)
    _add_paired_options(command, rounds=5)

    command = commands.add_parser("pruning", help="how right the embedded model is with fewer video tokens")
    command.set_defaults(run=_pruning)
    command.add_argument("--clips", type=int, default=60, metavar="N", help="16 questions each (default 60)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, as they come")

    command = commands.add_parser("compare", help="exit 1 where a ratio is worse in NEW beyond noise")
    command.set_defaults(run=_compare)
    command.add_argument("old", type=Path, metavar="OLD.json")
    command.add_argument("new", type=Path, metavar="NEW.json")
    command.add_argument("--margin", type=float, default=0.1, help="what is noise in any case (default 0.1)")

    command = commands.add_parser("plot", help="rooflines, stages of a pipeline, the course of a stream")
    command.set_defaults(run=_plot)
    command.add_argument("results", type=Path, nargs="+", metavar="FILE.json")
    command.add_argument("--out", type=Path, default=Path("roofline.png"), metavar="PNG")

    command = commands.add_parser("tune", help="every tuning of the GPU's tile kernels: bits, then times")
    command.set_defaults(run=_tune)
    command.add_argument("--rounds", type=int, default=_ROUNDS["cuda"], metavar="N", help="paired rounds (default 31)")
    _add_only(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, as they come")

    command = commands.add_parser("small-calls", help="every GPU kernel, for compute-sanitizer; exit 1 if one is wrong")
    command.add_argument("--main-works", action="store_true", help="instead: the main works once each, for ncu")
    command.set_defaults(run=lambda args: sanitize.main("cuda", args.main_works))

    command = commands.add_parser("gpu-build", help="build what a machine with a GPU is to be brought: build/gpu")
    command.set_defaults(run=_gpu_build)
    command.add_argument("--arch", default="90", help="of the GPU, such as 90 (the default: H100, H200)")
    command.add_argument("--install", action="store_true", help="put the libraries into the package, too")

    command = commands.add_parser("gpu-pick", help="make the best tunings of bench tune the default, in the sources")
    command.set_defaults(run=_gpu_pick)
    command.add_argument("result", type=Path, metavar="TUNE.json")

    command = commands.add_parser("gpu", help="test, sanitize, tune and measure on this machine's GPU")
    command.set_defaults(run=lambda args: gpu.run(args.out, args.part, args.seconds))
    command.add_argument("--seconds", type=float, default=520, metavar="N", help="that it may take (default 520)")
    command.add_argument("--part", choices=gpu.PARTS, default="op", help="the aggregator (default), or all around it")
    command.add_argument("--out", type=Path, default=ROOT / "bench/results", metavar="FOLDER")
    return parser


def _add_paired_options(command: argparse.ArgumentParser, rounds: int = 9) -> None:
    command.add_argument("--device", choices=op.LABS, default="cpu", help="cpu (the default, all threads) or cuda")
    command.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"paired rounds (default {rounds})")
    _add_only(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, as they come")
    command.add_argument("--gate", type=float, metavar="MARGIN", help="exit 1 where a ratio misses it times its bar")


def _add_only(command: argparse.ArgumentParser) -> None:
    text = "only works of these names, or whose names contain them"
    command.add_argument("--only", nargs="+", default=(), metavar="TEXT", help=text)


def _op(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        torch.set_num_threads(1)
    save = (lambda result: write_json(args.json, result)) if args.json else (lambda result: None)
    rounds = args.rounds or _ROUNDS[args.device]
    lab = op.LABS[args.device]()
    lab = replace(lab, works=tuple(capped(work, args.peers) for work in lab.works))
    result = op.run(lab, rounds, args.slow_peers, args.only, save)
    _print(result)
    return 1 if result["errors"] or (args.gate is not None and not passes(result, args.gate)) else 0


def _tune(args: argparse.Namespace) -> int:
    save = (lambda result: write_json(args.json, result)) if args.json else (lambda result: None)
    result = tune.run(op.LABS["cuda"](), args.rounds, args.only, save)
    tune.show(result)
    return 1 if result["errors"] or any(figures["wrong"] for figures in result["works"].values()) else 0


def _gpu_build(args: argparse.Namespace) -> int:
    carried.build(args.arch)
    print(f"{carried.BUILT} is ready to be carried to a machine with a GPU of sm_{args.arch}")
    if args.install:
        print(f"installed: {', '.join(carried.install()) or 'nothing was missing'}")
    return 0


def _gpu_pick(args: argparse.Namespace) -> int:
    print("\n".join(tune.pick(args.result)))
    return 0


def _pipeline(args: argparse.Namespace) -> int:
    from .pipeline.report import main  # imports transformers, which nothing else here needs

    return main(args)


def _projector(args: argparse.Namespace) -> int:
    return _measure_pairs(args, projector.run, _print_projector)


def _dropins(args: argparse.Namespace) -> int:
    return _measure_pairs(args, dropins.run, _print_dropins)


def _stream(args: argparse.Namespace) -> int:
    from . import stream  # imports transformers

    if args.minutes < stream.LEAST_MINUTES:
        raise ResultError(f"{args.minutes} minutes have no quarters: give --minutes {stream.LEAST_MINUTES} or more")
    save = (lambda result: write_json(args.json, result)) if args.json else (lambda result: None)
    result = stream.run(args.minutes, args.only, save)
    _print_stream(result)
    return 1 if result["errors"] or (args.gate is not None and not passes(result, args.gate)) else 0


def _print_stream(result: dict) -> None:
    facts = result["machine"]
    console = Console(width=110, highlight=False, markup=False)
    console.print(f"{device_name(result)}, torch {facts['torch']}, {facts['threads']} threads, {facts['commit']}")
    table = Table(title=f"{result['minutes']} minutes at a frame a second; second quarter / last", title_justify="left")
    for name in ("mode", "ms for a frame", *next(iter(result["works"].values()), {"bars": {}})["bars"]):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode, figures in result["works"].items():
        bars = (f"{bar['ratio']:.3f} of {bar['bar']}" for bar in figures["bars"].values())
        table.add_row(mode, f"{figures['providers']['stream']['p50_ms']:.4g}", *bars)
    console.print(table)
    for name, reason in result["errors"].items():
        console.print(f"error: {name}: {reason}")


def _layouts(args: argparse.Namespace) -> int:
    return _measure_pairs(args, layouts.run, _print_layouts)


def _reduction(args: argparse.Namespace) -> int:
    from .reduction import run as reduction  # imports transformers

    return _measure_pairs(args, reduction.run, reduction.show)


def _pruning(args: argparse.Namespace) -> int:
    from .reduction import pruning  # imports transformers

    if args.clips < 1:
        raise ResultError(f"{args.clips} clips ask nothing: give --clips 1 or more")
    save = (lambda result: write_json(args.json, result)) if args.json else (lambda result: None)
    pruning.show(pruning.run(args.clips, save))
    return 0


def _measure_pairs(args: argparse.Namespace, run: Callable[..., dict], show: Callable[[dict], None]) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ResultError("no CUDA device was found")
    save = (lambda result: write_json(args.json, result)) if args.json else (lambda result: None)
    result = run(args.device, args.rounds, args.only, save)
    show(result)
    return 1 if result["errors"] or (args.gate is not None and not passes(result, args.gate)) else 0


def _print_projector(result: dict) -> None:
    facts = result["machine"]
    console = Console(width=110, highlight=False, markup=False)
    console.print(f"{device_name(result)}, torch {facts['torch']}, {facts['threads']} threads, {facts['commit']}")
    table = Table(title="projector and aggregator, 50 frames of 24x24 patches, 1024 -> 4096", title_justify="left")
    for name in ("work", "exact ms", "commuted ms", "exact / commuted", "bar", "error / exact's: slow", "fast"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for work, figures in result["works"].items():
        times = (f"{figures['providers'][mode]['p50_ms']:.4g}" for mode in (projector.EXACT, projector.COMMUTED))
        (bar,), errors = figures["bars"].values(), figures["error_over_exact"]
        asked = f"{bar['bar']:.2f}" if bar["bar"] else ""
        table.add_row(work, *times, f"{bar['ratio']:.2f}", asked, f"{errors['slow']:.3f}", f"{errors['fast']:.3f}")
    console.print(table)
    for name, reason in result["errors"].items():
        console.print(f"error: {name}: {reason}")


def _print_dropins(result: dict) -> None:
    title = "drop-ins, 50 frames of 24x24 patches of 4096"
    same_bits = "same bits", lambda figures: "yes" if figures["same_bits"] else "no"
    _print_pairs(result, title, dropins.PUBLISHED, dropins.PATCHED, same_bits)


def _print_layouts(result: dict) -> None:
    title = "layouts at their published frames and grids"
    rate = "GB/s", lambda figures: f"{figures['gb_per_s']:.1f}"
    _print_pairs(result, title, layouts.PUBLISHED, layouts.OURS, rate)


def _print_pairs(result: dict, title: str, peer: str, ours: str, last: tuple[str, Callable[[dict], str]]) -> None:
    """A row for each work: milliseconds of both forms, their ratio, and a last column (name, text of the figures)."""
    facts = result["machine"]
    console = Console(width=130, highlight=False, markup=False)
    console.print(f"{device_name(result)}, torch {facts['torch']}, {facts['threads']} threads, {facts['commit']}")
    table = Table(title=title, title_justify="left")
    for name in ("work", f"{peer} ms", f"{ours} ms", f"{peer} / {ours}", last[0]):
        table.add_column(name, justify="left" if name == "work" else "right")
    for work, figures in result["works"].items():
        rows = figures["providers"]
        times = (f"{rows[form]['p50_ms']:.4g}" for form in (peer, ours))
        table.add_row(work, *times, f"{rows[peer]['ratio']:.2f}", last[1](figures))
    console.print(table)
    for name, reason in result["errors"].items():
        console.print(f"error: {name}: {reason}")


def _compare(args: argparse.Namespace) -> int:
    changes = compare(read_result(args.old), read_result(args.new), args.margin)
    table = Table(title="ratios, higher is better", title_justify="left")
    for name in ("figure", "old", "new", "tolerance", ""):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for change in changes:
        new = "missing" if change.new is None else f"{change.new:.3f}"
        word = "REGRESSED" if change.regressed else ""
        table.add_row(change.name, f"{change.old:.3f}", new, f"{change.tolerance:.0%}", word)
    Console(width=130).print(table)
    return 1 if any(change.regressed for change in changes) else 0


def _plot(args: argparse.Namespace) -> int:
    results = [read_result(path) for path in args.results]
    kinds = {result.get("kind") for result in results} & {"pipeline", "stream", "reduction", "pruning"}
    if kinds and len(results) > 1:
        raise ResultError("results of the pipeline, of streams, reductions and pruning are drawn alone: name one")
    if "pipeline" in kinds:
        from .pipeline import report

        report.plot(results[0], args.out)
    elif "stream" in kinds:
        from . import stream

        stream.plot(results[0], args.out)
    elif "reduction" in kinds:
        from .reduction import run as reduction

        reduction.plot(results[0], args.out)
    elif "pruning" in kinds:
        from .reduction import pruning

        pruning.plot(results[0], args.out)
    else:
        plot(results, args.out)
    print(f"wrote {args.out}")
    return 0


def _print(result: dict) -> None:
    console = Console(width=140, highlight=False)
    facts = result["machine"]
    console.print(f"{device_name(result)}, torch {facts['torch']}, commit {facts['commit']}; medians, caches cold")
    for work, figures in result["works"].items():
        console.print(_table(work, figures, result.get("large_copy_gb_per_s")))
        for name, bar in figures["bars"].items():
            if bar["bar"] is not None:
                console.print("  " + _verdict(name, bar, figures))
    for name, row in result.get("host", {"providers": {}})["providers"].items():
        console.print(f"host time of a call, {name}: {row['p50_ms'] * 1e3:.1f} us")
    for name, figure in result.get("sweep", {}).items():
        console.print(f"T = 8 ... 4096: {name} {figure:.3f}")
    for kind in ("unavailable", "skipped", "errors"):
        for name, reason in result[kind].items():
            console.print(f"{kind}: {name}: {reason}", markup=False)


def _table(work: str, figures: dict, large_copy: float | None) -> Table:
    """large_copy: GB/s of a copy of gigabytes."""
    title = f"{work}: {figures['bytes'] / 1e6:.0f} MB, {figures['gb_per_s']:.1f} GB/s"
    table = Table(title=title, title_justify="left")
    rows = figures["providers"]
    copies = [name for name in (COPY, KERNEL) if name in rows]
    large = ["% of a large copy"] if large_copy else []
    heads = ("provider", "p20 ms", "p50 ms", "p80 ms", "GB/s", *(f"% of {copy}" for copy in copies), *large)
    for name in (*heads, "time / ours"):
        table.add_column(name, justify="left" if name == "provider" else "right")
    for name, row in rows.items():
        label = name if row.get("graph", True) else f"{name} (no graph)"
        rate = figures["bytes"] / row["p50_ms"] / 1e6
        times = (f"{row[key]:.4g}" for key in ("p20_ms", "p50_ms", "p80_ms"))
        shares = [f"{rows[copy]['ratio'] / row['ratio']:.0%}" for copy in copies]
        of_large = [f"{rate / large_copy:.0%}"] if large_copy else []
        table.add_row(label, *times, f"{rate:.1f}", *shares, *of_large, f"{row['ratio']:.2f}")
    return table


def _verdict(name: str, bar: dict, figures: dict) -> str:
    word = "reached" if bar["ratio"] >= bar["bar"] else "NOT reached"
    stretch = f" (hoped for {bar['stretch']:.2f})" if "stretch" in bar else ""
    name = name.replace(BEST_PEER, str(figures["best_peer"]))
    name = name.replace(FAIREST, f"{FAIREST}, {figures.get('fairest_copy')}")
    return f"against {name}: {bar['ratio']:.2f} of {bar['bar']:.2f}{stretch}, {word}"


if __name__ == "__main__":
    raise SystemExit(main())

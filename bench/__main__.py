"""python -m bench: the kernels and the pipeline against their peers; results compared and drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from sfllava_fast.cli.options import add_bench_options
from sfllava_fast.errors import SfllavaError

from .gpu import carried, sanitize, tune
from .gpu import run as gpu
from .harness import compare, tables
from .harness.record import ROOT, ResultError, passes, read_result, write_json
from .op import report as op_report
from .op import roofline
from .op import run as op
from .op.works import PEERS, capped
from .paired import dropins, layouts, projector

_ROUNDS = {"cpu": 15, "cuda": 31}
# Modules that draw a result of their kind; all other results are drawn as rooflines.
_PLOTS = {
    "pipeline": "pipeline.report",
    "stream": "stream",
    "reduction": "reduction.cost",
    "pruning": "reduction.pruning_accuracy",
}


def main() -> int:
    """Runs a command; its exit code is 1 if something failed or missed the gate, 2 for bad usage."""
    args = make_parser().parse_args()
    try:
        return args.run(args)
    except (ResultError, SfllavaError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = commands.add_parser(command.name, help=command.help, description=command.help, epilog=command.example)
        added.set_defaults(run=command.run)
        command.add_options(added)
    return parser


def _op(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        torch.set_num_threads(1)
    setup = op.SETUPS[args.device]()
    setup = replace(setup, works=tuple(capped(work, args.peers) for work in setup.works))
    rounds = args.rounds or _ROUNDS[args.device]
    return _report(args, op.run(setup, rounds, args.slow_peers, args.only, _saver(args)), op_report.show)


def _projector(args: argparse.Namespace) -> int:
    return _pairs(args, projector)


def _dropins(args: argparse.Namespace) -> int:
    return _pairs(args, dropins)


def _layouts(args: argparse.Namespace) -> int:
    return _pairs(args, layouts)


def _reduction(args: argparse.Namespace) -> int:
    from .reduction import cost  # imports transformers

    return _pairs(args, cost)


def _pairs(args: argparse.Namespace, module: Any) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ResultError("no CUDA device was found")
    return _report(args, module.run(args.device, args.rounds, args.only, _saver(args)), module.show)


def _pipeline(args: argparse.Namespace) -> int:
    from .pipeline.report import main  # imports transformers

    return main(args)


def _stream(args: argparse.Namespace) -> int:
    from . import stream  # imports transformers

    return _report(args, stream.run(args.minutes, args.only, _saver(args)), stream.show)


def _pruning(args: argparse.Namespace) -> int:
    from .reduction import pruning_accuracy  # imports transformers

    return _report(args, pruning_accuracy.run(args.clips, _saver(args)), pruning_accuracy.show)


def _tune(args: argparse.Namespace) -> int:
    result = tune.run(op.SETUPS["cuda"](), args.rounds, args.only, _saver(args))
    status = _report(args, result, tune.show)
    return 1 if any(figures["wrong"] for figures in result["works"].values()) else status


def _saver(args: argparse.Namespace) -> Callable[[dict], None]:
    def save(result: dict) -> None:
        if args.json:
            write_json(args.json, result)

    return save


def _report(args: argparse.Namespace, result: dict, show: Callable[[dict, Any], None]) -> int:
    show(result, tables.make_console())
    gate = getattr(args, "gate", None)
    return 1 if result["errors"] or (gate is not None and not passes(result, gate)) else 0


def _compare(args: argparse.Namespace) -> int:
    changes = compare.compare(read_result(args.old), read_result(args.new), args.margin)
    compare.show(changes, tables.make_console())
    return 1 if any(change.regressed for change in changes) else 0


def _plot(args: argparse.Namespace) -> int:
    results = [read_result(path) for path in args.results]
    modules = [_PLOTS[result["kind"]] for result in results if result.get("kind") in _PLOTS]
    if modules and len(results) > 1:
        raise ResultError("only rooflines are drawn together; a result of pipeline, stream, reduction or pruning alone")
    if modules:
        import_module(f".{modules[0]}", __package__).plot(results[0], args.out)
    else:
        roofline.plot(results, args.out)
    print(f"wrote {args.out}")
    return 0


def _small_calls(args: argparse.Namespace) -> int:
    return sanitize.main("cuda", args.main_works)


def _gpu_build(args: argparse.Namespace) -> int:
    carried.build(args.arch)
    print(f"{carried.BUILT} is ready for a machine with a GPU of sm_{args.arch}")
    if args.install:
        print(f"installed: {', '.join(carried.install()) or 'nothing was missing'}")
    return 0


def _gpu_pick(args: argparse.Namespace) -> int:
    print("\n".join(tune.pick(args.result)))
    return 0


def _gpu(args: argparse.Namespace) -> int:
    return gpu.run(args.out, args.part, args.seconds)


@dataclass(frozen=True)
class Command:
    """A command of `python -m bench`."""

    name: str
    run: Callable[[argparse.Namespace], int]
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    example: str | None = None


def _option(*names: str, **settings: Any) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(*names, **settings)

    return add


def _options(*options: Callable[[argparse.ArgumentParser], None]) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        for option in options:
            option(parser)

    return add


_JSON = _option("--json", type=Path, metavar="FILE", help="write the result here after each work")
_GATE = _option("--gate", type=float, metavar="MARGIN", help="exit 1 if a ratio is below MARGIN times its target")
_ONLY = _option("--only", nargs="+", default=(), metavar="TEXT", help="only works with these names or parts of names")
_TUNE_ROUNDS = _option("--rounds", type=int, default=_ROUNDS["cuda"], metavar="N", help="paired rounds (default 31)")


def _paired_options(rounds: int = 9) -> Callable[[argparse.ArgumentParser], None]:
    return _options(
        _option("--device", choices=op.SETUPS, default="cpu", help="cpu (default, all threads) or cuda"),
        _option("--rounds", type=int, default=rounds, metavar="N", help=f"paired rounds (default {rounds})"),
        _ONLY,
        _JSON,
        _GATE,
    )


COMMANDS = (
    Command(
        "op",
        _op,
        "time the aggregation against its peers; exit 1 if a value is wrong",
        _options(
            _option("--device", choices=op.SETUPS, default="cpu", help="cpu (default, one thread) or cuda"),
            _option("--rounds", type=int, metavar="N", help="paired rounds (default 15, on a GPU 31)"),
            _ONLY,
            _option("--peers", choices=PEERS, default="all", help="peers to time; eager is all without torch.compile"),
            _option("--slow-peers", action="store_true", help="also time the reference and, on the CPU, plain eager"),
            _JSON,
            _GATE,
        ),
        "example: python -m bench op --only 'bfloat16 D=4096' --rounds 5 --peers eager",
    ),
    Command("projector", _projector, "time the commuted projector against the exact order", _paired_options()),
    Command("dropins", _dropins, "time methods of other code bases, as published and patched", _paired_options()),
    Command("layouts", _layouts, "time the named layouts, as published and as our op", _paired_options()),
    Command(
        "pipeline",
        _pipeline,
        "time video and question to answer against the plain pipeline; exit 1 if the answers differ",
        add_bench_options,
        "example: python -m bench pipeline --config small --rounds 5 --json pipeline.json",
    ),
    Command(
        "stream",
        _stream,
        "watch a stream at 1 frame per second and check that time and memory do not grow",
        _options(
            _option("--minutes", type=int, default=60, metavar="N", help="length of the stream (default 60)"),
            _option("--only", default="", metavar="TEXT", help="only modes with this text in their name"),
            _JSON,
            _GATE,
        ),
    ),
    Command(
        "reduction",
        _reduction,
        "time, FLOP and memory of a prefill with fewer video tokens, and of its kernels",
        _paired_options(rounds=5),
    ),
    Command(
        "pruning",
        _pruning,
        "accuracy of the embedded model with fewer video tokens",
        _options(_option("--clips", type=int, default=60, metavar="N", help="16 questions each (default 60)"), _JSON),
    ),
    Command(
        "compare",
        _compare,
        "compare two results of one device; exit 1 if a ratio in NEW is worse beyond noise",
        _options(
            _option("old", type=Path, metavar="OLD.json"),
            _option("new", type=Path, metavar="NEW.json"),
            _option("--margin", type=float, default=0.1, help="least tolerance, as a share (default 0.1)"),
        ),
    ),
    Command(
        "plot",
        _plot,
        "draw results: rooflines, the stages of a pipeline, a stream over time, reductions",
        _options(
            _option("results", type=Path, nargs="+", metavar="FILE.json"),
            _option("--out", type=Path, default=Path("roofline.png"), metavar="PNG"),
        ),
    ),
    Command(
        "tune",
        _tune,
        "check and time every tuning of the GPU's tile kernels",
        _options(_TUNE_ROUNDS, _ONLY, _JSON),
    ),
    Command(
        "small-calls",
        _small_calls,
        "run every GPU kernel once on small inputs, for compute-sanitizer; exit 1 if a value is wrong",
        _option("--main-works", action="store_true", help="run the main works once each instead, for ncu"),
    ),
    Command(
        "gpu-build",
        _gpu_build,
        "build into build/gpu what a machine with a GPU needs",
        _options(
            _option("--arch", default="90", help="compute capability (default 90: H100, H200)"),
            _option("--install", action="store_true", help="also copy the libraries into the package"),
        ),
    ),
    Command(
        "gpu-pick",
        _gpu_pick,
        "write the best tunings of `bench tune` into the sources as the default",
        _option("result", type=Path, metavar="TUNE.json"),
    ),
    Command(
        "gpu",
        _gpu,
        "test, sanitize, tune and measure on this machine's GPU",
        _options(
            _option("--seconds", type=float, default=520, metavar="N", help="time limit in seconds (default 520)"),
            _option("--part", choices=gpu.PARTS, default="op", help="op (default) or the whole pipeline"),
            _option("--out", type=Path, default=ROOT / "bench/results", metavar="FOLDER", help="where results go"),
        ),
    ),
)


if __name__ == "__main__":
    raise SystemExit(main())

"""`bench pipeline` and `sfllava-fast bench`: the command, its result as text and as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..harness.record import device_name, passes, write_json
from ..harness.tables import make_console, make_table, show_bars, show_machine, token_rate
from . import run as pipeline
from .figures import COMPILED, FROM_FRAMES, OURS, PLAIN, SECOND, STEP, TO_FIRST_TOKEN, WITH_DECODING


def main(args: argparse.Namespace) -> int:
    """Run the benchmark; returns 1 if answers differ or a ratio misses the gate."""
    names = ("model", "config", "video", "frames", "layout", "rounds", "device", "dtype", "attention", "backend")
    settings = {name: getattr(args, name) for name in (*names, "new_tokens") if getattr(args, name) is not None}
    save = (lambda result: write_json(args.json, result)) if args.json else (lambda result: None)
    settings = pipeline.Settings(**settings, questions=tuple(args.question or ()))
    result = pipeline.run(settings, save, args.trace)
    show(result, make_console())
    if args.plot:
        plot(result, args.plot)
    return int(bool(result["errors"]) or (args.gate is not None and not passes(result, args.gate)))


def show(result: dict, console: Console) -> None:
    """Prints the settings, whether the answers agree, a row for each stage, ceilings, memory and targets."""
    show_machine(result, console)
    settings = result["settings"]
    weights = ", random weights" if settings["random_weights"] else ""
    size = "x".join(map(str, settings["frame_size"][::-1]))
    console.print(
        f"{settings['model']}{weights}, {settings['dtype']}, attention {settings['attention']}, aggregator "
        f"{settings['backend']}; {settings['frames']} frames of {size}, {settings['video_tokens']} video tokens + "
        f"{settings['prompt_tokens']} of prompt"
    )
    for name, reason in result["unavailable"].items():
        console.print(f"unavailable: {name}: {reason}")
    for question, error in result["errors"].items():
        console.print(f"WRONG: {question}: {error}")
    ties = sum(answer["near_ties"] for answer in result["answers"])
    allowed = f" but for {ties} near ties of random 16-bit weights" if ties else ""
    if not result["errors"]:
        count = len(result["answers"])
        console.print(f"the answers to {count} questions are the plain pipeline's, token for token{allowed}")
    console.print(_table(result))
    _show_figures(console, result)


def _table(result: dict) -> Table:
    columns = ("stage", "p20 ms", "p50 ms", "p80 ms", "plain ms", "plain / ours", "tokens/s", "plain tokens/s")
    title = f"medians of {result['settings']['rounds']} paired rounds"
    table = make_table(title, (*columns, "GFLOP", "MB", "% of GEMM", "% of copy"))
    ceilings = result["ceilings"]
    for name, work in result["works"].items():
        ours, plain = work["providers"][OURS], work["providers"].get(PLAIN)
        ratio = f"{work['bars'][f'{OURS}: {PLAIN}']['ratio']:.2f}" if plain else ""
        times = (f"{ours[key]:.4g}" for key in ("p20_ms", "p50_ms", "p80_ms"))
        cells = [*times, f"{plain['p50_ms']:.4g}" if plain else "", ratio, token_rate(ours), token_rate(plain or {})]
        table.add_row(name, *cells, *_costs(ours, ceilings), end_section=name == "generate")
        if compiled := work["providers"].get(COMPILED):
            ratio = f"{work['bars'][f'{OURS}: {COMPILED}']['ratio']:.2f}"
            cells = ["", "", "", f"{compiled['p50_ms']:.4g}", ratio, "", token_rate(compiled)]
            table.add_row(f"{name}, {COMPILED}", *cells)
    return table


def _costs(row: dict, ceilings: dict) -> list[str]:
    if "flop" not in row:
        return []
    flop, moved, seconds = row["flop"], row["bytes"], row["p50_ms"] / 1e3
    shares = (flop / seconds / ceilings["gemm_flop_per_s"], moved / seconds / ceilings["copy_bytes_per_s"])
    return [f"{flop / 1e9:.4g}", f"{moved / 1e6:.4g}", *(f"{share:.1%}" for share in shares)]


def _show_figures(console: Console, result: dict) -> None:
    ceilings, works = result["ceilings"], result["works"]
    console.print(
        f"ceilings measured in between: {ceilings['gemm_flop_per_s'] / 1e9:.4g} GFLOP/s of GEMM, "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s of copy_"
    )
    second = works[SECOND]
    console.print(
        f"{SECOND}: {second['share']:.1%} of the first's; five questions take "
        f"{second['five_over_one']:.2f} times the prefill of one"
    )
    if STEP in works:
        console.print(
            f"{STEP}: {works[STEP]['over_floor']:.2f} times its floor of {works[STEP]['floor_ms']:.4g} ms "
            "(weights and cache over the copy's bandwidth)"
        )
    memory = result["memory"]
    console.print("peak memory: " + ", ".join(f"{who} {_memory(row)}" for who, row in memory.items()))
    show_bars(works, console)


def _memory(row: dict) -> str:
    if row["growth_bytes"] is None:
        return "not measured"
    peak = f", in all {_bytes(row['peak_bytes'])}" if row["peak_bytes"] else ""
    return f"weights {_bytes(row['weights_bytes'])} + {_bytes(row['growth_bytes'])} in a call{peak}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plot(result: dict, path: Path) -> None:
    """Write a picture of each pipeline's stages to the first token."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = {PLAIN: _stacked(result, PLAIN), OURS: _overlapped(result)}
    ends = dict.fromkeys(bars, 0.0)
    for stage in TO_FIRST_TOKEN:
        widths = [bars[who].get(stage, 0.0) for who in ends]
        label = "decode + preprocess, not hidden" if stage == "wait" else stage
        axes.barh(list(ends), widths, left=list(ends.values()), label=label)
        ends = {who: end + width for (who, end), width in zip(ends.items(), widths)}
    ratios = [result["works"][name]["bars"][f"{OURS}: {PLAIN}"]["ratio"] for name in (WITH_DECODING, FROM_FRAMES)]
    settings = result["settings"]
    axes.set(
        xlabel="ms to the first token, decoding included",
        title=f"{settings['model']} on {device_name(result)}: {ratios[0]:.2f} times as fast, "
        f"{ratios[1]:.2f} from decoded frames",
    )
    axes.legend(ncols=len(TO_FIRST_TOKEN), fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _stacked(result: dict, who: str) -> dict[str, float]:
    """Medians of the stages to the first token."""
    rows = {stage: result["works"][stage]["providers"].get(who) for stage in TO_FIRST_TOKEN}
    return {stage: row["p50_ms"] for stage, row in rows.items() if row}


def _overlapped(result: dict) -> dict[str, float]:
    """Our stages; decoding and preprocessing take the part of the time to the first token that the others do not."""
    widths = {
        stage: width for stage, width in _stacked(result, OURS).items() if stage not in ("decode", "preprocess", "wait")
    }
    first = result["works"][WITH_DECODING]["providers"][OURS]["p50_ms"]
    return {"wait": max(first - sum(widths.values()), 0.0), **widths}

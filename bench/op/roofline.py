"""The roofline of a memory-bound operator: bytes per second against bytes moved, with the measured copy."""

from __future__ import annotations

from pathlib import Path

from ..harness.record import device_name
from .run import COPY

_BACKWARD = "backward "
_OURS = ("cpu", "cuda", "triton")


def plot(results: list[dict], path: Path) -> None:
    """Write a picture with a panel for each result."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8 * len(results), 5), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results):
        _panel(axes, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axes, result: dict) -> None:
    series = points(result)
    for name, values in series.items():
        if name == COPY:
            axes.plot(*zip(*values), "k--", label=f"{COPY} of as many bytes")
        else:
            ours = name.removeprefix(_BACKWARD) in _OURS
            axes.scatter(*zip(*values), label=name, marker="o" if ours else "x", s=40 if ours else 25)
    if COPY in series:
        axes.axhline(max(rate for _, rate in series[COPY]), color="k", lw=0.8)
    axes.set(xscale="log", ylim=(0, None), xlabel="bytes moved", ylabel="GB/s", title=device_name(result))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def points(result: dict) -> dict[str, list[tuple[int, float]]]:
    """(bytes, GB/s) of each provider, by bytes."""
    series: dict[str, list[tuple[int, float]]] = {}
    for work, figures in result["works"].items():
        for name, row in figures["providers"].items():
            name = _BACKWARD + name if work.startswith(_BACKWARD) and name != COPY else name
            series.setdefault(name, []).append((figures["bytes"], figures["bytes"] / row["p50_ms"] / 1e6))
    return {name: sorted(values) for name, values in series.items()}

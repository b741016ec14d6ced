"""Two results of one device: the ratios of the later one may not be worse than noise explains."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from .record import ResultError, device_name
from .tables import make_table


@dataclass(frozen=True)
class Change:
    """A figure in the old and the new result.

    Attributes:
        name: Of the work and of what its ratio is against.
        old: A ratio, so higher is better.
        new: None if it was not measured.
        tolerance: The share of `old` that noise explains.
        tokens_per_s: Of the measured call in the old and the new result; None if a result has no such figure.
    """

    name: str
    old: float
    new: float | None
    tolerance: float
    tokens_per_s: tuple[float | None, float | None] = (None, None)

    @property
    def regressed(self) -> bool:
        return self.new is None or not self.new >= self.old * (1 - self.tolerance)


@dataclass(frozen=True)
class _Figure:
    ratio: float
    noise: float
    tokens_per_s: float | None


def compare(old: dict, new: dict, margin: float) -> list[Change]:
    """Compares every ratio of the old result with that of the new one.

    Args:
        old, new: Results as `read_result` gives them.
        margin: The least tolerance, as a share.

    Raises:
        ResultError: The two are of different devices, or have no figure in common.
    """
    if _device(old) != _device(new):
        raise ResultError(f"results of different devices: {_device(old)} and {_device(new)}")
    before, after = _figures(old), _figures(new)
    if not before.keys() & after.keys():
        raise ResultError("the two results have no figure in common")
    return [_change(name, figure, after.get(name), margin) for name, figure in before.items()]


def show(changes: list[Change], console: Console) -> None:
    """Prints a row for each figure; tokens/s are for the reader, only ratios decide."""
    columns = ("figure", "old", "new", "tolerance", "old tokens/s", "new tokens/s", "")
    table = make_table("ratios, higher is better", columns)
    for change in changes:
        new = "missing" if change.new is None else f"{change.new:.3f}"
        rates = ("" if rate is None else f"{rate:,.0f}" for rate in change.tokens_per_s)
        word = "REGRESSED" if change.regressed else ""
        table.add_row(change.name, f"{change.old:.3f}", new, f"{change.tolerance:.0%}", *rates, word)
    console.print(table)


def _change(name: str, old: _Figure, new: _Figure | None, margin: float) -> Change:
    if new is None:
        return Change(name, old.ratio, None, margin, (old.tokens_per_s, None))
    tolerance = max(margin, old.noise, new.noise)
    return Change(name, old.ratio, new.ratio, tolerance, (old.tokens_per_s, new.tokens_per_s))


def _device(result: dict) -> str:
    """The device; of a CPU also the processor and the instruction set of the kernels, since names of CPUs repeat."""
    facts = result["machine"]
    if "gpu" in facts:
        return device_name(result)
    processor, isa = facts.get("processor", "processor not noted"), facts.get("isa", "kernels not noted")
    return f"{device_name(result)} ({processor}, {isa})"


def _figures(result: dict) -> dict[str, _Figure]:
    works = result["works"] | ({"host overhead": result["host"]} if "host" in result else {})
    return {
        f"{work}, {name}": _figure(figures, name, bar["ratio"])
        for work, figures in works.items()
        for name, bar in figures["bars"].items()
    }


def _figure(figures: dict, bar: str, ratio: float) -> _Figure:
    """Its noise is half the way from the 20th to the 80th percentile over the median, of both whose ratio it is."""
    backend, _, against = bar.rpartition(": ")
    backend, rows = backend or "cpu", figures["providers"]
    named = {"best peer": figures.get("best_peer"), "fairest copy": figures.get("fairest_copy")}
    pair = [rows[name] for name in (backend, named.get(against, against)) if name in rows]
    noise = sum((row["p80_ms"] - row["p20_ms"]) / row["p50_ms"] for row in pair) / 2
    return _Figure(ratio, noise, rows.get(backend, {}).get("tokens_per_s"))

"""Two results of one device: the ratios of the later one may not be worse than noise explains."""

from __future__ import annotations

from dataclasses import dataclass

from .record import ResultError, device_name


@dataclass(frozen=True)
class Change:
    """A figure in the old and the new result; a ratio, so higher is better. None: not measured."""

    name: str
    old: float
    new: float | None
    tolerance: float

    @property
    def regressed(self) -> bool:
        return self.new is None or not self.new >= self.old * (1 - self.tolerance)


def compare(old: dict, new: dict, margin: float) -> list[Change]:
    """Every figure of the old result; ResultError where the two cannot be compared."""
    if _device(old) != _device(new):
        raise ResultError(f"results of different devices: {_device(old)} and {_device(new)}")
    before, after = _figures(old), _figures(new)
    if not before.keys() & after.keys():
        raise ResultError("the two results have no figure in common")
    return [
        Change(name, ratio, *(after[name][0], max(margin, noise, after[name][1])) if name in after else (None, margin))
        for name, (ratio, noise) in before.items()
    ]


def _device(result: dict) -> str:
    """The device; of a CPU also the processor and the instruction set of the kernels, since names of CPUs repeat."""
    facts = result["machine"]
    if "gpu" in facts:
        return device_name(result)
    processor, isa = facts.get("processor", "processor not noted"), facts.get("isa", "kernels not noted")
    return f"{device_name(result)} ({processor}, {isa})"


def _figures(result: dict) -> dict[str, tuple[float, float]]:
    """Ratio and noise by name."""
    works = result["works"] | ({"host overhead": result["host"]} if "host" in result else {})
    return {
        f"{work}, {name}": (bar["ratio"], _noise(figures, name))
        for work, figures in works.items()
        for name, bar in figures["bars"].items()
    }


def _noise(figures: dict, bar: str) -> float:
    """Half the way from the 20th to the 80th percentile, over the median, of both whose ratio it is."""
    backend, _, against = bar.rpartition(": ")
    rows = figures["providers"]
    named = {"best peer": figures["best_peer"], "fairest copy": figures.get("fairest_copy")}
    pair = (backend or "cpu", named.get(against, against))
    spreads = (
        rows[name]["p80_ms"] / rows[name]["p50_ms"] - rows[name]["p20_ms"] / rows[name]["p50_ms"]
        for name in pair
        if name in rows
    )
    return sum(spreads) / 2

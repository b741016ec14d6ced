"""`make fuzz`: it counts cases, ends at the first finding and prints the seed that reproduces it."""

from contextlib import contextmanager

import fuzz
import pytest


@pytest.mark.parametrize("target", ["op", "decord", "images", "session", "server"])
def test_one_case_of_a_target(target, capsys):
    if target == "decord":
        pytest.importorskip("decord")
    assert fuzz.fuzz(target, seed=0, seconds=0)
    assert capsys.readouterr().out.startswith(f"{target}: 1 ")


def test_a_finding_ends_it_with_its_seed(monkeypatch, capsys):
    @contextmanager
    def wrong(folder):
        def case(random_):
            if random_.random() < 0.5:
                raise ZeroDivisionError
            return "cases"

        yield case

    monkeypatch.setattr(fuzz, "TARGETS", {"wrong": wrong})
    monkeypatch.setenv("SECONDS", "60")
    assert fuzz.main([]) == 1
    out = capsys.readouterr().out
    seed = out.partition("SEED=")[2].split()[0]
    monkeypatch.setenv("SECONDS", "0")
    monkeypatch.setenv("SEED", seed)
    assert fuzz.main(["wrong"]) == 1 and fuzz.main(["other"]) == 2

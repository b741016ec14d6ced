"""The table of layouts: every preset, counts as published and as asked, any layout alone."""

import json
from itertools import product

import pytest

from sfllava_fast.cli.main import main
from sfllava_fast.layouts.presets import OPTIONS, PRESETS, find_preset

PUBLISHED = {
    "sf_llava": 3680, "sf_llava_34b": 3680, "llava_next_image": 4608, "llava_next_video": 4608, "pllava": 2304,
    "video_chatgpt": 356, "red_villm": 356, "ig_vlm": 576, "slow_only": 2880, "fast_only": 800, "uniform": 3456,
    "videollm_online": 500, "llava_video_slowfast": 7 * (13 * 13 + 1) + 57 * (6 * 6 + 1),
}  # fmt: skip


def rows(capsys, *arguments):
    assert main(["layouts", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_preset_with_its_published_tokens(capsys):
    assert {row["name"]: row["tokens"]["total"] for row in rows(capsys)} == PUBLISHED
    assert set(PUBLISHED) == set(PRESETS)


def test_tokens_of_other_frames_and_grids(capsys):
    counts = {row["name"]: row["tokens"]["total"] for row in rows(capsys, "--frames", "9", "--grid", "5x6")}
    assert counts["llava_next_image"] == 9 * 2 * 3 and counts["videollm_online"] == 90 and counts["pllava"] == 2304
    assert counts["video_chatgpt"] == 100 + 30 and counts["ig_vlm"] == 2 * 30


def test_a_layout_that_leaves_nothing_says_so(capsys):
    left = {row["name"]: row["tokens"] for row in rows(capsys, "--grid", "1x1")}
    assert left["llava_next_image"] is None and left["uniform"]["total"] == 6
    assert main(["layouts", "--grid", "1x1", "--layout", "llava_next_image"]) == 0
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize("text, tokens", [("pool:each,stride3,stride3,max", 3200), ("slowfast-fast_2x2", 200)])
def test_one_layout_with_no_name(capsys, text, tokens):
    (row,) = rows(capsys, "--layout", text)
    assert row["tokens"]["total"] == tokens and row["layout"] == text and row["frames"] == 50


def test_the_table_is_whole(capsys):
    assert main(["layouts"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and f"{count:,}" in out for name, count in PUBLISHED.items())
    assert all(options in out for options in OPTIONS.values()) and all(one.source in out for one in PRESETS.values())
    assert out.replace("\n ", "").count("before the projector") == 3
    assert max(map(len, out.splitlines())) <= 80


def written(options):
    """Every text that the options of a name allow, one of each in their order."""
    choices = []
    for option in options.split():
        first, *others = option.split("|")
        stem = first[: first.rfind("_") + 1] or "-"
        choices.append([first, *(stem + other for other in others)])
    return ["".join(picks) for picks in product(*choices)]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_that_is_listed_is_one(name):
    found = {str(find_preset(name + text).layout) for text in written(OPTIONS[name])}
    assert len(found) == len(written(OPTIONS[name]))


def test_an_unknown_layout_is_a_line(capsys):
    assert main(["layouts", "--layout", "nix"]) == 2
    assert "unknown layout 'nix': write one of sf_llava" in capsys.readouterr().err

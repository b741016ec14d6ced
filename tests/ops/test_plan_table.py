"""The int32 table of a plan, read back number by number as csrc/include/sfllava/plan.h describes it."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from sfllava_fast.errors import BackendError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.layouts.slowfast import SlowFastLayout
from sfllava_fast.ops.backends.plan_table import HEADER, ITEM, PATHWAY, REDUCE, VERSION, find_sections, plan_table


def read(table: list[int]) -> dict:
    header, rest = table[:8], table[8:]
    version, patches, frames, tokens, pathways, groups, items, readers = header
    parts = {}
    for name, count, width in [
        ("pathways", pathways, 11),
        ("groups", groups + 1, 1),
        ("items", items, 4),
        ("frames", frames + 1, 1),
        ("readers", readers, 1),
    ]:
        parts[name] = [rest[i * width : (i + 1) * width] for i in range(count)]
        rest = rest[count * width :]
    parts["bins"] = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
    return {"header": (version, patches, frames, tokens), **parts}


def test_a_small_layout_by_hand():
    table = plan_table(SlowFastLayout(1, "spatial_1d_max_pool", (1, 2)).plan(2, (2, 4)))
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert read(table.tolist()) == {
        "header": (3, 8, 2, 8),
        # first patch, height, width, reduce (0 max, 1 mean), rows, first row bin, columns, first column bin, first
        # covers, pitch
        "pathways": [[0, 2, 4, 0, 2, 0, 2, 2, 4, 6, 2], [0, 2, 4, 1, 1, 10, 2, 11, 13, 15, 2]],
        "groups": [[0], [2], [3]],
        # pathway, first frame, past the last frame, first token: frame 0 is read once, for both
        "items": [[0, 0, 1, 0], [1, 0, 1, 4], [1, 1, 2, 6]],
        "frames": [[0], [2], [3]],
        "readers": [[0], [1], [2]],
        "bins": [
            (0, 1),
            (1, 2),
            (0, 2),
            (2, 4),  # slow rows, columns
            (0, 1),
            (1, 2),
            (0, 1),
            (0, 1),
            (1, 2),
            (1, 2),  # and which of them hold each row, each column
            (0, 2),
            (0, 2),
            (2, 4),  # fast
            (0, 1),
            (0, 1),
            (0, 1),
            (0, 1),
            (1, 2),
            (1, 2),
        ],
    }


def tokens_by_boxes(table: dict, frame: int, patch: int) -> list[int]:
    """Every token whose box holds a patch, from the boxes themselves."""
    tokens, bins = [], table["bins"]
    for pathway, begin, end, token in sorted(table["items"], key=lambda item: item[3]):
        first, height, width, _, rows, row, cols, col, _, _, pitch = table["pathways"][pathway]
        y, x = divmod(patch - first, width)
        for r, c in product(range(rows), range(cols)):
            box = (begin, end), bins[row + r], bins[col + c]
            if all(start <= at < stop for at, (start, stop) in zip((frame, y, x), box)):
                tokens.append(token + r * pitch + c)
    return tokens


def tokens_by_covers(table: dict, frame: int, patch: int) -> list[int]:
    """The same from the frame's readers and the covers."""
    tokens, bins = [], table["bins"]
    (begin,), (end,) = table["frames"][frame : frame + 2]
    for (reader,) in table["readers"][begin:end]:
        pathway, _, _, token = table["items"][reader]
        first, height, width, _, _, _, _, _, row_cover, col_cover, pitch = table["pathways"][pathway]
        if not first <= patch < first + height * width:
            continue
        y, x = divmod(patch - first, width)
        covers = range(*bins[row_cover + y]), range(*bins[col_cover + x])
        tokens += [token + r * pitch + c for r, c in product(*covers)]
    return tokens


@pytest.mark.parametrize("grid", [(5, 7), (2, 3), (6, 6)])
@pytest.mark.parametrize(
    "config",
    [
        SlowFastLayout(5, "spatial_1d_avg_pool", (4, 3)), SlowFastLayout(7), parse_layout("videollm_online-interval"),
        parse_layout("llava_video_slowfast-bilinear-every_2-stride_1-newline_grid"), parse_layout("pllava"),
    ],
    ids=str,
)  # fmt: skip
def test_what_reads_a_patch(config, grid):
    """Readers and covers lead from a patch to every token whose box holds it, in the order of the tokens."""
    table = read(plan_table(config.plan((3, 1, 4), grid)).tolist())
    for frame, patch in product(range(8), range(grid[0] * grid[1] + config.class_token)):
        assert tokens_by_covers(table, frame, patch) == tokens_by_boxes(table, frame, patch)


def test_every_token_is_written_once_and_frames_are_read_together():
    plan = SlowFastLayout(5, "spatial_2d_avg_pool", (3, 2)).plan((3, 1, 7), (5, 6))
    table = read(plan_table(plan).tolist())
    written = []
    for pathway, _, _, token in table["items"]:
        _, _, _, _, rows, _, cols, *_ = table["pathways"][pathway]
        written += range(token, token + rows * cols)
    assert sorted(written) == list(range(plan.offsets[-1]))
    starts = [item[1:3] for item in table["items"]]
    edges = [edge for (edge,) in table["groups"]]
    grouped = [starts[a:b] for a, b in zip(edges, edges[1:])]
    assert all(group.count(group[0]) == len(group) for group in grouped)
    assert len(grouped) == len({tuple(start) for start in starts}) == 11


def test_the_format_is_that_of_the_c_header():
    header = (Path(__file__).parents[2] / "csrc/include/sfllava/plan.h").read_text()
    constants = {name: int(value) for name, value in re.findall(r"\b(k[A-Z]\w+) = (\d+)", header)}
    sizes = {"kPlanVersion": VERSION, "kHeader": len(HEADER), "kPathway": len(PATHWAY), "kItem": len(ITEM)}
    assert constants == sizes | {f"k{name.capitalize()}": value for name, value in REDUCE.items()}
    text = " ".join(re.findall(r"^// ?(.*)", header, flags=re.M))
    for fields in (HEADER, PATHWAY, ("pathway", "first frame", "past the last frame", "first token")):
        assert re.search(r",\s+".join(fields), text)


def test_sections():
    plan = SlowFastLayout(1, "spatial_1d_max_pool", (1, 2)).plan(2, (2, 4))
    table = plan_table(plan)
    assert find_sections(table) == (2, 30, 33, 45, 48, 51)
    wrong = table.clone()
    wrong[0] += 1
    with pytest.raises(BackendError, match="the plan's table is of version 4, and the kernels read 3"):
        find_sections(wrong)


def test_tables_are_cached():
    plan = SlowFastLayout().plan(4, (4, 4))
    assert plan_table(plan) is plan_table(plan)

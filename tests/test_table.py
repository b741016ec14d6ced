"""The int32 table of a plan, read back number by number as csrc/include/sfllava/plan.h describes it."""

from __future__ import annotations

import torch

from sfllava_fast.config import SlowFastConfig
from sfllava_fast.table import plan_table


def read(table: list[int]) -> dict:
    header, rest = table[:7], table[7:]
    version, patches, frames, tokens, pathways, groups, items = header
    parts = {}
    for name, count, width in [("pathways", pathways, 6), ("groups", groups + 1, 1), ("items", items, 4)]:
        parts[name] = [rest[i * width : (i + 1) * width] for i in range(count)]
        rest = rest[count * width :]
    parts["bins"] = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
    return {"header": (version, patches, frames, tokens), **parts}


def test_a_small_layout_by_hand():
    table = plan_table(SlowFastConfig(1, "spatial_1d_max_pool", (1, 2)).plan(2, (2, 4)))
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert read(table.tolist()) == {
        "header": (1, 8, 2, 8),
        # width, reduce (0 max, 1 mean), rows, first row bin, columns, first column bin
        "pathways": [[4, 0, 2, 0, 2, 2], [4, 1, 1, 4, 2, 5]],
        "groups": [[0], [2], [3]],
        # pathway, first frame, past the last frame, first token: frame 0 is read once, for both
        "items": [[0, 0, 1, 0], [1, 0, 1, 4], [1, 1, 2, 6]],
        "bins": [(0, 1), (1, 2), (0, 2), (2, 4), (0, 2), (0, 2), (2, 4)],
    }


def test_every_token_is_written_once_and_frames_are_read_together():
    plan = SlowFastConfig(5, "spatial_2d_avg_pool", (3, 2)).plan((3, 1, 7), (5, 6))
    table = read(plan_table(plan).tolist())
    written = []
    for pathway, _, _, token in table["items"]:
        _, _, rows, _, cols, _ = table["pathways"][pathway]
        written += range(token, token + rows * cols)
    assert sorted(written) == list(range(plan.offsets[-1]))
    starts = [item[1:3] for item in table["items"]]
    edges = [edge for (edge,) in table["groups"]]
    grouped = [starts[a:b] for a, b in zip(edges, edges[1:])]
    assert all(group.count(group[0]) == len(group) for group in grouped)
    assert len(grouped) == len({tuple(start) for start in starts}) == 11


def test_tables_are_cached():
    plan = SlowFastConfig().plan(4, (4, 4))
    assert plan_table(plan) is plan_table(plan)

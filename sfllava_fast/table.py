"""A plan as the int32 table that compiled kernels read; its format is in csrc/include/sfllava/plan.h."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from .config import PathwayTables, Plan

_VERSION = 1
_REDUCE = {"max": 0, "mean": 1}
_Item = tuple[int, int, int, int]  # pathway, first frame, past the last frame, first token


@lru_cache(maxsize=256)
def plan_table(plan: Plan) -> Tensor:
    """The table of `plan`, int32 on the CPU, cached."""
    items = sorted(_items(plan), key=lambda item: (item[1], item[2], item[0]))
    groups = [i for i, item in enumerate(items) if i == 0 or items[i - 1][1:3] != item[1:3]]
    bins, pathways = [], []
    for path in plan.pathways:
        pathways.append(_pathway(path, first_bin=len(bins)))
        bins += [*path.rows, *path.cols]
    height, width = plan.grid
    header = [_VERSION, height * width, sum(plan.lengths), plan.offsets[-1], len(pathways), len(groups), len(items)]
    numbers = [*header, *chain(*pathways), *groups, len(items), *chain(*items), *chain(*bins)]
    return torch.tensor(numbers, dtype=torch.int32)


def _pathway(path: PathwayTables, first_bin: int) -> list[int]:
    rows, cols = len(path.rows), len(path.cols)
    return [path.shape[1], _REDUCE[path.pathway.reduce], rows, first_bin, cols, first_bin + rows]


def _items(plan: Plan) -> list[_Item]:
    items = []
    for video, token in enumerate(plan.offsets[:-1]):
        for index, path in enumerate(plan.pathways):
            for start, stop in path.frames[video]:
                items.append((index, start, stop, token))
                token += path.tokens_per_frame
    return items

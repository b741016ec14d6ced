"""The order of a plan's patches for `project_tiles`, in which boxes are runs of rows and few patches occur twice.

The table, int32: the offsets of its sections [8], then
    frames, patches [tiles * size]   of every slot of every tile; a slot that only fills up has ~frame
    kept [tiles * size]              the row among the kept patches, or -1; empty if nothing is kept
    tiles [tiles, 4]                 first segment, past the last one, whether any slot is kept, any unit a token
    segments [segments, 4]           first unit in the tile, past the last one, row, count that the sum is divided by
    tokens, counts [tiles * units]   row of the unit's mean, or -1, and how many patches it has; empty without tokens
    sums [sums, 4]                   row, first row of its parts, how many, count that their sum is divided by
A *unit* is 1, 2 or 4 patches that follow each other in the order. A box no larger is one unit; a larger one is a run of
units, of 2 patches at least, and has a *segment* in each tile that the run meets. Rows are the tokens, then the parts
of boxes that several tiles share.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from sfllava_fast.layouts.plan import Plan, kept_with_plan

_UNITS = (4, 2, 1)


@dataclass(frozen=True, eq=False)  # one per (plan, size)
class ProjectOrder:
    """The order of a plan, in tiles of some size."""

    table: torch.Tensor  # on the host
    tiles: int
    unit: int
    tokens: int  # of the mean pathways
    parts: int  # rows past the tokens
    kept_frames: tuple[int, ...]  # that a maximum reads, in rising order
    has_small: bool  # some unit is a token
    padded: bool  # some unit is no whole box
    sums: int
    sums_at: int


@dataclass(frozen=True, eq=False)
class _FrameOrder:
    """The order of one frame, for the pathways that read it. Boxes are numbered, -1 is none."""

    patch: np.ndarray  # [rows]
    real: np.ndarray  # [rows] False if the row only fills up a unit
    keep: np.ndarray  # [rows] the first row of a patch, if a maximum reads the frame
    small: np.ndarray  # [units] the box that the unit is
    large: np.ndarray  # [units] the box that the unit is part of
    sizes: np.ndarray  # [boxes]
    tokens: np.ndarray  # [tokens, 3] box, pathway, token of the pathway in this frame: equal boxes come once
    cost: float


@kept_with_plan
def project_order(plan: Plan, size: int) -> ProjectOrder:
    """The order of a plan in tiles of `size` patches; ValueError if a bin spans several frames."""
    readers, tokens, kept_frames = _readers(plan)
    kinds = [frozenset(path for path, _ in frame) for frame in readers]
    by_unit = {unit: {kind: _order(plan, kind, unit) for kind in set(kinds) if kind} for unit in _UNITS}
    unit = min(by_unit, key=lambda unit: sum(by_unit[unit][kind].cost for kind in kinds if kind))
    return _lay_out(plan, size, unit, readers, [by_unit[unit].get(kind) for kind in kinds], tokens, kept_frames)


def _readers(plan: Plan) -> tuple[list[list[tuple[int, int | None]]], int, tuple[int, ...]]:
    """For each frame, the (pathway, first row) that read it, a maximum's without a row; the rows; frames of maxima."""
    readers: list[list[tuple[int, int | None]]] = [[] for _ in range(sum(plan.lengths))]
    row, kept = 0, set()
    for video in range(len(plan.lengths)):
        for index, path in enumerate(plan.pathways):
            for start, stop in path.frames[video]:
                if stop - start != 1:
                    raise ValueError(f"pathway {path.pathway.name} pools several frames at a time")
                mean = path.reduce == "mean"
                readers[start].append((index, row if mean else None))
                if mean:
                    row += path.tokens_per_frame
                else:
                    kept.add(start)
    return readers, row, tuple(sorted(kept))


def _boxes(plan: Plan, kind: frozenset[int]) -> tuple[dict[tuple[int, ...], int], list[tuple[int, int, int]]]:
    """The distinct boxes of the mean pathways, as tuples of patches, and which tokens are their means."""
    boxes: dict[tuple[int, ...], int] = {}
    tokens = []
    for index in sorted(kind):
        path = plan.pathways[index]
        if path.reduce == "mean":
            places = [(rows, cols) for rows in path.rows for cols in path.cols]
            for token, (rows, cols) in enumerate(places):
                box = tuple(row * path.shape[1] + col for row in range(*rows) for col in range(*cols))
                tokens.append((boxes.setdefault(box, len(boxes)), index, token))
    return boxes, tokens


def _order(plan: Plan, kind: frozenset[int], unit: int) -> _FrameOrder:
    boxes, tokens = _boxes(plan, kind)
    small_at = defaultdict(list)
    for box in boxes:
        if len(box) <= unit:
            small_at[box[0]].append(box)
    units = []  # (patches, small box, large box)
    placed: set[tuple[int, ...]] = set()
    for box, number in boxes.items():
        if len(box) > unit:
            left, nested = set(box), []
            for small in chain.from_iterable(small_at[patch] for patch in box):
                if len(small) == unit and small not in placed and left.issuperset(small):
                    nested.append((small, boxes[small], number))
                    left.difference_update(small)
            placed.update(small for small, _, _ in nested)
            units += nested
            units += [(part, -1, number) for part in _cut([patch for patch in box if patch in left], unit)]
    units += [(box, number, -1) for box, number in boxes.items() if len(box) <= unit and box not in placed]
    missing: list[tuple[int, ...]] = []
    keeps = any(plan.pathways[index].reduce == "max" for index in kind)
    if keeps:
        covered = set().union(*boxes)
        missing = _cut([patch for patch in range(plan.grid[0] * plan.grid[1]) if patch not in covered], unit)
    units += [(part, -1, -1) for part in missing]
    filled = [(*part, *[part[-1]] * (unit - len(part))) for part, _, _ in units]
    real = [step < len(part) or small == large == -1 for part, small, large in units for step in range(unit)]
    patch = np.array(filled, np.int32).reshape(-1)
    keep = np.zeros(len(patch), bool)
    if keeps:
        keep[np.unique(patch, return_index=True)[1]] = True
    segments = sum(len(box) > unit for box in boxes)
    # In rows of the product: a segment costs about four of them, and two instructions for each unit of its tile.
    return _FrameOrder(
        patch, np.array(real, bool), keep,
        np.array([small for _, small, _ in units], np.int32), np.array([large for _, _, large in units], np.int32),
        np.array([len(box) for box in boxes], np.int32), np.array(tokens, np.int32).reshape(-1, 3),
        len(patch) + segments * (4 + 8 / unit) if segments == 0 or unit > 1 else math.inf,
    )  # fmt: skip


def _cut(patches: list[int], unit: int) -> list[tuple[int, ...]]:
    return [tuple(patches[start : start + unit]) for start in range(0, len(patches), unit)]


def _lay_out(
    plan: Plan,
    size: int,
    unit: int,
    readers: list[list[tuple[int, int | None]]],
    orders: list[_FrameOrder | None],
    tokens: int,
    kept_frames: tuple[int, ...],
) -> ProjectOrder:
    columns, boxes, patches = defaultdict(list), 0, plan.grid[0] * plan.grid[1]
    kept_at = {frame: place * patches for place, frame in enumerate(kept_frames)}
    for frame, order in enumerate(orders):
        if order is None:
            continue
        columns["frame"].append(np.where(order.real, frame, ~frame))
        columns["patch"].append(order.patch)
        columns["kept"].append(np.where(order.keep, kept_at.get(frame, 0) + order.patch, -1))
        columns["small"].append(np.where(order.small >= 0, order.small + boxes, -1))
        columns["large"].append(np.where(order.large >= 0, order.large + boxes, -1))
        columns["sizes"].append(order.sizes)
        for path, first in readers[frame]:
            box, _, token = order.tokens[order.tokens[:, 1] == path].T
            columns["row"].append(token if first is None else token + first)
            columns["box"].append(box + boxes)
        boxes += len(order.sizes)
    frame, patch, kept, small, large, sizes, row, box = (
        np.concatenate(columns[name])
        for name in ("frame", "patch", "kept", "small", "large", "sizes", "row", "box")
    )  # fmt: skip
    tiles, units = -(-len(frame) // size), size // unit
    frame, patch, kept = _fill(frame, tiles * size, 0), _fill(patch, tiles * size, 0), _fill(kept, tiles * size, -1)
    small, large = _fill(small, tiles * units, -1), _fill(large, tiles * units, -1)
    owner = np.full(boxes, -1)  # the first token that is the box's mean: others copy it
    owner[box[::-1]] = row[::-1]

    at = np.arange(tiles * units)
    starts = np.flatnonzero((at % units == 0) | (large != np.roll(large, 1)))
    stops = np.append(starts[1:], tiles * units)
    starts, stops = starts[large[starts] >= 0], stops[large[starts] >= 0]
    of = large[starts]
    parts = np.bincount(of, minlength=boxes)
    shared = parts[of] > 1
    to = np.where(shared, tokens - 1 + np.cumsum(shared), owner[of])
    first_part = np.full(boxes, -1)
    first_part[of[::-1]] = to[::-1]
    segments = np.stack([starts % units, (stops - 1) % units + 1, to, np.where(shared, 1, sizes[of])], 1)
    first_segment = np.searchsorted(starts, np.arange(tiles + 1) * units)
    any_kept, any_small = (kept.reshape(tiles, size) >= 0).any(1), (small.reshape(tiles, units) >= 0).any(1)
    is_shared, is_copy = parts[box] > 1, (parts[box] <= 1) & (row != owner[box])
    sums = np.concatenate([
        np.stack([row, first_part[box], parts[box], sizes[box]], 1)[is_shared],
        np.stack([row, owner[box], np.ones_like(row), np.ones_like(row)], 1)[is_copy],
    ])  # fmt: skip
    has_small = bool(any_small.any())
    sections = [
        _to_slots(frame, size, unit), _to_slots(patch, size, unit),
        _to_slots(kept, size, unit) if kept_frames else kept[:0],
        np.stack([first_segment[:-1], first_segment[1:], any_kept, any_small], 1),
        segments,
        np.append(owner, -1)[small][: None if has_small else 0],  # -1, no box, is the last
        np.append(sizes, 1)[small][: None if has_small else 0],
        sums,
    ]  # fmt: skip
    begins = np.cumsum([len(sections), *(-(-section.size // 4) * 4 for section in sections)])
    table = np.zeros(begins[-1], np.int32)
    table[: len(sections)] = begins[:-1]
    for begin, section in zip(begins, sections):
        table[begin : begin + section.size] = section.reshape(-1)
    return ProjectOrder(
        torch.from_numpy(table), tiles, unit, tokens, int(shared.sum()), kept_frames, has_small,
        bool((frame < 0).any()), len(sums), int(begins[-2]),
    )  # fmt: skip


def _fill(values: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), value, values.dtype)])


def _to_slots(values: np.ndarray, size: int, unit: int) -> np.ndarray:
    """From the order to a tile's slots: the four of a unit are two neighbours in either half (`_add_units`)."""
    if unit < 4:
        return values
    return values.reshape(-1, size // 4, 2, 2).swapaxes(1, 2)

"""The int32 table of a plan, which kernels read, and its format; csrc/include/sfllava/plan.h explains the fields."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BackendError
from ...layouts.pathways import Range
from ...layouts.plan import Item, PathwayTables, Plan, kept_with_plan

VERSION = 3
HEADER = ("version", "patches", "frames", "tokens", "pathways", "groups", "items", "readers")
PATHWAY = (
    "first patch", "height", "width", "reduce", "rows", "first row bin", "cols", "first column bin", "first row cover",
    "first column cover", "pitch",
)  # fmt: skip
ITEM = Item._fields
REDUCE = {"max": 0, "mean": 1, "linear": 2}


class Sections(NamedTuple):
    """The first number of each section of a table, and the number of groups."""

    groups: int
    groups_at: int
    items_at: int
    frames_at: int
    readers_at: int
    bins_at: int


@kept_with_plan
def plan_table(plan: Plan) -> Tensor:
    """The table of `plan`, int32 on the CPU, cached."""
    items = sorted(plan.items, key=lambda item: (item.frame_begin, item.frame_end, item.pathway))
    groups = [i for i, item in enumerate(items) if i == 0 or items[i - 1][1:3] != item[1:3]]
    readers = _readers(items, sum(plan.lengths))
    firsts = accumulate(map(len, readers), initial=0)
    bins: list[Range] = []
    pathways = []
    for path in plan.pathways:
        pathways.append(_pathway(path, first_bin=len(bins)))
        bins += [*path.rows, *path.cols, *_covers(path.rows, path.shape[0]), *_covers(path.cols, path.shape[1])]
    header = [
        VERSION, plan.patches, len(readers), plan.offsets[-1],
        len(pathways), len(groups), len(items), sum(map(len, readers)),
    ]  # fmt: skip
    groups.append(len(items))
    numbers = chain(header, *pathways, groups, *items, firsts, *readers, *bins)
    return host_table([*numbers], torch.int32)


def find_sections(table: Tensor) -> Sections:
    """The sections of `plan_table`. BackendError for a table of another version."""
    version, _, frames, _, pathways, groups, items, readers = table[: len(HEADER)].tolist()
    if version != VERSION:
        raise BackendError(f"the plan's table is of version {version}, and the kernels read {VERSION}: make it anew")
    sizes = groups + 1, len(ITEM) * items, frames + 1, readers
    return Sections(groups, *accumulate(sizes, initial=len(HEADER) + len(PATHWAY) * pathways))


def host_table(numbers: Sequence, dtype: torch.dtype) -> Tensor:
    """A table on the CPU to be cached."""
    with _for_every_call():
        return torch.tensor(numbers, dtype=dtype, device="cpu")


def device_table(plan: Plan, device: torch.device) -> Tensor:
    """`plan_table(plan)` on `device`: see `on_device`."""
    return on_device(plan_table(plan), device)


def on_device(host_table: Tensor, device: torch.device) -> Tensor:
    """A table on `device`, uploaded by the first call and cached with the table.

    Its memory lives as long as queued work may read it; if a CUDA graph has captured it, as long as the process, because
    a graph can be replayed at any time. BackendError if the first call is inside a capture.
    """
    copies = vars(host_table).setdefault("copies", {})
    table, streams = copies.get(device) or copies.setdefault(device, _upload(host_table, device))
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if stream not in streams:
            table.record_stream(torch.cuda.current_stream(device))
            streams.add(stream)
        if torch.cuda.is_current_stream_capturing():
            _in_graphs.add(table)
    return table


_in_graphs: set[Tensor] = set()


def _upload(host_table: Tensor, device: torch.device) -> tuple[Tensor, set[int]]:
    """The table, and the streams that have read it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError("a CUDA graph cannot capture the first call of its kind: make it once before the capture")
    # In a thread of its own: if torch.compile is about to record a CUDA graph, what this thread allocates comes from the
    # graph's pool, which reuses the memory.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(host_table.to, device).result(), set()


@contextmanager
def _for_every_call() -> Iterator[None]:
    """For tensors that later calls use: those made in inference mode or under torch.func could not be used outside."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def _pathway(path: PathwayTables, first_bin: int) -> list[int]:
    rows, cols = len(path.rows), len(path.cols)
    cover = first_bin + rows + cols
    where = [first_bin, cols, first_bin + rows, cover, cover + path.shape[0]]
    return [path.first_patch, *path.shape, REDUCE[path.reduce], rows, *where, path.pitch]


def _covers(bins: Sequence[Range], length: int) -> Iterator[Range]:
    """The bins that contain each of `length` rows or columns: a range, because starts and stops ascend."""
    starts, stops = zip(*bins)
    for place in range(length):
        first = bisect_right(stops, place)
        yield first, max(first, bisect_right(starts, place))


def _readers(items: Sequence[Item], frames: int) -> list[list[int]]:
    """The items that read each frame, in the order of their tokens."""
    readers: list[list[int]] = [[] for _ in range(frames)]
    for index in sorted(range(len(items)), key=lambda index: items[index].first_token):
        for frame in range(items[index].frame_begin, items[index].frame_end):
            readers[frame].append(index)
    return readers

"""A layout applied to videos of given lengths: every bin as a range, and the row of every token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import groupby
from math import prod
from threading import Lock
from typing import Any, NamedTuple, get_args

from .pathways import Pathway, Place, Range, Separator


@dataclass(frozen=True)
class PathwayTables:
    """The bins of a pathway in one plan.

    Attributes:
        pathway: The pathway.
        shape: (height, width) that it cuts.
        frames: The frame bins of each video, as ranges of the packed frames.
        rows: The row bins.
        cols: The column bins.
        first_patch: Patch at which the grid begins: 1 after a class token.
        separators: Number of separators after each row of tokens.
    """

    pathway: Pathway
    shape: tuple[int, int]
    frames: tuple[tuple[Range, ...], ...]
    rows: tuple[Range, ...]
    cols: tuple[Range, ...]
    first_patch: int = 0
    separators: int = 0

    @property
    def reduce(self) -> str:
        """The reduction that kernels compute: max, mean or linear."""
        return "linear" if self.pathway.is_linear else self.pathway.reduce

    @property
    def tokens_per_frame(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def pitch(self) -> int:
        """Number of output rows from one row of a frame's tokens to the next."""
        return len(self.cols) + self.separators


class Item(NamedTuple):
    """One frame bin of a pathway, and the output row of its first token."""

    pathway: int
    frame_begin: int
    frame_end: int
    first_token: int


class _Rows(NamedTuple):
    """The contents of the output's rows."""

    items: list[Item]
    zeros: list[int]
    separators: list[tuple[int, int]]  # row, number of the separator
    offsets: tuple[int, ...]


class ByteCache:
    """A thread-safe FIFO cache that is limited to `most` bytes, but always keeps the newest value."""

    def __init__(self, most: int) -> None:
        self.most, self.nbytes = most, 0
        self._values: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}
        self._lock = Lock()
        # The dict's own method, not one in Python around it: every call of the op waits for it.
        self.find = self._values.get

    def __len__(self) -> int:
        return len(self._values)

    def keep(self, key: Hashable, value: Any, nbytes: int) -> Any:
        """Add a value of `nbytes` bytes, and return it."""
        with self._lock:
            self._drop(key)
            self._values[key], self._sizes[key] = value, nbytes
            self.nbytes += nbytes
            while self.nbytes > self.most and len(self._sizes) > 1:
                self._drop(next(iter(self._sizes)))
        return value

    def clear(self) -> None:
        with self._lock:
            for key in list(self._sizes):
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self._values.pop(key, None)
        self.nbytes -= self._sizes.pop(key, 0)


def kept_with_plan(make: Callable) -> Callable:
    """Decorator that caches make(plan, *others) in the plan, so that results are freed with the plan."""

    @wraps(make)
    def find(plan: Plan, *others: Hashable) -> Any:
        results = plan.kept.get(make)
        if results is None:
            results = plan.kept[make] = {}
        try:
            return results[others]
        except KeyError:
            if len(results) >= _MOST_KEPT:
                results.clear()
            return results.setdefault(others, make(plan, *others))

    return find


_MOST_KEPT = 64  # results of one function for one plan


@dataclass(frozen=True, eq=False)  # hashed by identity: plans are cached, and comparing tables would be slow
class Plan:
    """A layout applied to videos of `lengths` frames on `grid`: the tables that kernels read.

    Attributes:
        lengths: Number of frames of each video.
        grid: (rows, columns) of a frame's patches.
        pathways: The bins of each pathway.
        interleaved: As in `Layout`.
        separators: As in `Layout`.
        kept: The results that `kept_with_plan` has cached.
    """

    lengths: tuple[int, ...]
    grid: tuple[int, int]
    pathways: tuple[PathwayTables, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    kept: dict[Callable, dict] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Approximate bytes of host memory of the plan and the results that are cached in it."""
        bins = sum(len(path.rows) + len(path.cols) + sum(path.shape) for path in self.pathways)
        reads = sum(item.frame_end - item.frame_begin for item in self.items)
        rows = len(self.separator_rows) + len(self.zeros)
        return 4096 + 700 * len(self.items) + 150 * (rows + bins) + 100 * sum(self.lengths) + 8 * reads

    @property
    def patches(self) -> int:
        """Number of patches of a frame, including the class token if it is read."""
        return prod(self.grid) + any(path.pathway.class_token for path in self.pathways)

    @property
    def items(self) -> list[Item]:
        """Frame bins, in the order of their tokens."""
        return self._rows.items

    @property
    def zeros(self) -> list[int]:
        """Output rows that are zero."""
        return self._rows.zeros

    @property
    def separator_rows(self) -> list[tuple[int, int]]:
        """(output row, index in `separators`) of every separator."""
        return self._rows.separators

    @property
    def offsets(self) -> tuple[int, ...]:
        """Output row at which each video's tokens begin, then the number of rows: [videos + 1]."""
        return self._rows.offsets

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Number of tokens by name of pathway and separator, and "total". Zero tokens of `pad` are included."""
        counts = {
            path.pathway.name: path.tokens_per_frame * sum(max(len(bins), path.pathway.pad) for bins in path.frames)
            for path in self.pathways
        }
        for _, which in self.separator_rows:
            name = self.separators[which].name
            counts[name] = counts.get(name, 0) + 1
        if counts.keys() <= {"slow", "fast"}:
            counts = {"slow": 0, "fast": 0} | counts
        return counts | {"total": self.offsets[-1]}

    @cached_property
    def slow_frames(self) -> list[int]:
        """Packed frames that the pathway "slow" reads; empty without one."""
        return [start for p in self.pathways if p.pathway.name == "slow" for v in p.frames for start, _ in v]

    @cached_property
    def _rows(self) -> _Rows:
        items: list[Item] = []
        zeros: list[int] = []
        separators: list[tuple[int, int]] = []
        at, offsets = 0, [0]
        at_place = {place: [k for k, s in enumerate(self.separators) if s.where == place] for place in get_args(Place)}
        for video in range(len(self.lengths)):
            blocks = list(self._blocks(video))
            for number, (bins, lacking) in enumerate(blocks):
                for index, (start, stop) in bins:
                    path = self.pathways[index]
                    items.append(Item(index, start, stop, at))
                    for _ in path.rows:
                        at += len(path.cols)
                        separators += enumerate(at_place["row"], at)
                        at += path.separators
                between = at_place["between"] if number < len(blocks) - 1 else []
                for which in (*at_place["frame"], *between) if bins else ():
                    separators.append((at, which))
                    at += 1
                zeros += range(at, at + lacking)
                at += lacking
            separators += enumerate(at_place["end"], at)
            at += len(at_place["end"])
            offsets.append(at)
        return _Rows(items, zeros, separators, tuple(offsets))

    def _blocks(self, video: int) -> Iterator[tuple[list[tuple[int, Range]], int]]:
        """Groups of frame bins, as (pathway, range), whose tokens are contiguous, and the zeros after each group."""
        bins = [[(index, frames) for frames in path.frames[video]] for index, path in enumerate(self.pathways)]
        if self.interleaved:
            by_frame = sorted((bin for path in bins for bin in path), key=lambda bin: bin[1])
            for _, block in groupby(by_frame, key=lambda bin: bin[1]):
                yield list(block), 0
            return
        for path, of_path in zip(self.pathways, bins):
            for bin in of_path:
                yield [bin], 0
            if lacking := max(0, path.pathway.pad - len(of_path)) * path.tokens_per_frame:
                yield [], lacking

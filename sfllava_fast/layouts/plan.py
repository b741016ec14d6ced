"""What a layout does to given videos: every bin as a range, and the row of every token."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import groupby
from math import prod
from threading import Lock
from typing import Any, NamedTuple

from .pathways import Pathway, Range, Separator


@dataclass(frozen=True)
class PathwayTables:
    """A pathway cut for one plan: bins as ranges; frame bins of all videos, numbered in the packed frames.

    shape: the grid that it cuts, which begins at patch `first_patch`. separators: that stand behind each row of tokens.
    """

    pathway: Pathway
    shape: tuple[int, int]
    frames: tuple[tuple[Range, ...], ...]  # by video
    rows: tuple[Range, ...]
    cols: tuple[Range, ...]
    first_patch: int = 0
    separators: int = 0

    @property
    def reduce(self) -> str:
        """max, mean or linear."""
        return "linear" if self.pathway.is_linear else self.pathway.reduce

    @property
    def tokens_per_frame(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def pitch(self) -> int:
        """Rows of the output from one row of a frame's tokens to the next."""
        return len(self.cols) + self.separators


class Item(NamedTuple):
    """One frame bin of a pathway, and where its tokens begin."""

    pathway: int
    frame_begin: int
    frame_end: int
    first_token: int


class _Rows(NamedTuple):
    """What stands in which rows of the output."""

    items: list[Item]
    zeros: list[int]
    separators: list[tuple[int, int]]  # row, which separator
    offsets: tuple[int, ...]


class ByteCache:
    """Values by key. The oldest are dropped while all take more than `most` bytes; the newest is always kept."""

    def __init__(self, most: int) -> None:
        self.most, self.nbytes = most, 0
        self._values: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}
        self._lock = Lock()
        self.find = self._values.get  # of a key its value, or None; every call of the op waits for it

    def __len__(self) -> int:
        return len(self._values)

    def keep(self, key: Hashable, value: Any, nbytes: int) -> Any:
        """Keeps a value that takes so many bytes, and returns it."""
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
    """Caches make(plan, *others) for as long as the plan lives, so that it is dropped with the plan."""

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


_MOST_KEPT = 64  # results of one function of one plan


@dataclass(frozen=True, eq=False)  # one plan per (layout, frames, grid): identity is equality, and hashing is free
class Plan:
    """What a layout does to videos of `lengths` frames on `grid`: the tables that kernels read.

    kept: what `kept_with_plan` has cached.
    """

    lengths: tuple[int, ...]
    grid: tuple[int, int]
    pathways: tuple[PathwayTables, ...]
    interleaved: bool = False
    separators: tuple[Separator, ...] = ()
    kept: dict[Callable, dict] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """About how many bytes of the host's memory it takes, with all that is kept with it."""
        bins = sum(len(path.rows) + len(path.cols) + sum(path.shape) for path in self.pathways)
        reads = sum(item.frame_end - item.frame_begin for item in self.items)
        rows = len(self.separator_rows) + len(self.zeros)
        return 4096 + 700 * len(self.items) + 150 * (rows + bins) + 100 * sum(self.lengths) + 8 * reads

    @property
    def patches(self) -> int:
        """Patches of a frame, the class token among them where it is read."""
        return prod(self.grid) + any(path.pathway.class_token for path in self.pathways)

    @property
    def items(self) -> list[Item]:
        """The frame bins, in the order of their tokens."""
        return self._rows.items

    @property
    def zeros(self) -> list[int]:
        """Rows of the output that are zero."""
        return self._rows.zeros

    @property
    def separator_rows(self) -> list[tuple[int, int]]:
        """(row of the output, which separator) of every separator."""
        return self._rows.separators

    @property
    def offsets(self) -> tuple[int, ...]:
        """Row at which each video's tokens begin, and the number of rows: [videos + 1]."""
        return self._rows.offsets

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens by pathway and separator, and their total; a padded pathway's with its zeros."""
        counts = {
            path.pathway.name: path.tokens_per_frame * sum(max(len(bins), path.pathway.pad) for bins in path.frames)
            for path in self.pathways
        }
        for _, which in self.separator_rows:
            name = self.separators[which].name
            counts[name] = counts.get(name, 0) + 1
        either = {"slow": 0, "fast": 0} if set(counts) <= {"slow", "fast"} else {}
        return either | counts | {"total": self.offsets[-1]}

    @cached_property
    def slow_frames(self) -> list[int]:
        """Frames of the slow pathway, numbered in the packed frames; empty without one."""
        return [start for p in self.pathways if p.pathway.name == "slow" for v in p.frames for start, _ in v]

    @cached_property
    def _rows(self) -> _Rows:
        at, items, zeros, separators, offsets = 0, [], [], [], [0]
        behind = {where: [k for k, s in enumerate(self.separators) if s.where == where] for where in _PLACES}
        for video in range(len(self.lengths)):
            blocks = list(self._blocks(video))
            for number, (bins, lacking) in enumerate(blocks):
                for index, (start, stop) in bins:
                    path = self.pathways[index]
                    items.append(Item(index, start, stop, at))
                    for _ in path.rows:
                        at += len(path.cols)
                        separators += enumerate(behind["row"], at)
                        at += path.separators
                last = behind["between"] if number < len(blocks) - 1 else []
                for which in (*behind["frame"], *last) if bins else ():
                    separators.append((at, which))
                    at += 1
                zeros += range(at, at + lacking)
                at += lacking
            separators += enumerate(behind["end"], at)
            at += len(behind["end"])
            offsets.append(at)
        return _Rows(items, zeros, separators, tuple(offsets))

    def _blocks(self, video: int) -> Iterator[tuple[list[tuple[int, Range]], int]]:
        """The frame bins, as (pathway, range), whose tokens adjoin, and how many zeros stand behind them."""
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


_PLACES = ("row", "frame", "between", "end")

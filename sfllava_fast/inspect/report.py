"""The content of a layout's picture: sampled frames, the pathways that use them, examples, and the token budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import InputError
from ..layouts.layout import Layout
from ..layouts.pathways import Range
from ..layouts.plan import PathwayTables, Plan
from ..layouts.presets import DEFAULT_GRID, choose_layout, find_preset
from ..layouts.sampling import sample_frames
from ..ops.backends.reference import aggregate
from ..reduction.pruning import Pruning, places
from ..terminal import one_line
from ..video import Video
from ..video.canvas import CanvasVideo

# Lightness falls from one to the next, so that they can also be told apart in grey.
COLOURS = ("#e8590c", "#1562ab", "#4b1d6b", "#12908e", "#a61e4d")
SEPARATORS, ZEROS = ("#7a8394", "#a9b0bc"), "#e4e7ec"
PALE = 245  # grey of patches that no token covers
_DIM = 0.22  # contrast of a picture where its token is pruned
_SIDE = 8  # pixels of a patch's side in `pixel_tokens`
_THUMB_PIXELS = 240  # longer edge
_EXAMPLE_PIXELS = 720
_CHUNK = 16  # frames decoded at a time: 64 frames of full HD would take 400 MB
_PLACES = {"row": "after each row", "frame": "after each frame", "between": "between frames", "end": "at the end"}

Box = tuple[int, int, int, int]  # top, bottom, left, right, in patches


@dataclass(frozen=True)
class Kept:
    """What pruning keeps of a pathway.

    Attributes:
        tokens: bool [bins, tokens per bin].
        tiles: The bins' pictures, uint8 [bins, h, w, 3], pale outside the kept tokens.
    """

    tokens: np.ndarray
    tiles: np.ndarray

    @property
    def text(self) -> str:
        return f"{self.tokens.sum():,} of {_count(self.tokens.size, 'token')} kept"

    def count(self, number: int) -> str:
        """Kept tokens of one bin, as text."""
        return f"{self.tokens[number].sum()} of {self.tokens.shape[1]}"


@dataclass(frozen=True)
class PathwayView:
    """A pathway: the sampled frames of each bin, and one bin as an example.

    Attributes:
        name: Of the pathway.
        colour: As "#rrggbb".
        reads: Which frames it uses, as text.
        bins: Ranges of sampled frames.
        example: The bin that is shown.
        picture: Its frame, or the mean of its frames, uint8 [h, w, 3].
        tokens: The patches of each token; empty for the class token.
        colours: Each token's mean colour on the grid of patches, uint8 [rows, columns, 3]; None for the class token.
        caption: How its tokens are made, as text.
        pruned: What pruning keeps; None without pruning.
    """

    name: str
    colour: str
    reads: str
    bins: list[Range]
    example: Range
    picture: np.ndarray
    tokens: list[list[Box]]
    colours: np.ndarray | None
    caption: str
    pruned: Kept | None = None

    @cached_property
    def alone(self) -> Counter[int]:
        """Frames that are bins of their own, and how often."""
        return Counter(start for start, stop in self.bins if stop == start + 1)

    @cached_property
    def lanes(self) -> list[list[Range]]:
        """The bins of several frames, in as few lanes as possible without overlaps."""
        lanes: list[list[Range]] = []
        for start, stop in dict.fromkeys(bin for bin in self.bins if bin[1] > bin[0] + 1):
            lane = next((lane for lane in lanes if lane[-1][1] <= start), None)
            if lane is None:
                lanes.append(lane := [])
            lane.append((start, stop))
        return lanes


class Share(NamedTuple):
    """A part of the token budget; `share` is of all tokens, `kept` the share of its own that pruning keeps."""

    label: str
    tokens: int
    share: float
    colour: str
    kept: float


@dataclass(frozen=True)
class LayoutReport:
    """Everything that the picture shows.

    Attributes:
        title, facts, layout, source, notes: Text.
        indices: Of the sampled frames, in the video.
        times: Of the sampled frames in seconds, if the video has time stamps.
        thumbs: The sampled frames, uint8 [n, h, w, 3].
        plan: The layout's, for these frames.
        pathways: In the order of the plan.
        stays: Which tokens pruning keeps, bool [total].
    """

    title: str
    facts: str
    layout: str
    source: str
    notes: str
    indices: list[int]
    times: list[float] | None
    thumbs: np.ndarray
    plan: Plan
    pathways: list[PathwayView]
    stays: np.ndarray

    @property
    def total(self) -> int:
        return self.plan.tokens["total"]

    @property
    def is_pruned(self) -> bool:
        return any(view.pruned for view in self.pathways)

    @property
    def budget(self) -> str:
        """Number of tokens, as text."""
        if self.is_pruned:
            return f"{self.stays.sum():,} of {self.total:,} video tokens"
        return f"{self.total:,} video tokens"

    @property
    def saving(self) -> str:
        """Tokens as a share of the patches, as text."""
        patches = sum(self.plan.lengths) * self.plan.grid[0] * self.plan.grid[1]
        pictures = "frame" if sum(self.plan.lengths) == len(self.indices) else "composed picture"
        share = self.stays.sum() / patches
        return f"{share:.1%} of the {patches:,} patches of {_count(sum(self.plan.lengths), pictures)}"

    def label(self, row: int) -> tuple[str, str]:
        """Number and time of a sampled frame, as text."""
        return f"#{self.indices[row]}", _clock(self.times[row]) if self.times else ""

    def name_bin(self, bin: Range) -> str:
        """The numbers of a bin's frames."""
        first, last = self.indices[bin[0]], self.indices[bin[1] - 1]
        return f"#{first}" if bin[1] == bin[0] + 1 else f"#{first} to #{last}"

    def name_example(self, view: PathwayView) -> str:
        """The frames of a pathway's example, as text."""
        start, stop = view.example
        if stop == start + 1:
            return "frame " + "  ".join(self.label(start)).rstrip()
        how = "mean of" if self.plan.lengths == (len(self.indices),) else "composed of"
        return f"{how} frames {self.name_bin(view.example)}"

    def rings(self, row: int) -> list[PathwayView]:
        """The pathways that outline a frame: of those with a bin of this frame alone, the ones that pick frames."""
        readers = [view for view in self.pathways if row in view.alone]
        return [view for view in readers if self.picks(view)] or readers

    def picks(self, view: PathwayView) -> bool:
        """Whether a pathway uses only some of the frames."""
        return len(view.alone) < len(self.indices)

    def repeats(self, row: int) -> str:
        """How often a frame is used, as text; empty for once."""
        times = max((view.alone[row] for view in self.pathways), default=0)
        return f" \u00d7{times}" if times > 1 else ""

    def is_read(self, row: int) -> bool:
        """Whether any pathway uses a frame."""
        return any(start <= row < stop for view in self.pathways for start, stop in view.bins)

    def shares(self) -> list[Share]:
        """The budget: pathways, separators, zeros. Their tokens add up to `total`."""
        parts = []
        for view, index in zip(self.pathways, places(self.plan)):
            parts.append((view.name, index.flatten().tolist(), view.colour))
        for number, separator in enumerate(self.plan.separators):
            rows = [row for row, which in self.plan.separator_rows if which == number]
            parts.append((separator.name, rows, SEPARATORS[number % len(SEPARATORS)]))
        parts.append(("zeros", self.plan.zeros, ZEROS))
        return [self._share(name, rows, colour) for name, rows, colour in parts if rows]

    def _share(self, name: str, rows: list[int], colour: str) -> Share:
        tokens, kept, share = len(rows), int(self.stays[rows].sum()), len(rows) / self.total
        count = f"{kept:,} of {tokens:,}" if self.is_pruned else f"{tokens:,}"
        return Share(f"{name} {count} ({_percent(share)})", tokens, share, colour, kept / tokens)


def gather(
    video: Video,
    layout: str | Layout,
    frames: int | None = None,
    grid: tuple[int, int] | None = None,
    kept: Sequence[int] | Pruning | None = None,
) -> LayoutReport:
    """Sample a video and collect what its picture shows.

    Args:
        video: The video.
        layout, frames, grid, kept: As in `render`.

    Raises:
        VideoError: A frame cannot be decoded.
        LayoutError: The layout does not fit the frames or the grid.
        InputError: `kept` are not positions of tokens.
    """
    parsed, own_frames = choose_layout(layout, None)
    grid, preset = grid or parsed.grid or DEFAULT_GRID, find_preset(parsed.name)
    indices = sample_frames(video.total, frames or own_frames)
    pictures: Video = video
    numbers, each = indices, 1
    if parsed.canvas:
        pictures, each = CanvasVideo(video, indices, *parsed.canvas), parsed.canvas[0] * parsed.canvas[1]
        numbers = list(range(pictures.total))
    plan = parsed.plan(frames=len(numbers), grid=grid)
    thumbs = np.concatenate([_shrink(part, _THUMB_PIXELS) for part in _in_chunks(video, indices)])
    height, width = video.size
    facts = [f"{len(indices)} of {video.total} frames", f"{width}\u00d7{height}"]
    if video.fps:
        facts.append(f"{video.fps:.4g} frames/s")
    facts.append(f"{grid[0]}\u00d7{grid[1]} patches a {'picture' if parsed.canvas else 'frame'}")
    notes = list(_notes(parsed, plan))
    if isinstance(kept, Pruning):
        notes.append(f"prune:{kept}, by the patches' pixels")
        kept = kept.kept(pixel_tokens(pictures, numbers, plan), plan).tolist()
    stays = _stays(kept, plan)
    small = thumbs
    if parsed.canvas and kept is not None:
        small = np.concatenate([_shrink(part, _THUMB_PIXELS) for part in _in_chunks(pictures, numbers)])
    views = []
    for tables, colour, index in zip(plan.pathways, _colours(plan), places(plan)):
        example = _example(tables, plan)
        picture = _mean(pictures, numbers[slice(*example)])
        tokens = [] if tables.pathway.class_token else token_boxes(tables, grid)
        bins = [_scale(bin, each, len(indices)) for bin in tables.frames[0]]
        views.append(
            PathwayView(
                name=tables.pathway.name,
                colour=colour,
                reads=_read_frames(bins, len(indices), "picture" if parsed.canvas else "bin"),
                bins=bins,
                example=_scale(example, each, len(indices)),
                picture=_shrink(picture, _EXAMPLE_PIXELS)[0],
                tokens=tokens,
                colours=_token_colours(picture, tokens, tables, grid) if tokens else None,
                caption=_describe(tables, plan, "picture" if parsed.canvas else "frame"),
                pruned=None if kept is None else _dim_pruned(tables, tokens, stays[index.numpy()], small, grid),
            )
        )
    return LayoutReport(
        title=one_line(video.path.name or str(video.path)),  # matplotlib refuses undecodable bytes of a name
        facts="  \u00b7  ".join(facts),
        layout=parsed.name or str(parsed),
        source=preset.source if preset else "",
        notes="  \u00b7  ".join(notes),
        indices=indices,
        times=video.times(indices),
        thumbs=thumbs,
        plan=plan,
        pathways=views,
        stays=stays,
    )


def pixel_tokens(video: Video, indices: list[int], plan: Plan) -> torch.Tensor:
    """Tokens pooled from pixels instead of features, so that pruning can be shown without a model.

    Args:
        video: The video.
        indices: Of the frames.
        plan: The layout's, for these frames.

    Returns:
        float32 [S, 3 * 8 * 8].
    """
    rows, columns = plan.grid
    parts = []
    for frames in _in_chunks(video, indices):
        small = F.interpolate(frames.permute(0, 3, 1, 2).float(), (rows * _SIDE, columns * _SIDE), mode="area")
        patches = F.unfold(small / 127.5 - 1, _SIDE, stride=_SIDE).transpose(1, 2)
        parts.append(torch.cat([patches.mean(1, keepdim=True), patches], dim=1)[:, -plan.patches :])
    return aggregate(torch.cat(parts), plan)


def _stays(kept: Sequence[int] | None, plan: Plan) -> np.ndarray:
    """Which of the plan's tokens are kept, bool [S]."""
    total = plan.tokens["total"]
    stays = np.full(total, kept is None)
    if kept is not None:
        positions = np.asarray(kept)
        if positions.ndim != 1 or not len(positions) or positions.min() < 0 or positions.max() >= total:
            raise InputError(f"kept must be positions among the {total} tokens that the layout makes here")
        stays[positions] = True
    return stays


def _dim_pruned(
    tables: PathwayTables, tokens: list[list[Box]], stays: np.ndarray, small: np.ndarray, grid: tuple[int, int]
) -> Kept:
    """A pathway's bins, pale outside the tokens that stay. stays: bool [bins, tokens]."""
    height, width = small.shape[1:3]
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    tiles = np.empty((len(stays), height, width, 3), np.uint8)
    tokens = tokens or [[(0, grid[0], 0, grid[1])]]  # a class token stands for the whole frame
    for tile, (start, stop), of_bin in zip(tiles, tables.frames[0], stays):
        lit = np.zeros(grid, bool)
        for boxes in (tokens[number] for number in np.flatnonzero(of_bin)):
            for top, bottom, begin, end in boxes:
                lit[top:bottom, begin:end] = True
        picture = small[start:stop].mean(0)
        tile[:] = np.where(lit[rows][:, columns, None], picture, _DIM * picture + (1 - _DIM) * PALE)
    return Kept(stays, tiles)


def _colours(plan: Plan) -> list[str]:
    """A colour for each pathway; slow and fast have the same ones in every layout."""
    names = [tables.pathway.name for tables in plan.pathways]
    first = 1 if names == ["fast"] else 0
    return [COLOURS[(first + i) % len(COLOURS)] for i in range(len(names))]


def _notes(layout: Layout, plan: Plan) -> Iterator[str]:
    """Properties of the layout that the frames and boxes do not show."""
    if layout.interleaved:
        yield "tokens of all pathways frame by frame"
    for separator in layout.separators:
        yield f"{separator.name} {_PLACES[separator.where]}"
    for path in layout.pathways:
        if path.pad:
            yield f"{path.name} padded with zeros to {path.pad} frames"
    if layout.canvas:
        yield "{} rows \u00d7 {} columns of frames composed into a picture".format(*layout.canvas)
    if layout.stage == "before":
        yield "pooled before the projector"


def _in_chunks(video: Video, indices: list[int]) -> Iterator[torch.Tensor]:
    for start in range(0, len(indices), _CHUNK):
        yield video.frames(indices[start : start + _CHUNK])


def _mean(video: Video, indices: list[int]) -> torch.Tensor:
    """The mean of some frames, uint8 [1, H, W, 3]."""
    total = torch.stack([part.sum(0, dtype=torch.int64) for part in _in_chunks(video, indices)]).sum(0)
    return (total / len(indices)).round().to(torch.uint8)[None]


def _scale(bin: Range, each: int, most: int) -> Range:
    """A bin of pictures of `each` frames as a bin of frames."""
    return bin[0] * each, min(bin[1] * each, most)


def _example(tables: PathwayTables, plan: Plan) -> Range:
    """The middle one of a pathway's frame bins, preferably of those that no other pathway has."""
    bins = dict.fromkeys(tables.frames[0])
    others = {bin for path in plan.pathways if path is not tables for bin in path.frames[0]}
    own = [bin for bin in bins if bin not in others] or list(bins)
    return own[len(own) // 2] if own else (0, 1)


def token_boxes(tables: PathwayTables, grid: tuple[int, int]) -> list[list[Box]]:
    """The patches of each token of one frame: one box, or one in each row if a 1-D pool crosses rows."""
    width = grid[1]
    if tables.shape == tuple(grid):
        return [[(*rows, *cols)] for rows in tables.rows for cols in tables.cols]
    return [_fold(start, stop, width) for start, stop in tables.cols]


def _fold(start: int, stop: int, width: int) -> list[Box]:
    """A run of flattened patches as boxes on the grid."""
    rows = range(start // width, (stop - 1) // width + 1)
    return [(y, y + 1, max(start - y * width, 0), min(stop - y * width, width)) for y in rows]


def _token_colours(
    frame: torch.Tensor, tokens: list[list[Box]], tables: PathwayTables, grid: tuple[int, int]
) -> np.ndarray:
    """Mean colour of each token on the grid of patches; patches that no token covers stay pale."""
    patches = F.adaptive_avg_pool2d(frame.permute(0, 3, 1, 2).float(), grid).flatten(2).transpose(1, 2)
    # The pathway's own pooling of one frame, as a mean; the weights of linear bins are included.
    mean = replace(tables.pathway, reduce="mean")
    one = replace(tables, pathway=mean, frames=(((0, 1),),), first_patch=0, separators=0)
    colours = aggregate(patches, Plan((1,), grid, (one,))).numpy()
    total, count = np.zeros((*grid, 3)), np.zeros((*grid, 1))
    for boxes, colour in zip(tokens, colours):
        for top, bottom, left, right in boxes:
            total[top:bottom, left:right] += colour
            count[top:bottom, left:right] += 1
    return np.where(count > 0, total / np.maximum(count, 1), PALE).round().astype(np.uint8)


def _read_frames(bins: list[Range], frames: int, what: str) -> str:
    """Which frames a pathway uses, for the legend."""
    sizes, read = {stop - start for start, stop in bins}, {row for bin in bins for row in range(*bin)}
    if not bins:
        return "no frame"
    if sizes == {1}:
        return "every frame" if len(read) == frames else f"{len(read)} of {frames} frames"
    if sizes == {frames} and what == "bin":
        return "all frames together"
    return f"{_count(len(bins), what)} of {_span(sizes)} frames"


def _describe(tables: PathwayTables, plan: Plan, alone: str) -> str:
    """How tokens are made. alone: the name of a bin of one frame."""
    each, bins = tables.tokens_per_frame, tables.frames[0]
    sizes = {stop - start for start, stop in bins} or {1}
    what, over = (alone, "") if sizes == {1} else ("bin", f" of {_span(sizes)} {alone}s")
    if tables.pathway.class_token:
        how = "the class token"
    elif tables.reduce == "linear":
        how = "between the patches shown"
    elif each != plan.grid[0] * plan.grid[1]:
        how = f"the {tables.reduce} of each box"
    else:
        how = "every patch" if sizes == {1} else f"the {tables.reduce} of each patch"
    is_grid = tables.shape == plan.grid and not tables.pathway.class_token
    shape = f"{len(tables.rows)}\u00d7{len(tables.cols)}, " if is_grid else ""
    return f"{_count(len(bins), what)}{over} \u00d7 {_count(each, 'token')} ({shape}{how})"


def _span(sizes: set[int]) -> str:
    return str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


def _shrink(frames: torch.Tensor, longer: int) -> np.ndarray:
    """uint8 [n, H, W, 3] with the longer edge at most `longer`."""
    height, width = frames.shape[1:3]
    scale = min(1.0, longer / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).numpy()


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _percent(share: float) -> str:
    return "<1%" if share < 0.005 else f"{share:.0%}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}" if minutes else f"{rest:.2f} s"

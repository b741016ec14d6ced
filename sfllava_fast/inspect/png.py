"""The report as a PNG, drawn with matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError
from .report import PALE, ZEROS, LayoutReport, PathwayView

INK, MUTED, RULE, PAPER = "#1f2430", "#6b7280", "#d5d9e0", "#ffffff"
_WIDTH, _MARGIN, _GAP = 14.0, 0.45, 0.1
_INNER = _WIDTH - 2 * _MARGIN
_THICK, _THIN = 3.2, 1.2  # outlines of a pathway that uses some frames, and of one that uses all
_LANE = 0.11
_SHORT = 60  # characters of a layout that is written beside the title
_PAIR_GAP = 0.45  # between two examples


def write(report: LayoutReport, path: Path) -> None:
    """Draws the report to a file."""
    sheet = _Sheet(_WIDTH)
    below = _draw_head(sheet, report)
    below = _draw_strip(sheet, report, below + 0.3)
    draw = _draw_kept if report.is_pruned else _draw_examples
    below = draw(sheet, report, below + 0.3)
    below = _draw_budget(sheet, report, below + 0.2)
    sheet.save(path, below + 0.3)


class _Sheet:
    """A matplotlib figure addressed in inches from its top left corner."""

    def __init__(self, width: float) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BackendError("a PNG needs matplotlib: pip install matplotlib, or write .html") from error
        self.width = width
        self.figure = Figure((width, width), facecolor=PAPER)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def text(
        self, x: float, y: float, text: str, size: float = 10, colour: str = INK, within: float = _INNER, **style: Any
    ) -> float:
        """Writes text, smaller if it would be wider than `within`; returns its width."""
        style = {"ha": "left", "va": "center", "parse_math": False, **style}
        drawn = self.axes.text(x, y, text, fontsize=size, color=colour, **style)
        width = self._width(drawn)
        if width > within:
            drawn.set_fontsize(size * within / width)
        return min(width, within)

    def measure(self, text: str, size: float) -> float:
        """The width of a text."""
        drawn = self.axes.text(0, 0, text, fontsize=size, parse_math=False)
        width = self._width(drawn)
        drawn.remove()
        return width

    def _width(self, drawn: Any) -> float:
        return drawn.get_window_extent(self.canvas.get_renderer()).width / self.figure.dpi

    def image(self, x: float, y: float, width: float, height: float, pixels: np.ndarray, smooth: bool = True) -> None:
        self.axes.imshow(
            pixels,
            extent=(x, x + width, y + height, y),
            interpolation="antialiased" if smooth else "nearest",
            aspect="auto",
        )

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, **({"fill": False} | style)))

    def fill(self, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1.0) -> None:
        """A filled box; zeros are hatched."""
        style: dict[str, Any] = {"hatch": "////", "edgecolor": MUTED} if colour == ZEROS else {"alpha": alpha}
        self.box(x, y, width, height, facecolor=colour, fill=True, linewidth=0, **style)

    def boxes(self, outlines: list[tuple[float, float, float, float]], colour: str, line: float) -> None:
        from matplotlib.collections import PolyCollection

        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in outlines]
        self.axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=colour, linewidths=line))

    def save(self, path: Path, height: float) -> None:
        self.figure.set_size_inches(self.width, height)
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(height, 0)
        self.figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


class _Flow:
    """Swatches with text, one after the other, in as many lines as needed."""

    def __init__(self, sheet: _Sheet, y: float) -> None:
        self.sheet, self.x, self.y = sheet, _MARGIN, y

    def add(self, text: str) -> tuple[float, float]:
        """Writes the text and returns the left edge and the middle of its swatch."""
        width = self.sheet.measure(text, 10)
        if self.x > _MARGIN and self.x + 0.3 + width > _WIDTH - _MARGIN:
            self.x, self.y = _MARGIN, self.y + 0.26
        at = self.x
        self.sheet.text(at + 0.3, self.y, text, 10)
        self.x += 0.3 + width + 0.4
        return at, self.y


def _draw_head(sheet: _Sheet, report: LayoutReport) -> float:
    title = sheet.text(_MARGIN, 0.42, report.title, 19, weight="bold", within=0.6 * _INNER)
    sheet.text(_MARGIN, 0.76, report.facts, 10.5, MUTED, within=0.62 * _INNER)
    y = 0.76
    if len(report.layout) <= _SHORT:
        sheet.text(
            _WIDTH - _MARGIN, 0.42, report.layout, 10.5, MUTED, _INNER - title - 0.3, ha="right", family="monospace"
        )
        sheet.text(_WIDTH - _MARGIN, 0.76, report.source, 10.5, MUTED, 0.35 * _INNER, ha="right")
    else:
        y += 0.28
        sheet.text(_MARGIN, y, report.layout, 10.5, MUTED, family="monospace")
    if report.notes:
        y += 0.28
        sheet.text(_MARGIN, y, report.notes, 10.5, INK)
    flow = _Flow(sheet, y + 0.34)
    for view in report.pathways:
        x, y = flow.add(f"{view.name} pathway: {view.reads}")
        if view.lanes:
            sheet.fill(x, y - 0.035, 0.2, 0.07, view.colour)
        else:
            sheet.box(x, y - 0.075, 0.2, 0.15, edgecolor=view.colour, linewidth=_line(report, view))
    if not all(map(report.is_read, range(len(report.indices)))):
        x, y = flow.add("read by no pathway")
        sheet.box(x, y - 0.075, 0.2, 0.15, edgecolor=RULE, facecolor="#f0f1f4", fill=True)
    return flow.y


def _line(report: LayoutReport, view: PathwayView) -> float:
    return _THICK if report.picks(view) else _THIN


def _draw_strip(sheet: _Sheet, report: LayoutReport, y: float) -> float:
    count, shape = len(report.indices), report.thumbs.shape[1] / report.thumbs.shape[2]
    per_row, thumb = _tiling(count, shape)
    lanes = [(view, lane) for view in report.pathways for lane in view.lanes]
    line = thumb * shape + 0.36 + _LANE * len(lanes)
    for row in range(count):
        down, across = divmod(row, per_row)
        x, top = _MARGIN + across * (thumb + _GAP), y + down * line
        _draw_thumb(sheet, report, row, x, top, thumb, thumb * shape)
        is_last = across == per_row - 1 or row == count - 1
        for number, (view, lane) in enumerate(lanes):
            at = top + thumb * shape + 0.26 + number * _LANE
            for start, stop in lane:
                if start <= row < stop:
                    continues = row < stop - 1 and not is_last
                    sheet.fill(x, at, thumb + _GAP if continues else thumb, 0.065, view.colour)
    return y + math.ceil(count / per_row) * line


def _tiling(count: int, shape: float) -> tuple[int, float]:
    """Pictures per row, and the width of each. shape: height over width."""
    most = min(count, max(8, math.ceil(math.sqrt(2.6 * count * shape))))
    per_row = math.ceil(count / math.ceil(count / most))
    return per_row, min((_INNER - _GAP * (per_row - 1)) / per_row, 1.9 / max(shape, 0.75))


def _draw_thumb(sheet: _Sheet, report: LayoutReport, row: int, x: float, y: float, width: float, height: float) -> None:
    pixels, rings = report.thumbs[row], report.rings(row)
    if not report.is_read(row):
        pixels = (0.25 * pixels + 0.75 * PALE).astype(np.uint8)
    sheet.image(x, y, width, height, pixels)
    inset = 0.0
    for view in rings:
        sheet.box(
            x + inset,
            y + inset,
            width - 2 * inset,
            height - 2 * inset,
            edgecolor=view.colour,
            linewidth=_line(report, view) if len(rings) == 1 else 2.4,
        )
        inset += 0.035
    is_picked = bool(rings) and report.picks(rings[0])
    colour = rings[0].colour if is_picked else INK if report.is_read(row) else MUTED
    number, time = report.label(row)
    size = min(8.5, 5.6 * width + 1.6)
    weight = "bold" if is_picked else "normal"
    used = sheet.text(x, y + height + 0.14, number + report.repeats(row), size, colour, width, weight=weight)
    if width - used > 0.3:
        sheet.text(x + width, y + height + 0.14, time, size, MUTED, width - used - 0.05, ha="right")


def _draw_kept(sheet: _Sheet, report: LayoutReport, y: float) -> float:
    """Every bin of every pathway, pale outside the kept tokens."""
    for view in report.pathways:
        if view.pruned is None or not view.bins:
            continue
        tiles = view.pruned.tiles
        shape = tiles.shape[1] / tiles.shape[2]
        per_row, width = _tiling(len(tiles), shape)
        heading = sheet.text(_MARGIN, y, f"{view.name.capitalize()} pathway", 12.5, view.colour, weight="bold")
        sheet.text(_MARGIN + heading + 0.15, y, view.pruned.text, 9.5, MUTED)
        for number, bin in enumerate(view.bins):
            down, across = divmod(number, per_row)
            x, top = _MARGIN + across * (width + _GAP), y + 0.22 + down * (width * shape + 0.32)
            sheet.image(x, top, width, width * shape, tiles[number])
            sheet.box(x, top, width, width * shape, edgecolor=view.colour, linewidth=_THIN)
            size, under = min(8.5, 5.6 * width + 1.6), top + width * shape + 0.14
            used = sheet.text(x, under, report.name_bin(bin), size, INK, width)
            if width - used > 0.3:
                count = view.pruned.count(number)
                sheet.text(x + width, under, count, size, MUTED, width - used - 0.05, ha="right")
        y += 0.22 + math.ceil(len(tiles) / per_row) * (width * shape + 0.32) + 0.25
    return y


def _draw_examples(sheet: _Sheet, report: LayoutReport, y: float) -> float:
    views = report.pathways
    shape = views[0].picture.shape[0] / views[0].picture.shape[1]
    tile = min((_INNER - _PAIR_GAP - 0.3) / 4, (3.1 if len(views) > 1 else 4.5) / shape)
    line = tile * shape + 0.8
    for number, view in enumerate(views):
        down, across = divmod(number, 2)
        x = _MARGIN + across * (_INNER + _PAIR_GAP) / 2
        _draw_example(sheet, report, view, x, y + down * line, tile, tile * shape)
    return y + math.ceil(len(views) / 2) * line


def _draw_example(
    sheet: _Sheet, report: LayoutReport, view: PathwayView, x: float, y: float, width: float, height: float
) -> None:
    room = (_INNER - _PAIR_GAP) / 2
    heading = sheet.text(x, y, f"{view.name.capitalize()} pathway", 12.5, view.colour, room / 2, weight="bold")
    sheet.text(x + heading + 0.15, y, view.caption, 9.5, MUTED, room - heading - 0.15)
    top, right = y + 0.22, x + width + 0.15
    sheet.image(x, top, width, height, view.picture)
    for left in (x, right):
        sheet.box(left, top, width, height, edgecolor=view.colour, linewidth=1.6)
    sheet.text(x, top + height + 0.15, report.name_example(view), 8.5, MUTED, width)
    if view.colours is None:
        _draw_class_token(sheet, view, right, top, width, height)
        return
    sheet.image(right, top, width, height, view.colours, smooth=False)
    sheet.box(right, top, width, height, edgecolor=view.colour, linewidth=1.6)
    down, across = height / report.plan.grid[0], width / report.plan.grid[1]
    outlines = [
        (x + left * across, top + above * down, (stop - left) * across, (bottom - above) * down)
        for boxes in view.tokens
        for above, bottom, left, stop in boxes
    ]
    sheet.boxes(outlines, view.colour, 0.6 if len(outlines) > 100 else 1.4)
    sheet.text(right, top + height + 0.15, "each token's mean colour", 8.5, MUTED, width)


def _draw_class_token(sheet: _Sheet, view: PathwayView, x: float, y: float, width: float, height: float) -> None:
    side = 0.62
    sheet.fill(x + (width - side) / 2, y + (height - side) / 2, side, side, view.colour)
    middle, below = x + width / 2, y + (height + side) / 2 + 0.2
    sheet.text(middle, y + height / 2, "CLS", 12, PAPER, width, ha="center", weight="bold")
    sheet.text(middle, below, "the tower's own summary", 8.5, MUTED, width, ha="center")
    sheet.text(x, y + height + 0.15, "one token, made of no patch", 8.5, MUTED, width)


def _draw_budget(sheet: _Sheet, report: LayoutReport, y: float) -> float:
    total = sheet.text(_MARGIN, y, report.budget, 12.5, weight="bold")
    sheet.text(_MARGIN + total + 0.3, y, report.saving, 9.5, MUTED)
    x, outside = _MARGIN, []
    for share in report.shares():
        width = _INNER * share.share
        sheet.fill(x, y + 0.2, width, 0.36, share.colour, 0.25 if share.kept < 1 else 1.0)
        if share.kept < 1:
            sheet.fill(x, y + 0.2, width * share.kept, 0.36, share.colour)
            outside.append(share)
        elif share.colour != ZEROS and width > 0.085 * len(share.label) + 0.25:
            sheet.text(x + 0.12, y + 0.385, share.label, 10, PAPER, width - 0.2, weight="bold")
        else:
            outside.append(share)
        if x > _MARGIN:
            sheet.fill(x - 0.01, y + 0.2, 0.02, 0.36, PAPER)
        x += width
    flow = _Flow(sheet, y + 0.78)
    for share in outside:
        at, middle = flow.add(share.label)
        sheet.fill(at, middle - 0.075, 0.2, 0.15, share.colour)
    return flow.y if outside else y + 0.56

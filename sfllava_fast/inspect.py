"""A picture of what a layout takes from a video: sampled frames, what each pathway keeps, the token budget.

PNG with matplotlib, or one self-contained HTML page with the standard library alone.
"""

from __future__ import annotations

import base64
import html
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .config import SlowFastConfig, sample_frames
from .errors import BackendError, InputError
from .plan import PathwayTables, Plan
from .video import Video, open_video

INK, MUTED, RULE, PAPER = "#1f2430", "#6b7280", "#d5d9e0", "#ffffff"
COLOURS = {"slow": "#d9480f", "fast": "#1971c2"}
_THUMB_PIXELS = 240  # longer edge
_EXAMPLE_PIXELS = 720
_CHUNK = 16  # frames decoded at a time, so that 64 frames of full HD never lie in memory at once

Box = tuple[int, int, int, int]  # top, bottom, left, right, in patches


@dataclass(frozen=True)
class Example:
    """One frame of a pathway: the picture, the patches behind each token, and each token's mean colour."""

    name: str
    row: int
    picture: np.ndarray
    tokens: list[list[Box]]
    kept: np.ndarray
    caption: str


@dataclass(frozen=True)
class Report:
    """Everything that the picture shows."""

    title: str
    subtitle: str
    layout: str
    indices: list[int]
    times: list[float] | None
    thumbs: np.ndarray
    plan: Plan
    examples: list[Example]

    @property
    def slow(self) -> set[int]:
        return set(self.plan.slow_frames)

    @property
    def patches(self) -> int:
        return len(self.indices) * math.prod(self.plan.grid)

    def label(self, row: int) -> tuple[str, str]:
        """Number and time of a sampled frame, as text."""
        return f"#{self.indices[row]}", _clock(self.times[row]) if self.times else ""


def render(
    video_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: str | SlowFastConfig = SlowFastConfig(),
    frames: int = 50,
    grid: tuple[int, int] = (24, 24),
    decoder: str = "pyav",
) -> Path:
    """Draw what `layout` takes from a video on a `grid` of patches to `out`, a .png or .html file.

    frames: how many to sample; fewer where the video is shorter. Returns the path written, which appears
    whole or not at all. Raises VideoError, LayoutError, InputError or BackendError.
    """
    out = Path(out)
    draw = {".png": _write_png, ".html": _write_html, ".htm": _write_html}.get(out.suffix.lower())
    if draw is None:
        raise InputError(f"cannot write {out}: the picture's name must end in .png or .html")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    config = SlowFastConfig.parse(layout)
    video = open_video(video_path, decoder)
    report = gather(video, config, frames, grid)
    _write_whole(out, lambda path: draw(report, path))
    return out


def gather(video: Video, config: SlowFastConfig, frames: int, grid: tuple[int, int]) -> Report:
    """Sample the video and lay it out."""
    indices = sample_frames(video.total, frames)
    plan = config.plan(frames=len(indices), grid=grid)
    thumbs = np.concatenate([_shrink(part, _THUMB_PIXELS) for part in _in_chunks(video, indices)])
    height, width = video.size
    facts = [f"{len(indices)} of {video.total} frames", f"{width}\u00d7{height}"]
    if video.fps:
        facts.append(f"{video.fps:.4g} frames/s")
    facts.append(f"{grid[0]}\u00d7{grid[1]} patches a frame")
    examples = [_example(video, indices, tables, plan) for tables in plan.pathways]
    return Report(
        title=video.path.name or str(video.path),
        subtitle="  \u00b7  ".join(facts),
        layout=str(config),
        indices=indices,
        times=video.times(indices),
        thumbs=thumbs,
        plan=plan,
        examples=examples,
    )


def _in_chunks(video: Video, indices: list[int]) -> Iterator[torch.Tensor]:
    for start in range(0, len(indices), _CHUNK):
        yield video.frames(indices[start : start + _CHUNK])


def _example(video: Video, indices: list[int], tables: PathwayTables, plan: Plan) -> Example:
    name = tables.pathway.name
    row = _typical_row(name, plan, len(indices))
    frame = video.frames([indices[row]])
    tokens = token_boxes(tables, plan.grid)
    return Example(
        name,
        row,
        _shrink(frame, _EXAMPLE_PIXELS)[0],
        tokens,
        _keep(frame, tokens, plan.grid),
        _describe(tables, plan),
    )


def _typical_row(name: str, plan: Plan, count: int) -> int:
    """The middle slow frame; for the fast pathway the frame after it, which no other pathway sees."""
    slow = plan.slow_frames or [count // 2]
    middle = slow[len(slow) // 2]
    return middle if name == "slow" else min(middle + 1, count - 1)


def token_boxes(tables: PathwayTables, grid: tuple[int, int]) -> list[list[Box]]:
    """The patches that each token of one frame is made of: one box, or one in each row that it straddles."""
    width = grid[1]
    if tables.shape == tuple(grid):
        return [[(*rows, *cols)] for rows in tables.rows for cols in tables.cols]
    return [_fold(start, stop, width) for start, stop in tables.cols]


def _fold(start: int, stop: int, width: int) -> list[Box]:
    """A run of flattened patches as boxes on the grid."""
    rows = range(start // width, (stop - 1) // width + 1)
    return [(y, y + 1, max(start - y * width, 0), min(stop - y * width, width)) for y in rows]


def _keep(frame: torch.Tensor, tokens: list[list[Box]], grid: tuple[int, int]) -> np.ndarray:
    """Mean colour of each token on the grid of patches; patches that no token covers stay pale."""
    patches = F.adaptive_avg_pool2d(frame.permute(0, 3, 1, 2).float(), grid)[0].permute(1, 2, 0).numpy()
    total, count = np.zeros_like(patches), np.zeros((*grid, 1))
    for boxes in tokens:
        cells = [(slice(top, bottom), slice(left, right)) for top, bottom, left, right in boxes]
        colour = np.concatenate([patches[cell].reshape(-1, 3) for cell in cells]).mean(0)
        for cell in cells:
            total[cell] += colour
            count[cell] += 1
    return np.where(count > 0, total / np.maximum(count, 1), 245).round().astype(np.uint8)


def _describe(tables: PathwayTables, plan: Plan) -> str:
    each, frames = tables.tokens_per_frame, sum(map(len, tables.frames))
    how = "every patch" if each == math.prod(plan.grid) else f"the {tables.pathway.reduce} of each box"
    shape = f"{len(tables.rows)}\u00d7{len(tables.cols)}, " if tables.shape == plan.grid else ""
    return f"{_count(frames, 'frame')} \u00d7 {_count(each, 'token')} ({shape}{how})"


def _shrink(frames: torch.Tensor, longer: int) -> np.ndarray:
    """uint8 [n, H, W, 3] with the longer edge at most `longer`."""
    height, width = frames.shape[1:3]
    scale = min(1.0, longer / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).numpy()


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _shorten(name: str, most: int = 56) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}\u2026{name[-most // 2 + 1 :]}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}" if minutes else f"{rest:.2f} s"


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write beside `out` and move it there, so that nobody ever sees half a file."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


class _Sheet:
    """A matplotlib figure addressed in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BackendError(
                "a PNG needs matplotlib: pip install 'sfllava_fast[video]', or write .html"
            ) from error
        self.figure = Figure((width, height), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.limits = (0, width), (height, 0)
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 10, colour: str = INK, **style: Any) -> None:
        style = {"ha": "left", "va": "center"} | style
        self.axes.text(x, y, text, fontsize=size, color=colour, **style)

    def image(
        self, x: float, y: float, width: float, height: float, pixels: np.ndarray, smooth: bool = True
    ) -> None:
        self.axes.imshow(
            pixels,
            extent=(x, x + width, y + height, y),
            interpolation="antialiased" if smooth else "nearest",
            aspect="auto",
        )

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, **({"fill": False} | style)))

    def boxes(self, outlines: list[tuple[float, float, float, float]], colour: str, line: float) -> None:
        from matplotlib.collections import PolyCollection

        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in outlines]
        self.axes.add_collection(
            PolyCollection(corners, facecolors="none", edgecolors=colour, linewidths=line)
        )

    def save(self, path: Path) -> None:
        self.axes.set_xlim(self.limits[0])
        self.axes.set_ylim(self.limits[1])
        self.figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


_WIDTH, _MARGIN, _GAP = 14.0, 0.45, 0.1


def _write_png(report: Report, path: Path) -> None:
    rows, columns = report.thumbs.shape[1:3]
    shape = rows / columns
    count = len(report.indices)
    inner = _WIDTH - 2 * _MARGIN
    per_row = min(count, max(8, math.ceil(math.sqrt(2.6 * count * shape))))
    thumb = min((inner - _GAP * (per_row - 1)) / per_row, 1.9 / max(shape, 0.75))
    line = thumb * shape + 0.36
    strip = 1.45 + math.ceil(count / per_row) * line
    tile = min((inner - 0.75) / 4, 3.1 / shape)
    below = strip + 0.65 + tile * shape + 0.45
    sheet = _Sheet(_WIDTH, below + 1.25)
    _draw_head(sheet, report)
    for row in range(count):
        y, x = divmod(row, per_row)
        _draw_thumb(sheet, report, row, _MARGIN + x * (thumb + _GAP), 1.4 + y * line, thumb, thumb * shape)
    for column, example in enumerate(report.examples):
        _draw_example(
            sheet, report, example, _MARGIN + column * (inner + 0.45) / 2, strip + 0.3, tile, tile * shape
        )
    _draw_budget(sheet, report, below + 0.25, inner)
    sheet.save(path)


def _draw_head(sheet: _Sheet, report: Report) -> None:
    sheet.text(_MARGIN, 0.42, _shorten(report.title), 19, weight="bold")
    sheet.text(_MARGIN, 0.76, report.subtitle, 10.5, MUTED)
    sheet.text(_WIDTH - _MARGIN, 0.42, report.layout, 10.5, MUTED, ha="right", family="monospace")
    x = _MARGIN
    for name, text in _legend(report):
        sheet.box(x, 1.02, 0.2, 0.15, edgecolor=COLOURS[name], linewidth=2.6 if name == "slow" else 1.2)
        sheet.text(x + 0.3, 1.1, text, 10)
        x += 0.5 + 0.083 * len(text)


def _legend(report: Report) -> list[tuple[str, str]]:
    names = [e.name for e in report.examples]
    legend = {
        "slow": "slow pathway: few frames, fine detail",
        "fast": "fast pathway: every frame, pooled hard",
    }
    return [(name, legend[name]) for name in names]


def _draw_thumb(
    sheet: _Sheet, report: Report, row: int, x: float, y: float, width: float, height: float
) -> None:
    slow = row in report.slow
    colour = COLOURS["slow"] if slow else COLOURS["fast"] if _has(report, "fast") else RULE
    sheet.image(x, y, width, height, report.thumbs[row])
    sheet.box(x, y, width, height, edgecolor=colour, linewidth=3.2 if slow else 1.0)
    number, time = report.label(row)
    size = min(8.5, 5.6 * width + 1.6)
    sheet.text(
        x,
        y + height + 0.14,
        number,
        size,
        COLOURS["slow"] if slow else INK,
        weight="bold" if slow else "normal",
    )
    sheet.text(x + width, y + height + 0.14, time, size, MUTED, ha="right")


def _has(report: Report, name: str) -> bool:
    return any(example.name == name for example in report.examples)


def _draw_example(
    sheet: _Sheet, report: Report, example: Example, x: float, y: float, width: float, height: float
) -> None:
    colour = COLOURS[example.name]
    sheet.text(x, y, f"{example.name.capitalize()} pathway", 12.5, colour, weight="bold")
    sheet.text(x + 1.5, y, example.caption, 9.5, MUTED)
    top, right = y + 0.22, x + width + 0.15
    sheet.image(x, top, width, height, example.picture)
    sheet.image(right, top, width, height, example.kept, smooth=False)
    down, across = height / report.plan.grid[0], width / report.plan.grid[1]
    outlines = [
        (x + left * across, top + above * down, (stop - left) * across, (bottom - above) * down)
        for boxes in example.tokens
        for above, bottom, left, stop in boxes
    ]
    sheet.boxes(outlines, colour, 0.6 if len(outlines) > 100 else 1.4)
    for left in (x, right):
        sheet.box(left, top, width, height, edgecolor=colour, linewidth=1.6)
    number, time = report.label(example.row)
    sheet.text(x, top + height + 0.15, f"frame {number}  {time}", 8.5, MUTED)
    sheet.text(right, top + height + 0.15, "each token's mean colour", 8.5, MUTED)


def _draw_budget(sheet: _Sheet, report: Report, y: float, width: float) -> None:
    tokens = report.plan.tokens
    sheet.text(_MARGIN, y, f"{tokens['total']:,} video tokens", 12.5, weight="bold")
    sheet.text(_MARGIN + 2.5, y, _saving(report), 9.5, MUTED)
    x = _MARGIN
    for name, text, share in _shares(report):
        sheet.box(x, y + 0.2, width * share, 0.36, facecolor=COLOURS[name], fill=True, linewidth=0)
        inside = width * share > 0.085 * len(text) + 0.2
        if inside:
            sheet.text(x + 0.12, y + 0.385, text, 10, PAPER, weight="bold")
        else:
            sheet.text(x + width * share, y + 0.72, text, 10, COLOURS[name], weight="bold", ha="right")
        x += width * share


def _shares(report: Report) -> list[tuple[str, str, float]]:
    """(pathway, label, share of all tokens)."""
    tokens = report.plan.tokens
    shares = [(e.name, tokens[e.name] / tokens["total"]) for e in report.examples]
    return [(name, f"{name} {tokens[name]:,} ({share:.0%})", share) for name, share in shares]


def _saving(report: Report) -> str:
    share = report.plan.tokens["total"] / report.patches
    return f"{share:.1%} of the {report.patches:,} patches of {_count(len(report.indices), 'frame')}"


def _write_html(report: Report, path: Path) -> None:
    head = html.escape(report.title)
    legend = "".join(f'<span class="{n}">{html.escape(t)}</span>' for n, t in _legend(report))
    bars = "".join(
        f'<div class="{n}" style="flex:{s:.6f}" title="{html.escape(t)}">{html.escape(t)}</div>'
        for n, t, s in _shares(report)
    )
    page = _PAGE.format(
        title=head,
        subtitle=html.escape(report.subtitle),
        layout=html.escape(report.layout),
        legend=legend,
        thumbs="".join(_html_thumb(report, row) for row in range(len(report.indices))),
        examples="".join(_html_example(report, example) for example in report.examples),
        total=f"{report.plan.tokens['total']:,}",
        saving=html.escape(_saving(report)),
        bars=bars,
        slow=COLOURS["slow"],
        fast=COLOURS["fast"],
    )
    path.write_text(page, encoding="utf-8")


def _html_thumb(report: Report, row: int) -> str:
    number, time = report.label(row)
    kind = "slow" if row in report.slow else "fast"
    return (
        f'<figure class="{kind}"><img alt="frame {number}" src="{_inline(report.thumbs[row])}">'
        f"<figcaption><b>{number}</b> {time}</figcaption></figure>"
    )


def _html_example(report: Report, example: Example) -> str:
    rows, columns = report.plan.grid
    height, width = example.picture.shape[:2]
    cells = "".join(
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
        for boxes in example.tokens
        for top, bottom, left, right in boxes
    )
    view = f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none"'
    number, time = report.label(example.row)
    ratio = f"aspect-ratio:{width}/{height}"
    return (
        f'<section class="{example.name}"><h2>{example.name.capitalize()} pathway'
        f"<small>{html.escape(example.caption)}</small></h2><div class=pair>"
        f'<figure><div class=frame style="{ratio}"><img alt="" src="{_inline(example.picture)}">'
        f"<svg {view}>{cells}</svg></div><figcaption>frame {number} {time}</figcaption></figure>"
        f'<figure><div class=frame style="{ratio}">'
        f'<img class=kept alt="" src="{_inline(example.kept)}"></div>'
        f"<figcaption>each token's mean colour</figcaption></figure></div></section>"
    )


def _inline(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] as a PNG file."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each line begins with its filter, 0: none
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ --ink: #1f2430; --muted: #6b7280; --paper: #fff; --slow: {slow}; --fast: {fast};
  color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaf0; --muted: #9aa2b1; --paper: #14171f; }} }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1280px; margin: 2rem auto; padding: 0 1.25rem; }}
h1 {{ margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }}
h2 {{ margin: 0 0 .4rem; font-size: 1.1rem; }}
small, figcaption, .muted {{ color: var(--muted); font-weight: normal; }}
h2 small {{ margin-left: .7rem; font-size: .82rem; }}
.legend span {{ margin-right: 1.5rem; }}
.legend span::before {{ content: ""; display: inline-block; width: 1rem; height: .7rem; margin-right: .45rem;
  border: 2px solid currentColor; }}
.legend .slow, section.slow h2, .strip .slow b {{ color: var(--slow); }}
.legend .fast, section.fast h2 {{ color: var(--fast); }}
figure {{ margin: 0; }} figcaption {{ font-size: .78rem; }}
img {{ display: block; width: 100%; }}
.strip {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: .6rem;
  margin: 1rem 0 2rem; }}
.strip img {{ box-sizing: border-box; border: 1px solid var(--fast); }}
.strip .slow img {{ border: 4px solid var(--slow); }}
.examples {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 2rem; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; }}
.frame {{ position: relative; outline: 2px solid currentColor; }}
section.slow .frame {{ color: var(--slow); }}
section.fast .frame {{ color: var(--fast); }}
.frame img, .frame svg {{ position: absolute; inset: 0; width: 100%; height: 100%; }}
.kept {{ image-rendering: pixelated; }}
rect {{ fill: none; stroke: currentColor; stroke-width: 1.2px; vector-effect: non-scaling-stroke; }}
.bar {{ display: flex; border-radius: 6px; overflow: hidden; color: #fff; font-weight: 600; }}
.bar div {{ padding: .45rem .7rem; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  min-width: 0; }}
.bar .slow {{ background: var(--slow); }} .bar .fast {{ background: var(--fast); }}
</style></head><body>
<h1>{title}</h1><p class="muted">{subtitle}<br><code>{layout}</code></p>
<p class="legend">{legend}</p>
<div class="strip">{thumbs}</div>
<div class="examples">{examples}</div>
<h2 style="margin-top:2rem">{total} video tokens<small>{saving}</small></h2>
<div class="bar">{bars}</div>
</body></html>
"""

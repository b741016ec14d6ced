"""The report as one self-contained HTML page.

Frames are JPEG, a few hundred KB together, if Pillow is installed; else PNG, written by the standard library.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from .report import ZEROS, Kept, LayoutReport, PathwayView, Share

_QUALITIES = (80, 60, 40)  # of JPEG; the first with a small enough page is taken
_CHARACTERS = 2_000_000  # 50 frames of a real video are far below at quality 80

Photo = Callable[[np.ndarray], str]


def write(report: LayoutReport, path: Path) -> None:
    """Writes the report to a file."""
    page = ""
    for quality in _QUALITIES:
        page = _draw(report, partial(_photo, quality=quality))
        if len(page) < _CHARACTERS:
            break
    path.write_text(page, encoding="utf-8")


def _draw(report: LayoutReport, photo: Photo) -> str:
    """The page. photo: makes the data URL of a picture."""
    rows = range(len(report.indices))
    legend = "".join(_legend(report, view) for view in report.pathways)
    if not all(map(report.is_read, rows)):
        legend += '<span class="pale">read by no pathway</span>'
    return _PAGE.format(
        title=escape(report.title),
        facts=escape(report.facts),
        layout=escape(report.layout),
        source=escape(report.source),
        notes=escape(report.notes),
        legend=legend,
        thumbs="".join(_thumb(report, row, photo) for row in rows),
        examples="".join(_section(report, view, photo) for view in report.pathways),
        kind="pruned" if report.is_pruned else "examples",
        budget=escape(report.budget),
        saving=escape(report.saving),
        bars="".join(
            f'<div class="{"zeros" if share.colour == ZEROS else ""}" style="flex:{share.share:.6f};'
            f'{_fill(share)}" title="{escape(share.label)}">{escape(share.label)}</div>'
            for share in report.shares()
        ),
        shares="".join(f'<span style="--c:{share.colour}">{escape(share.label)}</span>' for share in report.shares()),
    )


def _section(report: LayoutReport, view: PathwayView, photo: Photo) -> str:
    return _example(report, view, photo) if view.pruned is None else _kept(report, view, view.pruned, photo)


def _fill(share: Share) -> str:
    """A bar's style: pale after the part that is kept, and then without its label."""
    if share.kept == 1:
        return f"background-color:{share.colour}"
    part = f"{share.kept:.2%}"
    return f"color:#0000;background:linear-gradient(90deg,{share.colour} {part},{share.colour}40 {part})"


def _legend(report: LayoutReport, view: PathwayView) -> str:
    kind = "bins" if view.lanes else "some" if report.picks(view) else "every"
    text = escape(f"{view.name} pathway: {view.reads}")
    return f'<span class="{kind}" style="--c:{view.colour}">{text}</span>'


def _thumb(report: LayoutReport, row: int, photo: Photo) -> str:
    number, time = report.label(row)
    rings, number = report.rings(row), number + report.repeats(row)
    picked = bool(rings) and report.picks(rings[0])
    kinds = [*(view.name for view in rings), "picked" if picked else "", "" if report.is_read(row) else "pale"]
    shadows, inset = [], 0
    for view in rings:
        inset += 4 if picked else 2
        shadows.append(f"inset 0 0 0 {inset}px {view.colour}")
    ring = f'<i style="box-shadow:{",".join(shadows)}"></i>' if rings else ""
    return (
        f'<figure class="{" ".join(filter(None, kinds))}"><div class="thumb"><img alt="frame {escape(number)}" '
        f'src="{photo(report.thumbs[row])}">{ring}</div>'
        f"<figcaption><b>{number}</b> {time}</figcaption>{_lanes(report, row)}</figure>"
    )


def _lanes(report: LayoutReport, row: int) -> str:
    """The lines under a frame that mark bins of several frames."""
    parts = []
    for view in report.pathways:
        for lane in view.lanes:
            stop = next((stop for start, stop in lane if start <= row < stop), None)
            kinds = ["lane"]
            if stop is not None:
                kinds += ["bin", "more"] if row < stop - 1 else ["bin"]
            parts.append(f'<div class="{" ".join(kinds)}" style="--c:{view.colour}"></div>')
    return "".join(parts)


def _kept(report: LayoutReport, view: PathwayView, kept: Kept, photo: Photo) -> str:
    """Every bin of a pathway, pale outside the kept tokens."""
    tiles = "".join(
        f'<figure><div class="thumb frame"><img alt="" src="{photo(tile)}"></div>'
        f"<figcaption>{report.name_bin(bin)} <span>{kept.count(number)}</span></figcaption></figure>"
        for number, (bin, tile) in enumerate(zip(view.bins, kept.tiles))
    )
    return (
        f'<section style="--c:{view.colour}"><h2>{escape(view.name.capitalize())} pathway'
        f"<small>{escape(kept.text)}</small></h2><div class=strip>{tiles}</div></section>"
    )


def _example(report: LayoutReport, view: PathwayView, photo: Photo) -> str:
    height, width = view.picture.shape[:2]
    ratio = f"aspect-ratio:{width}/{height}"
    if view.colours is None:
        kept, caption = '<div class="token">CLS</div>', "one token, made of no patch"
    else:
        kept, caption = f'<img class=kept alt="" src="{_inline(view.colours)}">', "each token's mean colour"
    return (
        f'<section style="--c:{view.colour}"><h2>{escape(view.name.capitalize())} pathway'
        f"<small>{escape(view.caption)}</small></h2><div class=pair>"
        f'<figure><div class=frame style="{ratio}"><img alt="" src="{photo(view.picture)}">'
        f"{_outlines(report, view)}</div><figcaption>{escape(report.name_example(view))}</figcaption></figure>"
        f'<figure><div class=frame style="{ratio}">{kept}</div><figcaption>{caption}</figcaption></figure>'
        "</div></section>"
    )


def _outlines(report: LayoutReport, view: PathwayView) -> str:
    rows, columns = report.plan.grid
    cells = "".join(
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
        for boxes in view.tokens
        for top, bottom, left, right in boxes
    )
    return f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">{cells}</svg>'


def _photo(pixels: np.ndarray, quality: int) -> str:
    """The pixels as the data URL of a JPEG, a few percent of a PNG's size; of a PNG without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        return _inline(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _inline(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def encode_png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG file. pixels: uint8 RGB [H, W, 3]."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a line is its filter: 0, none
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ --ink: #1f2430; --muted: #6b7280; --paper: #fff; --rule: #d5d9e0; --lift: 0%; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8eaf0; --muted: #9aa2b1; --paper: #14171f; --rule: #3a4150; --lift: 40%; }} }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1280px; margin: 2rem auto; padding: 0 1.25rem; }}
h1 {{ margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }}
h2 {{ margin: 0 0 .4rem; font-size: 1.1rem; }}
section h2 {{ color: color-mix(in srgb, var(--c), white var(--lift)); }}
small, figcaption, .muted {{ color: var(--muted); font-weight: normal; }}
code {{ overflow-wrap: anywhere; }}
h2 small {{ margin-left: .7rem; font-size: .82rem; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; }}
.legend span::before {{ content: ""; display: inline-block; width: 1rem; height: .7rem; margin-right: .45rem;
  box-sizing: border-box; border: 0 solid var(--c); }}
.legend .every::before {{ border-width: 2px; }} .legend .some::before {{ border-width: 4px; }}
.legend .bins::before {{ height: .35rem; background: var(--c); vertical-align: middle; }}
.legend .pale::before {{ border: 1px solid var(--rule); }}
.shares span::before {{ background: var(--c); }}
figure {{ margin: 0; }} figcaption {{ font-size: .78rem; }}
img {{ display: block; width: 100%; }}
.strip {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(112px, 28%), 1fr)); gap: .6rem;
  margin: 1rem 0 2rem; }}
.thumb {{ position: relative; }} .thumb i {{ position: absolute; inset: 0; }}
.picked b {{ color: var(--ink); }} figcaption b {{ font-weight: normal; }} .picked figcaption b {{ font-weight: bold; }}
.strip .pale img {{ opacity: .25; }}
.lane {{ height: 5px; margin-top: 3px; }} .lane.bin {{ background: var(--c); }} .lane.more {{ margin-right: -.6rem; }}
.examples {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 2rem; }}
.examples section:only-child {{ max-width: 640px; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; }}
.frame {{ position: relative; outline: 2px solid var(--c); display: grid; place-items: center; }}
.pruned .frame {{ outline-width: 1px; }} .pruned figcaption span {{ float: right; }}
.pair .frame img, .frame svg {{ position: absolute; inset: 0; width: 100%; height: 100%; }}
.kept {{ image-rendering: pixelated; }}
.token {{ background: var(--c); color: #fff; font-weight: 700; padding: 1.1rem .8rem; }}
rect {{ fill: none; stroke: var(--c); stroke-width: 1.2px; vector-effect: non-scaling-stroke; }}
.bar {{ display: flex; gap: 2px; border-radius: 6px; overflow: hidden; color: #fff; font-weight: 600; }}
.bar div {{ height: 2.2rem; line-height: 2.2rem; text-indent: .7rem; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; min-width: 0; }}
.bar .zeros {{ color: #1f2430; background-image: repeating-linear-gradient(135deg, #0000 0 6px, #0002 6px 8px); }}
</style></head><body>
<h1>{title}</h1><p class="muted">{facts}<br><code>{layout}</code> {source}<br>{notes}</p>
<p class="legend">{legend}</p>
<div class="strip">{thumbs}</div>
<div class="{kind}">{examples}</div>
<h2 style="margin-top:2rem">{budget}<small>{saving}</small></h2>
<div class="bar">{bars}</div>
<p class="legend shares">{shares}</p>
</body></html>
"""

"""A picture of what a layout takes from a video: PNG with matplotlib, or one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError
from ..layouts.layout import Layout
from ..layouts.slowfast import SlowFastLayout
from ..output_folder import check_folder, make_folder, written_whole
from ..reduction.pruning import Pruning
from ..video import open_video
from . import html, png
from .report import gather


def render(
    video_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: str | Layout = SlowFastLayout(),
    frames: int | None = None,
    grid: tuple[int, int] | None = None,
    decoder: str = "pyav",
    kept: Sequence[int] | Pruning | None = None,
) -> Path:
    """Draw what `layout` takes from a video on a `grid` of patches to `out`, a .png or .html file.

    frames: how many to sample; fewer where the video is shorter. None, as for grid, is what the layout was published
    with if it has a name, else 50 and 24 x 24. kept: the positions of the tokens that pruning keeps, as a model chose
    them; or a pruning that needs no model: it is shown the patches' pixels in the place of features. Returns the path
    written, which appears whole or not at all. Raises VideoError, LayoutError, InputError or BackendError.
    """
    out = Path(out)
    writer = {".png": png, ".html": html, ".htm": html}.get(out.suffix.lower())
    if writer is None:
        raise InputError(f"cannot write {out}: the picture's name must end in .png or .html")
    check_folder(out)
    report = gather(open_video(video_path, decoder), layout, frames, grid, kept)
    _write_whole(out, lambda path: writer.write(report, path))
    return out


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write to `out`, whose folder is made, so that nobody ever sees half a file."""
    make_folder(out)
    try:
        with written_whole(out) as part:
            write(part)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error

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
    """Draw which frames and patches of a video a layout uses.

    Args:
        video_path: A video file or a folder of frames.
        out: A .png or .html file. It is written whole or not at all.
        layout: A layout, or its text form or name.
        frames: Number of frames to sample, fewer if the video is shorter (default: those of a named layout, else 50).
        grid: Rows and columns of patches (default: those of a named layout, else 24 x 24).
        decoder: "pyav" or "decord".
        kept: Positions of the tokens that a model's pruning kept; or a pruning that needs no model, which is applied to
            the patches' pixels instead of features.

    Returns:
        The path written.

    Raises:
        VideoError: The video cannot be read.
        LayoutError: The layout cannot be parsed, or does not fit the frames or the grid.
        InputError: `out` or `kept` cannot be used.
        BackendError: The decoder or matplotlib is not installed.
    """
    out = Path(out)
    write = {".png": png.write, ".html": html.write, ".htm": html.write}.get(out.suffix.lower())
    if write is None:
        raise InputError(f"cannot write {out}: the picture's name must end in .png or .html")
    check_folder(out)
    report = gather(open_video(video_path, decoder), layout, frames, grid, kept)
    _write_whole(out, lambda path: write(report, path))
    return out


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write to `out` atomically, and make its folder."""
    make_folder(out)
    try:
        with written_whole(out) as part:
            write(part)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error

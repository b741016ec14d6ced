"""The named layouts as a table: what `sfllava-fast layouts` prints."""

from __future__ import annotations

from contextlib import suppress
from textwrap import wrap
from typing import Any

from ..errors import LayoutError
from ..layouts.presets import DEFAULT_GRID, OPTIONS, PRESETS, Preset, find_preset, parse_layout
from ..layouts.sampling import DEFAULT_FRAMES

_WIDTH = 80
_COLUMNS = "{:<20} {:>6} {:>6} {:>5}  {}"


def rows(
    text: str | None = None, frames: int | None = None, grid: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """A row for each preset, or for one layout, for json.dumps.

    Args:
        text: A layout, or None for all presets.
        frames: Frames to count tokens of; None: as published, else 50.
        grid: Patches of a frame; None: as published, else 24 x 24.

    Raises:
        LayoutError: For a text that is no layout.
    """
    presets = [preset for preset in PRESETS.values() if preset] if text is None else [_preset(text)]
    return [_row(preset, frames or preset.frames, grid or preset.grid) for preset in presets]


def table(found: list[dict[str, Any]]) -> str:
    """The rows as text of 80 columns, each with its summary below."""
    lines = [_COLUMNS.format("Layout", "Tokens", "Frames", "Grid", "Source")]
    for row in found:
        tokens = f"{row['tokens']['total']:,}" if row["tokens"] else "none"
        grid = "{}x{}".format(*row["grid"])
        lines.append(_COLUMNS.format(row["name"], tokens, row["frames"], grid, row["source"]).rstrip())
        before = "pooled before the projector" if row["pooled"] == "before" else ""
        below = ["; ".join(filter(None, (row["summary"], before))), row["options"] and f"options: {row['options']}"]
        lines += [f"  {line}" for text in below for line in wrap(text, _WIDTH - 2)]
    return "\n".join(lines)


def _preset(text: str) -> Preset:
    return find_preset(text) or Preset(text, parse_layout(text), DEFAULT_FRAMES, DEFAULT_GRID, "", "")


def _row(preset: Preset, frames: int, grid: tuple[int, int]) -> dict[str, Any]:
    layout, tokens = preset.layout, None  # None: the layout leaves no token of this grid
    with suppress(LayoutError):
        tokens = layout.plan(layout.count_pictures(frames), grid).tokens
    return {
        "name": preset.name,
        "options": OPTIONS.get(preset.name, ""),
        "tokens": tokens,
        "frames": frames,
        "grid": list(grid),
        "pooled": layout.stage,
        "separators": [str(separator) for separator in layout.separators],
        "layout": str(layout),
        "source": preset.source,
        "summary": preset.summary,
    }

"""The layouts that have names, as a table: what `sfllava-fast layouts` prints."""

from __future__ import annotations

from contextlib import suppress
from textwrap import wrap
from typing import Any

from ..errors import LayoutError
from ..layouts.presets import OPTIONS, PRESETS, Preset, find_preset, parse_layout

_WIDTH = 80
_COLUMNS = "{:<20} {:>6} {:>6} {:>5}  {}"


def rows(
    text: str | None = None, frames: int | None = None, grid: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """A row for each preset, or for the one layout that `text` means, for json.dumps.

    frames, grid: what tokens are counted for; None is what the preset was published with, else 50 and 24 x 24.
    Raises LayoutError for a text that means no layout.
    """
    presets = list(PRESETS.values()) if text is None else [_preset(text)]
    return [_row(preset, frames or preset.frames, grid or preset.grid) for preset in presets]


def table(found: list[dict[str, Any]]) -> str:
    """The rows as text of 80 columns, what each is below it."""
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
    return find_preset(text) or Preset(text, parse_layout(text), 50, (24, 24), "", "")


def _row(preset: Preset, frames: int, grid: tuple[int, int]) -> dict[str, Any]:
    layout, tokens = preset.layout, None  # None: it leaves none of this grid
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

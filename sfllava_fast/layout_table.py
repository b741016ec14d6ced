"""The layouts that have names, as a table: what `sfllava-fast layouts` prints."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from .errors import LayoutError
from .layouts import OPTIONS, PRESETS, Preset, find_preset, parse_layout


def rows(
    text: str | None = None, frames: int | None = None, grid: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """A row for each preset, or for the one layout that `text` means, for json.dumps.

    frames, grid: what tokens are counted for; None is what the preset was published with, else 50 and 24 x 24.
    Raises LayoutError for a text that means no layout.
    """
    presets = list(PRESETS.values()) if text is None else [_preset(text)]
    return [_row(preset, frames or preset.frames, grid or preset.grid) for preset in presets]


def table(found: list[dict[str, Any]]) -> Any:
    """The rows as a table of rich."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("Layout", no_wrap=True)
    for name in ("Tokens", "Frames", "Grid"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("Pooled", "What it is", "Source"):
        shown.add_column(name)
    for row in found:
        tokens = f"{row['tokens']['total']:,}" if row["tokens"] else "none"
        options = f"\noptions: {row['options']}" if row["options"] else ""
        grid, where = "{}x{}".format(*row["grid"]), f"{row['pooled']} the projector"
        shown.add_row(row["name"], tokens, str(row["frames"]), grid, where, row["summary"] + options, row["source"])
    return shown


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

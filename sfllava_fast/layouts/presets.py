"""Published video token layouts by name, and the parser of any layout's text.

All of them are lists of pathways (layout.py), which the same op computes. The tests compare each with an independent
implementation in float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..errors import LayoutError
from .layout import Layout
from .pathway_layout import Pathways
from .sampling import DEFAULT_FRAMES
from .slowfast import SlowFastLayout

DEFAULT_GRID = (24, 24)  # patches of CLIP ViT-L/14 at 336 pixels


@dataclass(frozen=True)
class Preset:
    """A layout with the number of frames and the grid that it was published with.

    Attributes:
        name: The layout's text, with its options.
        layout: The layout.
        frames: Number of frames that are sampled from a video.
        grid: (rows, columns) of a frame's patches.
        source: Paper or repository.
        summary: One line about its tokens.
    """

    name: str
    layout: Layout
    frames: int
    grid: tuple[int, int]
    source: str
    summary: str

    def count_tokens(self, frames: int | None = None, grid: tuple[int, int] | None = None) -> int:
        """Number of tokens of `frames` sampled frames on `grid`; None stands for the published value."""
        return self.layout.plan(self.layout.count_pictures(frames or self.frames), grid or self.grid).tokens["total"]


def parse_layout(layout: str | Layout) -> Layout:
    """The layout of a text.

    Args:
        layout: A name in PRESETS with its options, a text of `SlowFastLayout`, or a text of `Pathways`. A layout is
            returned unchanged.

    Raises:
        LayoutError: If it is none of these.
    """
    if isinstance(layout, Layout):
        return layout
    preset = find_preset(layout)
    if preset is not None:
        return preset.layout
    if isinstance(layout, str) and ":" in layout:
        return Pathways.parse(layout)
    if isinstance(layout, str) and not layout.startswith("slowfast"):
        names = ", ".join(_FAMILIES)
        raise LayoutError(f"unknown layout {layout!r}: write one of {names}, slowfast-... or pathways")
    return SlowFastLayout.parse(layout)


def parse_patches_only(layout: str | Layout) -> Layout:
    """`parse_layout` for code that has only patches: no class token, separators or canvas.

    Raises:
        LayoutError: If the text is not a layout, or if the layout needs one of these.
    """
    parsed = parse_layout(layout)
    needs = {"the class token": parsed.class_token, "separators": parsed.separators, "a canvas": parsed.canvas}
    if lacking := [name for name, needed in needs.items() if needed]:
        raise LayoutError(f"{layout} needs {' and '.join(lacking)}: use SlowFastLlava or another layout")
    return parsed


def find_preset(text: object) -> Preset | None:
    """The preset with this name and these options; None for any other text, and for a layout."""
    return _find_preset(text) if isinstance(text, str) else None


@lru_cache(maxsize=256)
def _find_preset(text: str) -> Preset | None:
    for name, (options, make) in _FAMILIES.items():
        match = re.fullmatch(name + options, text, re.ASCII)
        if match:
            preset = make(text, **{option: value for option, value in match.groupdict().items() if value})
            return replace(preset, layout=preset.layout.published_as(text, preset.frames, preset.grid))
    return None


def choose_layout(
    layout: str | Layout | None, checkpoint: Mapping[str, Any] | None, default: Layout = SlowFastLayout()
) -> tuple[Layout, int]:
    """The layout of a model, and the frames that it samples if a call names no number.

    Args:
        layout: The caller's; its own frames come first.
        checkpoint: The entry "sfllava_fast" of config.json: its "frames", then the frames of its "layout".
        default: The layout if neither names one.

    Returns:
        (layout, frames); frames are 50 if nothing names a number.

    Raises:
        LayoutError: For a text that is no layout.
    """
    options = checkpoint or {}
    if layout is not None:
        parsed = parse_layout(layout)
        return parsed, parsed.frames or options.get("frames", DEFAULT_FRAMES)
    parsed = parse_layout(options.get("layout", default))
    return parsed, options.get("frames", parsed.frames or DEFAULT_FRAMES)


def _sf_llava(name: str) -> Preset:
    size = "34B" if name.endswith("34b") else "7B"
    summary = f"10 frames pooled by pairs, then every frame as 4x4; the published {size} configuration"
    return Preset(name, SlowFastLayout(), 50, (24, 24), "arXiv 2407.15841", summary)


def _slow_only(name: str) -> Preset:
    summary = "the slow pathway of sf_llava alone, which picks 10 of the 50 frames"
    return Preset(name, SlowFastLayout().only("slow"), 50, (24, 24), "arXiv 2407.15841, ablation", summary)


def _fast_only(name: str) -> Preset:
    summary = "the fast pathway of sf_llava alone: every frame as 4x4"
    return Preset(name, SlowFastLayout().only("fast"), 50, (24, 24), "arXiv 2407.15841, ablation", summary)


def _uniform(name: str) -> Preset:
    layout = Pathways.parse("all:each,each,each,max")
    return Preset(name, layout, 6, (24, 24), "baseline", "every patch of every frame")


def _llava_next_image(name: str) -> Preset:
    layout = Pathways.parse("pool:each,stride2,stride2,mean")
    summary = "every frame averaged over 2x2 patches, an image model as it is"
    return Preset(name, layout, 32, (24, 24), "LLaVA-NeXT-Image", summary)


_POOLS = {"avg": ("stride", "mean"), "max": ("stride", "max"), "bilinear": ("linear", "mean")}
_NEWLINES = {"none": "", "grid": ";newline@row", "frame": ";newline@frame", "one": ";newline@end"}


def _llava_next_video(name: str, pool: str = "avg", newline: str = "none") -> Preset:
    rule, reduce = _POOLS[pool]
    layout = Pathways.parse(f"pool:each,{rule}2,{rule}2,{reduce}{_NEWLINES[newline]}")
    how = {"avg": "averaged over 2x2 patches", "max": "the maximum of 2x2 patches", "bilinear": "resized by half"}[pool]
    where = {"none": "", "grid": ", a newline after each row", "frame": ", a newline after each frame"}
    summary = f"every frame {how}{where.get(newline, ', a newline at the end')}"
    return Preset(name, layout, 32, (24, 24), "github.com/LLaVA-VL/LLaVA-NeXT", summary)


def _llava_video_slowfast(
    name: str, pool: str = "avg", every: str = "10", stride: str = "2", newline: str = "none"
) -> Preset:
    (rule, reduce), fast = _POOLS[pool], 2 * int(stride)
    slow = f"slow:every{every},{rule}{stride},{rule}{stride},{reduce}"
    text = f"{slow}+fast:others{every},{rule}{fast},{rule}{fast},{reduce}{_NEWLINES[newline]}"
    rows = ", as in its code a newline after each row" if newline == "grid" else ""
    summary = f"frame by frame, every {every}th by stride {stride}, the others by {fast}, a separator after each{rows}"
    layout = Pathways.parse(f"{text};separator@frame;interleaved")
    return Preset(name, layout, 64, (27, 27), "LLaVA-Video, arXiv 2410.02713", summary)


def _pllava(name: str) -> Preset:
    layout = Pathways.parse("pool:repeat16,adaptive12,adaptive12,mean")
    summary = "frames, rows and columns averaged to 16x12x12; fewer than 16 frames are repeated first"
    return Preset(name, layout, 16, (24, 24), "PLLaVA, arXiv 2404.16994", summary)


def _means(name: str) -> Preset:
    text = "temporal:each,adaptive1,adaptive1,mean,pad100+spatial:adaptive1,each,each,mean;before"
    means = "each frame's mean, zeros up to 100, then each patch's mean over the frames"
    if name == "red_villm":
        summary = f"{means}; each part has its own projector (modules.PathwayProjectors)"
        return Preset(name, Pathways.parse(text), 100, (16, 16), "RED-VILLM, arXiv 2404.11865", summary)
    return Preset(name, Pathways.parse(text), 100, (16, 16), "Video-ChatGPT, arXiv 2306.05424", means)


def _videollm_online(name: str, interval: str = "") -> Preset:
    text = "class:each,each,each,max,class+pool:each,adaptive3,adaptive3,mean;interleaved;before"
    layout = Pathways.parse(text + (";interval@between" if interval else ""))
    summary = "frame by frame, the class token and 3x3" + (", an interval token between frames" if interval else "")
    return Preset(name, layout, 50, (24, 24), "VideoLLM-online, arXiv 2406.11816", summary)


def _ig_vlm(name: str) -> Preset:
    layout = Pathways.parse("all:each,each,each,max;canvas3x2")
    summary = "6 frames as one picture of 3 rows and 2 columns, every patch of it; no tiles (anyres)"
    return Preset(name, layout, 6, (24, 24), "IG-VLM, arXiv 2403.18406", summary)


_POOL, _NEWLINE = r"(?:-(?P<pool>avg|max|bilinear))?", r"(?:-newline_(?P<newline>grid|frame|one|none))?"
_STRIDES = r"(?:-every_(?P<every>[1-9]\d{0,4}))?(?:-stride_(?P<stride>[1-9]\d{0,2}))?"
_FAMILIES: dict[str, tuple[str, Callable[..., Preset]]] = {  # name -> pattern of its options, their preset
    "sf_llava": ("", _sf_llava),
    "sf_llava_34b": ("", _sf_llava),
    "slow_only": ("", _slow_only),
    "fast_only": ("", _fast_only),
    "uniform": ("", _uniform),
    "llava_next_image": ("", _llava_next_image),
    "llava_next_video": (_POOL + _NEWLINE, _llava_next_video),
    "llava_video_slowfast": (_POOL + _STRIDES + "(?:-newline_(?P<newline>grid|none))?", _llava_video_slowfast),
    "pllava": ("", _pllava),
    "video_chatgpt": ("", _means),
    "red_villm": ("", _means),
    "videollm_online": ("(?:-(?P<interval>interval))?", _videollm_online),
    "ig_vlm": ("", _ig_vlm),
}
PRESETS = {name: preset for name in _FAMILIES if (preset := find_preset(name))}
OPTIONS = {  # written after a name, in this order
    "llava_next_video": "-avg|max|bilinear -newline_grid|frame|one|none",
    "llava_video_slowfast": "-avg|max|bilinear -every_10 -stride_2 -newline_grid|none",
    "videollm_online": "-interval",
}

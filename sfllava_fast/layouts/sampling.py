"""How many and which frames of a video are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError, check_count
from .layout import Layout
from .presets import find_preset

DEFAULT_FRAMES = 50


def choose_frames(given: int | None, layout: str | Layout | None, options: Mapping[str, Any]) -> int:
    """Number of frames to sample from a video, from the first of these that has one.

    1. `given`, the caller's number.
    2. The caller's layout, if it is a preset.
    3. The checkpoint's entry: its "frames", then its "layout", if that is a preset.
    4. DEFAULT_FRAMES.

    Args:
        given: The caller's number of frames, or None.
        layout: The caller's layout, or None for the checkpoint's.
        options: The "sfllava_fast" entry of the checkpoint's config.json; empty without one.

    Returns:
        The number of frames, at least 1. Layouts are not checked here.

    Raises:
        InputError: If the number is not an integer of at least 1.
    """
    if given is None:
        given = _own_frames(layout)
    if given is None:
        given = options.get("frames", _own_frames(options.get("layout")) or DEFAULT_FRAMES)
    check_count("frames", given)
    return given


def sample_frames(total: int, count: int) -> list[int]:
    """The middles of `count` equal segments of `total` frames, as published with SlowFast-LLaVA.

    n = min(total, count), seg = (total - 1) / n, frame i = (round(seg i) + round(seg (i + 1))) // 2, rounded half to
    even.

    Args:
        total: Number of frames of the video.
        count: Number of frames to sample.

    Returns:
        n indices, ascending.

    Raises:
        InputError: If `total` or `count` is less than 1.
    """
    if total < 1 or count < 1:
        raise InputError(f"cannot sample {count} frames of {total}: both must be at least 1")
    n = min(total, count)
    edges = np.round((total - 1) / n * np.arange(n + 1)).astype(np.int64)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def _own_frames(layout: object) -> int | None:
    preset = find_preset(layout)
    return preset.frames if preset else getattr(layout, "frames", None)

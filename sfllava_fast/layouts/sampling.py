"""Which frames of a video are sampled."""

from __future__ import annotations

import numpy as np

from ..errors import InputError

DEFAULT_FRAMES = 50


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

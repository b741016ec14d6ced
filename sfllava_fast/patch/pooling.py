"""The op instead of a published pooling; the published one runs what the op cannot."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import InputError, LayoutError
from ..layouts.layout import Layout
from ..ops.aggregate import slowfast_aggregate
from ..patching import warn_once


def pool(features: Tensor, layout: Layout | str, grid: tuple[int, int] | None, backend: str) -> Tensor:
    """`slowfast_aggregate` of patches [T, N, D] of any strides: tokens [S, D]."""
    if features.stride(-1) != 1:
        features = features.contiguous()
    return slowfast_aggregate(features, layout, grid=grid, backend=backend)


def or_published(ours: Callable[[], Tensor], published: Callable[[], Tensor], name: str) -> Tensor:
    """The op's tokens; if it refuses the layout or the features, the published tokens or exception."""
    try:
        return ours()
    except (InputError, LayoutError) as error:
        reason = str(error)
    tokens = published()
    warn_once(f"{name} runs as published: {reason}")
    return tokens

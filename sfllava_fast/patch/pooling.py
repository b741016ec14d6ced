"""Replacement of a published pooling by the op, with a fallback to the published one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import InputError, LayoutError
from ..layouts.layout import Layout
from ..ops.aggregate import slowfast_aggregate
from ..patching import warn_once


def pool(features: Tensor, layout: Layout | str, grid: tuple[int, int] | None, backend: str) -> Tensor:
    """`slowfast_aggregate` of patches [T, N, D] with any strides. Returns tokens [S, D]."""
    if features.stride(-1) != 1:
        features = features.contiguous()
    return slowfast_aggregate(features, layout, grid=grid, backend=backend)


def or_published(ours: Callable[[], Tensor], published: Callable[[], Tensor], name: str) -> Tensor:
    """The op's result; if it raises InputError or LayoutError, the published one, which is logged once."""
    try:
        return ours()
    except (InputError, LayoutError) as error:
        reason = str(error)
    tokens = published()
    warn_once(f"{name} runs as published: {reason}")
    return tokens

"""Patch of the published SF-LLaVA code (github.com/apple/ml-slowfast-llava): our op replaces its poolings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor

from ..errors import LayoutError
from ..layouts.slowfast import SlowFastLayout
from ..patching import Patch
from .code_base import SLOWFAST_LLAVA, find_owner, replace_methods
from .pooling import or_published, pool

_ON_THE_GRID = {
    "spatial_2d_max_pool": "pool:each,stride2,stride2,max",
    "spatial_2d_avg_pool": "pool:each,stride2,stride2,mean",
    "spatial_temporal_pool": "pool:adaptive16,adaptive12,adaptive12,mean",
}
_FLATTENED = {
    "spatial_1d_max_pool": "pool:each,each,stride2,max",
    "spatial_1d_avg_pool": "pool:each,each,stride2,mean",
    "temporal_global_pool": "pool:adaptive1,each,each,mean",
}


def patch_slowfast_llava(
    target: Any = None, *, slowfast: bool = True, aggregation: bool = True, backend: str = "auto"
) -> Patch:
    """Replace the pooling of the published SF-LLaVA code.

    Tokens are [1, S, D] in the features' dtype, and differentiable. On a CPU they have the published bits in float64,
    float32, bfloat16 and float16, except for two means of 16-bit features, which are within the error budget:
    `spatial_temporal_pool` adds in float32 instead of 16 bits, and `temporal_global_pool` in another order.

    Features may have any strides. The published code raises on a CPU without gradients for `spatial_1d_max_pool`, the
    default, and for many slices of larger tensors, since it views tensors that are not contiguous.

    A name, slow method, dtype or grid that the op does not support runs the published method and is logged once.

    Args:
        target: A model, wrapped or not, or a class. None stands for the code base's LlavaMetaForCausalLM, which is
            imported.
        slowfast: Whether to replace `prepare_slowfast`.
        aggregation: Whether to replace `temporal_aggregation`.
        backend: As in `slowfast_aggregate`.

    Returns:
        The patch.

    Raises:
        PatchError: If the target is not this code base.
    """
    make: dict[str, Callable[[Callable], Callable]] = {}
    if slowfast:
        make["prepare_slowfast"] = partial(_prepare_slowfast, backend=backend)
    if aggregation:
        make["temporal_aggregation"] = partial(_temporal_aggregation, backend=backend)
    return replace_methods(find_owner(target, SLOWFAST_LLAVA), make)


def _prepare_slowfast(published: Callable, backend: str) -> Callable:
    @wraps(published)
    def prepare_slowfast(self, image_features: Tensor, temporal_aggregation: str) -> Tensor:
        return or_published(
            lambda: pool(image_features, _both_pathways(temporal_aggregation), None, backend)[None],
            lambda: published(self, image_features, temporal_aggregation),
            f"prepare_slowfast of {temporal_aggregation!r}",
        )

    return prepare_slowfast


def _temporal_aggregation(published: Callable, backend: str) -> Callable:
    @wraps(published)
    def temporal_aggregation(self, image_features: Tensor, temporal_aggregation: str) -> Tensor:
        return or_published(
            lambda: _aggregate(image_features, temporal_aggregation, backend)[None],
            lambda: published(self, image_features, temporal_aggregation),
            f"temporal_aggregation of {temporal_aggregation!r}",
        )

    return temporal_aggregation


def _both_pathways(name: str) -> SlowFastLayout:
    """The layout of a published string. Raises LayoutError for one pathway alone, which the published code has not."""
    layout = SlowFastLayout.parse(name)
    if not layout.slow_frames or not layout.fast_grid:
        raise LayoutError(f"layout {name!r} has one pathway only")
    return layout


def _aggregate(features: Tensor, name: str, backend: str) -> Tensor:
    _, patches, _ = features.shape
    if name == "concat":
        return features.flatten(0, 1)
    if name == "temporal_global_pool" and features.dtype.itemsize > 2:
        return features.mean(0)  # PyTorch's pairwise sum is more accurate than a sequential one
    if name in _FLATTENED:
        return pool(features, _FLATTENED[name], (1, patches), backend)
    if name in _ON_THE_GRID:
        return pool(features, _ON_THE_GRID[name], None, backend)
    raise LayoutError(f"unknown aggregation {name!r}")

"""Patch of the LLaVA-NeXT / LLaVA-Video code (github.com/LLaVA-VL/LLaVA-NeXT): pooling, newlines, slow-fast mode."""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..patching import Patch
from .code_base import LLAVA_NEXT, find_owner, replace_methods
from .pooling import or_published, pool

_REDUCTIONS = {"average": "mean", "max": "max"}
_PREPARE = "prepare_inputs_labels_for_multimodal"


def patch_llava_next(
    target: Any = None, *, pooling: bool = True, newline: bool = True, faster: bool = True, backend: str = "auto"
) -> Patch:
    """Replace the pooling and the token layout of videos in LLaVA-NeXT / LLaVA-Video code.

    Calls that are not supported run the published method and are logged once. On a CPU results have the published bits
    in float64, float32, bfloat16 and float16, except for averages over strides that are not a power of two: these are
    divided by rows and then by columns, and may differ by 1 ulp.

    Args:
        target: A model, wrapped or not, or a class. None stands for the code base's LlavaMetaForCausalLM, which is
            imported.
        pooling: Replaces `get_2dPool`, [T, N, D] to [T, n, D]. The modes `average` and `max` run our op and drop
            patches that do not fill a box. The mode `bilinear`, with ceil(side / stride) rows and columns, is not box
            pooling; it runs PyTorch's interpolation without the copies to and from channels first.
        newline: Replaces `add_token_per_grid`, with a newline after each row, and `add_token_per_frame`, with one after
            each frame. Both make one copy.
        faster: Replaces `prepare_inputs_labels_for_multimodal` if `config.add_faster_video` is set, patches are merged
            spatially, and newlines are by grid; the published code raises NameError then. Frames whose number is
            divisible by `config.faster_token_stride` are pooled as without the flag, the others by twice the stride.
            Each row ends with a newline and each frame with `model.faster_token`. Code in which the mode works is not
            replaced.
        backend: As in `slowfast_aggregate`.

    Returns:
        The patch.

    Raises:
        PatchError: If the target is not this code base as of August 2024 or later.
    """
    owner = find_owner(target, LLAVA_NEXT)
    make: dict[str, Callable[[Callable], Callable]] = {}
    if pooling:
        make["get_2dPool"] = partial(_get_2dpool, backend=backend)
    if newline:
        make["add_token_per_grid"] = _add_token_per_grid
        make["add_token_per_frame"] = _add_token_per_frame
    if faster and _reads_undefined(getattr(owner, _PREPARE, None), "all_faster_video_features"):
        make[_PREPARE] = _prepare_inputs
    return replace_methods(owner, make)


def _get_2dpool(published: Callable, backend: str) -> Callable:
    def boxes(features: Tensor, side: int, mode: str, stride: int) -> Tensor:
        layout = f"pool:each,stride{stride},stride{stride},{_REDUCTIONS.get(mode)}"
        tokens = pool(features, layout, (side, side), backend)
        return tokens.view(features.shape[0], -1, features.shape[2])

    @wraps(published)
    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        side, mode = self.get_vision_tower().num_patches_per_side, self.config.mm_spatial_pool_mode
        if mode == "bilinear":
            return _shrink(image_feature, side, math.ceil(side / stride))
        return or_published(
            lambda: boxes(image_feature, side, mode, stride),
            lambda: published(self, image_feature, stride),
            "get_2dPool",
        )

    return get_2dPool


def _shrink(features: Tensor, side: int, size: int) -> Tensor:
    """Bilinear [T, side * side, D] to [T, size * size, D], as channels last, which needs no copy."""
    channels_last = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(channels_last, size=(size, size), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)


def _add_token_per_grid(published: Callable) -> Callable:
    @wraps(published)
    def add_token_per_grid(self, image_feature: Tensor) -> Tensor:
        frames, patches, channels = image_feature.shape
        side = int(int(patches) ** 0.5)
        grid = image_feature.reshape(frames, side, side, channels)
        newline = self.model.image_newline.to(grid.device).expand(frames, side, 1, channels)
        rows = torch.cat((grid, newline), dim=2)
        return rows.flatten(1, 2) if getattr(self.config, "add_faster_video", False) else rows.flatten(0, 2)

    return add_token_per_grid


def _add_token_per_frame(published: Callable) -> Callable:
    @wraps(published)
    def add_token_per_frame(self, image_feature: Tensor) -> Tensor:
        frames, _, channels = image_feature.shape
        newline = self.model.image_newline.to(image_feature.device).expand(frames, 1, channels)
        return torch.cat((image_feature, newline), dim=1)

    return add_token_per_frame


def _prepare_inputs(published: Callable) -> Callable:
    """The published method. With add_faster_video it gets a view of the model whose pooling returns both pathways, and
    in which the flag is off, so that the branch with the undefined name does not run."""

    @wraps(published)
    def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
        if not _is_faster(self.config):
            return published(self, *args, **kwargs)
        seen = _View(
            self,
            config=_View(self.config, add_faster_video=False),
            get_2dPool=partial(_slow_and_faster, self),
            add_token_per_grid=lambda tokens: tokens,
        )
        return published(seen, *args, **kwargs)

    return prepare_inputs_labels_for_multimodal


def _is_faster(config: Any) -> bool:
    return (
        getattr(config, "add_faster_video", False)
        and getattr(config, "mm_newline_position", "one_token") == "grid"
        and getattr(config, "mm_patch_merge_type", "flat").startswith("spatial")
    )


def _slow_and_faster(model: Any, features: Tensor, stride: int = 2) -> Tensor:
    """All tokens [S, D] of a video's patches [T, N, D]."""
    every = model.config.faster_token_stride
    slow = model.add_token_per_grid(model.get_2dPool(features[::every], stride))
    faster = model.add_token_per_grid(model.get_2dPool(features, 2 * stride))
    end = model.model.faster_token[None].to(features.device)
    frames = [faster[t] if t % every else slow[t // every] for t in range(len(features))]
    return torch.cat([part for frame in frames for part in (frame, end)])


class _View:
    """An object with some of its attributes replaced."""

    def __init__(self, inner: Any, **others: Any) -> None:
        vars(self).update(others, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _reads_undefined(method: Any, name: str) -> bool:
    """Whether a method reads a global name that its module does not define."""
    function = inspect.unwrap(method)
    if not hasattr(function, "__code__"):
        return False
    loads = (step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL")
    return name in loads and name not in function.__globals__

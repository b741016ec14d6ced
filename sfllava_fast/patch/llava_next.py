"""LLaVA-NeXT / LLaVA-Video code (github.com/LLaVA-VL/LLaVA-NeXT): its pooling, its newlines, its slow-fast mode."""

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
    """Replace how LLaVA-NeXT / LLaVA-Video code pools videos and lays out their tokens.

    pooling: `get_2dPool`, [T, N, D] to [T, n, D]. `average` and `max` are our op, and drop what does not fill a box.
        `bilinear` makes ceil(side / stride) rows and columns, which is no box pooling: it is PyTorch's, without the
        copies to and from channels first. On a CPU bit for bit as published in float64, float32, bfloat16 and float16,
        but for averages over strides that are no power of two: divided by rows and columns in turn, they may differ by
        1 ulp.
    newline: `add_token_per_grid`, a newline behind each row, and `add_token_per_frame`, one behind each frame: one copy
        each, bit for bit.
    faster: `prepare_inputs_labels_for_multimodal` where `config.add_faster_video` is set, patches merge spatially, and
        newlines are by grid. There the published code raises NameError. Frames whose number divides by
        `config.faster_token_stride` are pooled as without the flag, the others by twice that stride; each row ends with
        a newline and each frame with `model.faster_token`. Code in which that mode works is left alone.
    target: a model, wrapped or not, a class, or None for the code base's own LlavaMetaForCausalLM, which is imported.
    backend: that of `slowfast_aggregate`.

    What cannot be taken over runs as published, raises what is published, and is named in the log once.
    Raises PatchError where the target is not that code base as it is since August 2024.
    """
    owner = find_owner(target, LLAVA_NEXT)
    make: dict[str, Callable[[Any], Callable]] = {}
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
    """Bilinear [T, side * side, D] to [T, size * size, D]: seen as channels last, no copy is needed."""
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
    """The published method; with add_faster_video it sees a model in which the pooling lays out both pathways, and the
    branch that needs a name that nothing defines is off."""

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
    """An object, but for some of its attributes."""

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

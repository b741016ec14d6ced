"""Patch of transformers >= 5: SlowFast tokens of videos for LLaVA models, and faster pooling for the video models.

Stock generation code is unchanged. The processor writes one placeholder a token, and the prefill replaces placeholders
by tokens.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, PatchError, check_count
from ..layouts.layout import Layout
from ..layouts.presets import choose_layout, parse_patches_only
from ..layouts.sampling import sample_frames
from ..model.checkpoint import TOWERS
from ..model.config_sizes import tower_grid
from ..model.tower import FRAMES_PER_PASS
from ..model.transformers_release import release
from ..ops.aggregate import slowfast_aggregate
from ..ops.projector import Mode, check_mode, project_and_aggregate
from ..patching import Patch, undo, warn_once
from ..video import open_video
from ..video.preprocess import PreprocessSpec, preprocess

_SUFFIX = "ForConditionalGeneration"
_IMAGE_MODELS = ("Llava", "LlavaNext")
_VIDEO_MODELS = ("LlavaNextVideo", "LlavaOnevision")
_VIDEO_TOKEN = "<video>"

Replacement = tuple[Any, str, Any]


def patch_transformers(
    target: Any,
    processor: Any = None,
    *,
    layout: str | Layout | None = None,
    frames: int | None = None,
    projector: Mode = "exact",
    backend: str = "auto",
    generate: bool = True,
    pooling: bool = True,
) -> Patch:
    """Give a stock transformers model SlowFast tokens of videos (arXiv 2407.15841).

    Weights, config and the files of `save_pretrained` are unchanged. `Patch.undo` restores the model.

    Args:
        target: A Llava, LlavaNext, LlavaNextVideo or LlavaOnevision ForConditionalGeneration, or one of these classes,
            for all its instances.
        processor: The model's processor, or None. It is patched too: `processor(text=..., videos=...)` takes files,
            folders and uint8 RGB frames [T, H, W, 3], and writes one placeholder a token.
        layout: Layout of the tokens. None stands for the one in the model's config, else the paper's; video models then
            keep their own.
        frames: Maximum number of frames that the processor samples from a video; None: as in
            `layouts.presets.choose_layout`. The video processors of video models sample themselves.
        projector: As the mode of `project_and_aggregate`.
        backend: As in `project_and_aggregate`.
        generate: Whether `forward` and `generate` take `pixel_values_videos`, [V, T, 3, h, w] or a list of [T, 3, h,
            w].
        pooling: Whether to replace the pooling of video models by a faster one with the same bits.

    Returns:
        The patch.

    Raises:
        PatchError: If the target or the processor is not supported. Nothing is changed.
        InputError: If `frames` or `projector` is wrong. Nothing is changed.
        LayoutError: If `layout` is wrong, or needs more than patches. Nothing is changed.
    """
    check_mode(projector)
    family, base = _find(target)
    named = {} if isinstance(target, type) else getattr(target.config, "sfllava_fast", None) or {}
    chosen, own_frames = choose_layout(layout, named)
    frames = own_frames if frames is None else frames
    check_count("frames", frames)
    is_named = layout is not None or "layout" in named or family in _IMAGE_MODELS
    layout = parse_patches_only(chosen) if generate and is_named else None
    if processor is not None:
        _check_processor(processor, family, target)
    undo(target)  # so that stock attributes are replaced, and called
    replacements: list[Replacement] = []
    if layout is not None:
        token = "image_token_id" if family in _IMAGE_MODELS else "video_token_id"
        replacements += _prompts(target, _Tokens(layout, projector, backend, token))
        if processor is not None:
            replacements += _placeholders(processor, layout, frames)
    if pooling and family in _VIDEO_MODELS:
        replacements += _pooling(base, family, backend)
    if not replacements:
        raise PatchError(f"nothing of {family}{_SUFFIX} would be replaced: set generate or pooling, or give a layout")
    return Patch(target, replacements)


def _find(target: Any) -> tuple[str, Any]:
    """The family of a model or class, and its encoder or the encoder's class. Raises PatchError for any other."""
    names = {f"{family}{_SUFFIX}": family for family in (*_IMAGE_MODELS, *_VIDEO_MODELS)}
    kind = target if isinstance(target, type) else type(target)
    stock = next((c for c in kind.__mro__ if c.__module__.startswith("transformers.") and c.__name__ in names), None)
    version = getattr(sys.modules.get("transformers"), "__version__", "0")
    if stock is None or int(version.split(".")[0]) < 5:
        found = kind.__name__ if stock is None else f"{stock.__name__} of {release()}"
        known = f"{', '.join(names)}, or an instance, of transformers >= 5"
        raise PatchError(f"{found} is not supported: give {known} ({release()} is loaded)")
    family = names[stock.__name__]
    if isinstance(target, type):
        base = getattr(sys.modules[stock.__module__], f"{family}Model")
    else:
        base, tower = target.model, target.config.vision_config.model_type
        if tower not in TOWERS:
            raise PatchError(f"the vision tower {tower} has no fixed grid: supported are {' and '.join(TOWERS)}")
    return family, base


def _need(owner: Any, name: str, *parameters: str) -> None:
    """Raise PatchError unless the owner has the method with these parameters."""
    method = getattr(owner, name, None)
    lacking = [p for p in parameters if method and p not in inspect.signature(method).parameters]
    if method is None or lacking:
        what = f"{(owner if isinstance(owner, type) else type(owner)).__name__}.{name}"
        found = f"{what} without {lacking[0]}" if method else f"no {what}"
        raise PatchError(f"{release()} has {found}, which this patch needs: use 5.17, 5.23 or 5.24, which are tested")


def _around(owner: Any, name: str, wrapper: Callable, *settings: Any, extra: str | None = None) -> Replacement:
    """The replacement of a method by `wrapper(self, stock, *settings, ...)`, on an instance or a class.

    Args:
        owner: The instance or class.
        name: The method.
        wrapper: The new method.
        settings: Arguments of the wrapper.
        extra: A parameter to add to the signature, which `generate` reads.
    """
    own = None if isinstance(owner, type) else vars(owner).get(name)
    held = inspect.getattr_static(owner if isinstance(owner, type) else type(owner), name)
    function: FunctionType = getattr(held, "__func__", held)

    @functools.wraps(function)
    def method(self, *args, **kwargs):
        return wrapper(self, own or held.__get__(self, type(self)), *settings, *args, **kwargs)

    if extra and extra not in inspect.signature(function).parameters:
        parameters = list(inspect.signature(function).parameters.values())
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        parameters.insert(at, inspect.Parameter(extra, inspect.Parameter.KEYWORD_ONLY, default=None))
        vars(method)["__signature__"] = inspect.Signature(parameters)
    # A bound method, unlike a closure over the instance, is bound to the copy when the instance is copied.
    return owner, name, method if isinstance(owner, type) else MethodType(method, owner)


@dataclass(frozen=True)
class _Tokens:
    """Tokens of videos.

    Attributes:
        layout: As in `patch_transformers`.
        projector: As in `patch_transformers`.
        backend: As in `patch_transformers`.
        placeholder: The config's attribute with the id of the placeholders.
    """

    layout: Layout
    projector: Mode
    backend: str
    placeholder: str

    def count(self, model: Any, video: Tensor) -> int:
        """Number of tokens of a video [T, 3, h, w]."""
        return self.layout.count_tokens(len(video), tower_grid(model.config.vision_config))

    def places(self, model: Any, input_ids: Tensor) -> Tensor:
        """The mask of placeholders, with the shape of input_ids."""
        return input_ids == getattr(model.config, self.placeholder)

    def make(
        self, base: Any, videos: Sequence[Tensor], select: dict[str, Any], out: Tensor | None = None
    ) -> list[Tensor]:
        """Tokens [S, D] of each video [T, 3, h, w], in one launch, written to `out` if given."""
        offsets = [0]
        for video in videos:
            offsets.append(offsets[-1] + len(video))
        tokens, ends = project_and_aggregate(
            _patches(base, torch.cat(list(videos)) if len(videos) > 1 else videos[0], **select),
            base.multi_modal_projector,
            self.layout,
            mode=self.projector,
            out=out,
            backend=self.backend,
            grid=tower_grid(base.config.vision_config),
            frame_offsets=torch.tensor(offsets),
        )
        edges = ends.tolist()
        return [tokens[start:stop] for start, stop in zip(edges, edges[1:])]


def _patches(base: Any, pixels: Tensor, vision_feature_layer: Any, vision_feature_select_strategy: Any) -> Tensor:
    """Patch features [F, N, C] of pixels [F, 3, h, w], in passes of similar size. None is the config's value."""
    layer = base.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
    first = (vision_feature_select_strategy or base.config.vision_feature_select_strategy) == "default"
    passes = math.ceil(len(pixels) / FRAMES_PER_PASS)
    parts = []
    for part in pixels.split(math.ceil(len(pixels) / passes)):
        states = base.vision_tower(part, output_hidden_states=True, return_dict=True).hidden_states
        picked = [states[i] for i in ([layer] if isinstance(layer, int) else layer)]
        parts.append((torch.cat(picked, dim=-1) if len(picked) > 1 else picked[0])[:, first:])
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _prompts(target: Any, tokens: _Tokens) -> list[Replacement]:
    """The replacements that pass videos from `generate` to the prompt's embeddings."""
    _need(target, "forward", "input_ids", "pixel_values", "inputs_embeds", "vision_feature_layer")
    _need(target, "prepare_inputs_for_generation", "is_first_iteration")
    _need(target, "_expand_inputs_for_generation", "expand_size", "input_ids")
    replacements = [
        _around(target, "forward", _forward, tokens, extra="pixel_values_videos"),
        _around(target, "prepare_inputs_for_generation", _prepare_inputs),
        _around(target, "_expand_inputs_for_generation", _expand_inputs, tokens),
    ]
    if "video" in target.input_modalities:  # later releases would encode videos before forward
        replacements.append((target, "input_modalities", tuple(m for m in target.input_modalities if m != "video")))
    return replacements


def _forward(self, stock, tokens: _Tokens, input_ids=None, *args, **kwargs):
    if args:
        kwargs |= zip(list(inspect.signature(stock).parameters)[1:], args)
    videos = kwargs.pop("pixel_values_videos", None)
    if videos is None or not len(videos):
        return stock(input_ids, **kwargs)
    images = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")
    if images and tokens.placeholder == "image_token_id":
        raise InputError("a prompt may have images or videos, not both: this model has one placeholder for both")
    if input_ids is None or kwargs.pop("inputs_embeds", None) is not None:
        raise InputError("pixel_values_videos need input_ids, not inputs_embeds: the placeholders are ids")
    select = {name: kwargs.get(name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    return stock(None, inputs_embeds=_embed(self, input_ids, list(videos), tokens, select), **kwargs)


def _embed(model, input_ids: Tensor, videos: list[Tensor], tokens: _Tokens, select: dict[str, Any]) -> Tensor:
    """The prompts' embeddings [B, P, D], with the videos' tokens in place of the placeholders."""
    _by_row(model, input_ids, videos, tokens)  # checks, before anything is encoded
    embeds = model.get_input_embeddings()(input_ids)
    mask = tokens.places(model, input_ids)
    places = mask.flatten().nonzero().flatten().tolist()
    seen = {id(video): video for video in videos}  # videos of repeated prompts are encoded once
    contiguous = len(seen) == len(videos) and places[-1] - places[0] == len(places) - 1
    if contiguous and not torch.is_grad_enabled() and _is_alike(model.model.multi_modal_projector, embeds):
        rows = embeds.view(-1, embeds.shape[-1])[places[0] : places[-1] + 1]
        tokens.make(model.model, videos, select, rows)
        return embeds
    made = dict(zip(seen, tokens.make(model.model, list(seen.values()), select)))
    packed = torch.cat([made[id(video)] for video in videos]).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(mask[..., None].to(embeds.device), packed)


def _is_alike(projector: torch.nn.Module, embeds: Tensor) -> bool:
    """Whether the projector has the embeddings' dtype and device: it may be quantized or offloaded."""
    weight = next(projector.parameters())
    same = weight.dtype == embeds.dtype and weight.device == embeds.device
    return same and not torch.is_autocast_enabled(embeds.device.type)


def _by_row(model: Any, input_ids: Tensor, videos: Sequence[Tensor], tokens: _Tokens) -> list[list[Tensor]]:
    """The videos of each prompt, by its placeholders. Raises InputError unless there is one a token."""
    rows: list[list[Tensor]] = []
    left = list(videos)
    counts = tokens.places(model, input_ids).sum(1).tolist()
    for number, count in enumerate(counts):
        row, made = [], 0
        while made < count and left:
            row.append(left.pop(0))
            made += tokens.count(model, row[-1])
        if made != count:
            raise InputError(
                f"prompt {number} has {count} placeholders and its {len(row)} videos make {made} tokens of "
                f"{tokens.layout}: write the prompt with the patched processor"
            )
        rows.append(row)
    if left:
        raise InputError(f"{len(left)} of {len(videos)} videos have no placeholders: write one a video in the text")
    return rows


def _prepare_inputs(self, stock, *args, is_first_iteration=False, **kwargs):
    """Without this, transformers 5.0 would pass the pixels to every decoding step."""
    inputs = stock(*args, is_first_iteration=is_first_iteration, **kwargs)
    if not is_first_iteration and kwargs.get("use_cache", True):
        inputs.pop("pixel_values_videos", None)
    return inputs


def _expand_inputs(self, stock, tokens: _Tokens, expand_size=1, *, input_ids=None, pixel_values_videos=None, **kwargs):
    """With beams or several answers, each copy of a prompt gets all videos of the prompt."""
    if pixel_values_videos is not None and expand_size > 1:
        rows = _by_row(self, input_ids, list(pixel_values_videos), tokens)
        pixel_values_videos = [video for row in rows for video in row * expand_size]
    expanded, others = stock(expand_size=expand_size, input_ids=input_ids, **kwargs)
    return expanded, others | {"pixel_values_videos": pixel_values_videos}


def _check_processor(processor: Any, family: str, target: Any) -> None:
    """Raise PatchError unless the processor is the model's and its placeholders can be replaced."""
    found = type(processor).__name__
    if f"{family}Processor" not in [c.__name__ for c in type(processor).__mro__]:
        raise PatchError(f"{found} is not the processor of {family}{_SUFFIX}: give a {family}Processor")
    _need(processor, "_process_videos")
    _need(processor, "replace_video_token", "video_inputs", "video_idx")
    if isinstance(target, type) or family == "LlavaOnevision":
        return
    patch = target.config.vision_config.patch_size
    if processor.patch_size != patch:
        raise PatchError(f"the processor's patch_size is {processor.patch_size} and the model's {patch}: set it")


def _placeholders(processor: Any, layout: Layout, frames: int) -> list[Replacement]:
    """The replacements in the processor: one placeholder a token and, for an image model, video processing."""
    replacements = [_around(processor, "replace_video_token", _replace_video_token, layout)]
    if isinstance(getattr(processor, "video_processor", None), _VideoProcessor):
        raise PatchError("the processor is already patched with another model: undo that, or load another processor")
    if not hasattr(processor, "video_processor"):
        spec = PreprocessSpec.from_processor(processor.image_processor)
        replacements += [
            (processor, "video_token", _VIDEO_TOKEN),
            (processor, "video_processor", _VideoProcessor(frames, spec)),
            (processor, "skip_tensor_conversion", [*processor.skip_tensor_conversion, "pixel_values_videos"]),
        ]
    return replacements


def _replace_video_token(self, stock, layout: Layout, video_inputs, video_idx=0, **_) -> str:
    video = video_inputs["pixel_values_videos"][video_idx]
    if getattr(self, "patch_size", None):
        grid = tuple(pixels // self.patch_size for pixels in video[0].shape[-2:])
    else:
        grid = (math.isqrt(self.num_image_tokens),) * 2
    token = self.video_token if getattr(self, "video_token_id", None) is not None else self.image_token
    return token * layout.count_tokens(len(video), grid)


@dataclass(frozen=True)
class _VideoProcessor:
    """Samples and preprocesses videos as the engine does."""

    frames: int
    spec: PreprocessSpec

    def __call__(self, videos: Any, num_frames: int | None = None, **others: Any) -> dict[str, Any]:
        """Pixels [V, T, 3, h, w] of videos, or a list of [T, 3, h, w] if they differ in length."""
        from transformers.video_utils import make_batched_videos

        if ignored := {name for name, value in others.items() if value is not None} - {"return_tensors"}:
            warn_once(f"videos are read without {', '.join(sorted(ignored))}: only num_frames is supported")
        pixels = []
        for video in map(open_video, make_batched_videos(videos)):
            chosen = sample_frames(video.total, num_frames or self.frames)
            pixels.append(preprocess(video.frames(chosen), self.spec))
        return {"pixel_values_videos": torch.stack(pixels) if len(set(map(len, pixels))) == 1 else pixels}


def _pooling(base: Any, family: str, backend: str) -> list[Replacement]:
    """The replacement of a video model's pooling by a faster one with the same bits."""
    if family == "LlavaOnevision":
        _need(base, "apply_pooling", "image_features")
        return [_around(base, "apply_pooling", _halve)]
    pooler = sys.modules[base.__module__].LlavaNextVideoPooler if isinstance(base, type) else base.vision_resampler
    _need(pooler, "forward", "image_features")
    return [_around(pooler, "forward", _pool, backend)]


def _pool(self, stock, backend: str, image_features: Tensor) -> Tensor:
    """Averages or maxima of stride x stride patches, [F, N, C] to [F, N / stride^2, C]."""
    reduce = {"AvgPool2d": "mean", "MaxPool2d": "max"}.get(type(self.pool).__name__)
    stride = self.pool.stride
    if reduce is None or (reduce == "mean" and stride & (stride - 1)):
        warn_once(f"the pooling {self.pool} is not replaced: the op has no pooling with the same bits")
        return stock(image_features)
    tokens = slowfast_aggregate(image_features, f"pool:each,stride{stride},stride{stride},{reduce}", backend=backend)
    return tokens.view(len(image_features), -1, image_features.shape[2])


def _halve(self, stock, image_features: Tensor) -> Tensor:
    """Bilinear [F, N, C] to half the sides, rounded up, without the two copies of NCHW."""
    height, width = tower_grid(self.config.vision_config)
    patches = image_features.view(len(image_features), height, width, -1).permute(0, 3, 1, 2)
    size = (math.ceil(height / 2), math.ceil(width / 2))
    return F.interpolate(patches, size=size, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)

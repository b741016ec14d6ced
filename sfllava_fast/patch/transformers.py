"""transformers >= 5: videos for LLaVA-1.5 and LLaVA-NeXT; SlowFast tokens, or their own sooner, for the video variants.

Stock generation code runs as it is. What is added: placeholders by the processor, as many as there will be tokens, and
tokens in their place at the prefill.
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
    """Give a stock transformers model SlowFast tokens of videos (arXiv 2407.15841); `Patch.undo` takes them back.

    target: a Llava, LlavaNext, LlavaNextVideo or LlavaOnevision ForConditionalGeneration, or one of these classes, for
        every instance of it. Weights, config and what `save_pretrained` writes stay as they are.
    processor: this model's, to be patched with it, so that `processor(text=..., videos=...)` takes files, folders and
        uint8 RGB frames [T, H, W, 3], and writes as many placeholders as there will be tokens.
    layout: of the tokens. None is what the model's config names, else the paper's; the video variants then keep theirs.
    frames: how many the processor samples of a video (fewer where it is shorter); None is what the layout's name or the
        config says, else 50. The video variants' own video processors sample by themselves.
    projector, backend: as in `project_and_aggregate`.
    generate: whether `forward` and `generate` take `pixel_values_videos`: [V, T, 3, h, w], or a list of [T, 3, h, w].
    pooling: whether the video variants' own pooling is replaced by a faster one of the same bits.

    Raises PatchError for anything else, and then nothing is changed.
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
    undo(target)  # what is replaced now, and what it calls, are the stock attributes
    replacements: list[Replacement] = []
    if layout is not None:
        token = "image_token_id" if family in _IMAGE_MODELS else "video_token_id"
        replacements += _prompts(target, _Tokens(layout, projector, backend, token))
        if processor is not None:
            replacements += _placeholders(processor, layout, frames)
    if pooling and family in _VIDEO_MODELS:
        replacements += _pooling(base, family, backend)
    if not replacements:
        raise PatchError(f"nothing of {family}{_SUFFIX} is left to replace: set generate or pooling, or give a layout")
    return Patch(target, replacements)


def _find(target: Any) -> tuple[str, Any]:
    """The family of a model or class, and the module that encodes, or its class. PatchError for any other."""
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
    """PatchError unless the method that is to be replaced is there and takes these parameters."""
    method = getattr(owner, name, None)
    lacking = [p for p in parameters if method and p not in inspect.signature(method).parameters]
    if method is None or lacking:
        what = f"{(owner if isinstance(owner, type) else type(owner)).__name__}.{name}"
        found = f"{what} without {lacking[0]}" if method else f"no {what}"
        known = "5.17, 5.23 and 5.24 are known to work"
        raise PatchError(f"{release()} has {found}, which this patch needs: {known}")


def _around(owner: Any, name: str, wrapper: Callable, *settings: Any, extra: str | None = None) -> Replacement:
    """A method replaced by `wrapper(self, stock, *settings, ...)`, on an instance or a class.

    extra: a parameter beyond those of the stock method, for those who read signatures, as `generate` does.
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
    """How tokens are made of videos, and how many."""

    layout: Layout
    projector: Mode
    backend: str
    placeholder: str  # what the config calls the id that they take the place of

    def count(self, model: Any, video: Tensor) -> int:
        return self.layout.count_tokens(len(video), tower_grid(model.config.vision_config))

    def places(self, model: Any, input_ids: Tensor) -> Tensor:
        """Where the placeholders are, a mask like input_ids."""
        return input_ids == getattr(model.config, self.placeholder)

    def make(
        self, base: Any, videos: Sequence[Tensor], select: dict[str, Any], out: Tensor | None = None
    ) -> list[Tensor]:
        """Tokens [S, D] of each video of pixels [T, 3, h, w], in one launch; written into out, where given."""
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
    """Patch features [F, N, C] of pixels [F, 3, h, w], in passes that fit memory; the config's choice for None."""
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
    """What takes videos from `generate` to the prompt's embeddings."""
    _need(target, "forward", "input_ids", "pixel_values", "inputs_embeds", "vision_feature_layer")
    _need(target, "prepare_inputs_for_generation", "is_first_iteration")
    _need(target, "_expand_inputs_for_generation", "expand_size", "input_ids")
    replacements = [
        _around(target, "forward", _forward, tokens, extra="pixel_values_videos"),
        _around(target, "prepare_inputs_for_generation", _prepare_inputs),
        _around(target, "_expand_inputs_for_generation", _expand_inputs, tokens),
    ]
    if "video" in target.input_modalities:  # else later releases encode videos before they call forward
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
        raise InputError("prompts have images or videos, not both: this model has one placeholder for the two")
    if input_ids is None or kwargs.pop("inputs_embeds", None) is not None:
        raise InputError("pixel_values_videos go with input_ids, not with inputs_embeds: the placeholders are ids")
    select = {name: kwargs.get(name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    return stock(None, inputs_embeds=_embed(self, input_ids, list(videos), tokens, select), **kwargs)


def _embed(model, input_ids: Tensor, videos: list[Tensor], tokens: _Tokens, select: dict[str, Any]) -> Tensor:
    """The prompts' embeddings [B, P, D], the videos' tokens in their places."""
    _by_row(model, input_ids, videos, tokens)  # before anything is encoded
    embeds = model.get_input_embeddings()(input_ids)
    mask = tokens.places(model, input_ids)
    places = mask.flatten().nonzero().flatten().tolist()
    seen = {id(video): video for video in videos}  # a prompt that is repeated is encoded once
    adjoin = len(seen) == len(videos) and places[-1] - places[0] == len(places) - 1
    if adjoin and not torch.is_grad_enabled() and _is_alike(model.model.multi_modal_projector, embeds):
        rows = embeds.view(-1, embeds.shape[-1])[places[0] : places[-1] + 1]
        tokens.make(model.model, videos, select, rows)
        return embeds
    made = dict(zip(seen, tokens.make(model.model, list(seen.values()), select)))
    packed = torch.cat([made[id(video)] for video in videos]).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(mask[..., None].to(embeds.device), packed)


def _is_alike(projector: torch.nn.Module, embeds: Tensor) -> bool:
    """Whether the projector makes what the embeddings are made of: it may be elsewhere, quantized or offloaded."""
    weight = next(projector.parameters())
    same = weight.dtype == embeds.dtype and weight.device == embeds.device
    return same and not torch.is_autocast_enabled(embeds.device.type)


def _by_row(model: Any, input_ids: Tensor, videos: Sequence[Tensor], tokens: _Tokens) -> list[list[Tensor]]:
    """Each prompt's videos, which its placeholders tell. InputError unless there are as many as tokens."""
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
                f"{tokens.layout}: let the patched processor write them"
            )
        rows.append(row)
    if left:
        raise InputError(f"{len(left)} of {len(videos)} videos have no placeholders: name each in the text")
    return rows


def _prepare_inputs(self, stock, *args, is_first_iteration=False, **kwargs):
    """transformers 5.0 would hand the pixels to every step."""
    inputs = stock(*args, is_first_iteration=is_first_iteration, **kwargs)
    if not is_first_iteration and kwargs.get("use_cache", True):
        inputs.pop("pixel_values_videos", None)
    return inputs


def _expand_inputs(self, stock, tokens: _Tokens, expand_size=1, *, input_ids=None, pixel_values_videos=None, **kwargs):
    """Beams and several answers: each copy of a prompt has all of the prompt's videos."""
    if pixel_values_videos is not None and expand_size > 1:
        rows = _by_row(self, input_ids, list(pixel_values_videos), tokens)
        pixel_values_videos = [video for row in rows for video in row * expand_size]
    expanded, others = stock(expand_size=expand_size, input_ids=input_ids, **kwargs)
    return expanded, others | {"pixel_values_videos": pixel_values_videos}


def _check_processor(processor: Any, family: str, target: Any) -> None:
    """PatchError unless the processor belongs to the model and its placeholders can be written."""
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
    """The processor's part: as many placeholders as tokens, and for an image model's the videos themselves."""
    replacements = [_around(processor, "replace_video_token", _replace_video_token, layout)]
    if isinstance(getattr(processor, "video_processor", None), _VideoProcessor):
        raise PatchError("the processor is patched already, with another model: undo that, or load another processor")
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
    """Sampled and preprocessed as the engine does it."""

    frames: int
    spec: PreprocessSpec

    def __call__(self, videos: Any, num_frames: int | None = None, **others: Any) -> dict[str, Any]:
        """Pixels [V, T, 3, h, w] of videos, or a list of [T, 3, h, w] where they are not of one length."""
        from transformers.video_utils import make_batched_videos

        if ignored := {name for name, value in others.items() if value is not None} - {"return_tensors"}:
            warn_once(f"the videos are read without {', '.join(sorted(ignored))}: num_frames is what is known here")
        pixels = []
        for video in map(open_video, make_batched_videos(videos)):
            chosen = sample_frames(video.total, num_frames or self.frames)
            pixels.append(preprocess(video.frames(chosen), self.spec))
        return {"pixel_values_videos": torch.stack(pixels) if len(set(map(len, pixels))) == 1 else pixels}


def _pooling(base: Any, family: str, backend: str) -> list[Replacement]:
    """A video variant's own pooling, the same bits sooner."""
    if family == "LlavaOnevision":
        _need(base, "apply_pooling", "image_features")
        return [_around(base, "apply_pooling", _halve)]
    pooler = sys.modules[base.__module__].LlavaNextVideoPooler if isinstance(base, type) else base.vision_resampler
    _need(pooler, "forward", "image_features")
    return [_around(pooler, "forward", _pool, backend)]


def _pool(self, stock, backend: str, image_features: Tensor) -> Tensor:
    """Patches [F, N, C] averaged, or their maxima, by stride x stride: [F, N / stride^2, C]."""
    reduce = {"AvgPool2d": "mean", "MaxPool2d": "max"}.get(type(self.pool).__name__)
    stride = self.pool.stride
    if reduce is None or (reduce == "mean" and stride & (stride - 1)):
        warn_once(f"the pooling {self.pool} stays transformers': the op has no pooling of the same bits")
        return stock(image_features)
    tokens = slowfast_aggregate(image_features, f"pool:each,stride{stride},stride{stride},{reduce}", backend=backend)
    return tokens.view(len(image_features), -1, image_features.shape[2])


def _halve(self, stock, image_features: Tensor) -> Tensor:
    """Bilinear [F, N, C] to half the sides, rounded up, without the two copies that NCHW takes."""
    height, width = tower_grid(self.config.vision_config)
    patches = image_features.view(len(image_features), height, width, -1).permute(0, 3, 1, 2)
    size = (math.ceil(height / 2), math.ceil(width / 2))
    return F.interpolate(patches, size=size, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)

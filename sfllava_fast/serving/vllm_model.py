"""LLaVA-1.5 and LLaVA-NeXT in vLLM, with videos as SlowFast-LLaVA's tokens (arXiv 2407.15841, section 3.2).

These are vLLM's models with videos added: frames pass the tower, the projector and the aggregator. As in the published
prompts, <image> is the placeholder of a video.
"""

# The mixins call methods of the vLLM classes that they are combined with.
# mypy: disable-error-code="attr-defined,misc"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import PromptReplacement

from ..errors import CheckpointError, InputError
from ..layouts.sampling import sample_frames
from ..ops.projector import project_and_aggregate
from ..video.preprocess import PreprocessSpec, preprocess
from .settings import VideoSettings


class _VideoParser(MultiModalDataParser):
    """Samples videos that are passed as frames. The frames of a video backend are sampled already."""

    def __init__(self, frames: int, **settings: Any) -> None:
        super().__init__(video_needs_metadata=True, **settings)
        self.frames = frames

    def _get_video_with_metadata(self, video: Any) -> tuple[Any, dict[str, Any]]:
        video, metadata = super()._get_video_with_metadata(video)
        if metadata is not None:
            return video, metadata
        indices = sample_frames(len(video), self.frames)
        return video[indices], {"frames_indices": indices}


class _VideoInfo:
    """Mixin with vLLM's information about videos, next to a parent with that about images."""

    @cached_property
    def settings(self) -> VideoSettings:
        return VideoSettings.from_config(self.get_hf_config())

    @cached_property
    def frames(self) -> int:
        """Number of frames to sample unless the request has another: of --media-io-kwargs, else of the config."""
        return self.ctx.get_mm_config().media_io_kwargs.get("video", {}).get("num_frames", self.settings.frames)

    @cached_property
    def preprocess_spec(self) -> PreprocessSpec:
        spec = PreprocessSpec.from_processor(self.ctx.get_hf_image_processor_config())
        side = self.get_hf_config().vision_config.image_size
        if spec.made(side, side) != (side, side):
            raise CheckpointError(
                f"the image processor does not make {side}x{side} pictures, which the vision tower needs: "
                "set size and crop_size in preprocessor_config.json"
            )
        return spec

    def get_data_parser(self) -> MultiModalDataParser:
        return _VideoParser(self.frames, expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def parse_mm_data(self, mm_data: Mapping[str, Any], *, validate: bool = True) -> Any:
        items = super().parse_mm_data(mm_data, validate=validate)
        if validate and len(items) > 1:
            # Both have the placeholder <image> and could not be told apart.
            raise InputError("a prompt may have images or videos, not both: send two requests")
        return items

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens(), "video": self.settings.count_tokens(self.frames)}


class _NextInfo(_VideoInfo, LlavaNextProcessingInfo):
    pass


class _Info(_VideoInfo, LlavaProcessingInfo):
    pass


class _VideoDummyInputs(LlavaDummyInputsBuilder):
    """Inputs with which vLLM measures its memory: the longest videos of the settings."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return super().get_dummy_text({"image": sum(mm_counts.values())})

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        side = self.info.get_hf_config().vision_config.image_size
        videos = self._get_dummy_videos(
            width=side,
            height=side,
            num_frames=self.info.frames,
            num_videos=mm_counts.get("video", 0),
            overrides=mm_options.get("video"),
        )
        return {**super().get_dummy_mm_data(seq_len, mm_counts, mm_options), "video": videos}


class _VideoProcessor:
    """Mixin that converts frames to pixel values and placeholders, next to a parent for images."""

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str | None:
        return super()._get_hf_mm_text({"image": mm_counts.get("image", 0)})

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        videos, rest = hf_data.get("videos"), {key: data for key, data in hf_data.items() if key != "videos"}
        processed = super()._call_hf_processor(rest, hf_kwargs) if "images" in rest else BatchFeature()
        if videos:
            spec, dtype = self.info.preprocess_spec, self.info.ctx.model_config.dtype
            pixels = [preprocess(torch.as_tensor(frames), spec, dtype) for frames, _ in videos]
            processed["pixel_values_videos"] = torch.cat(pixels)
            processed["video_frames"] = torch.tensor([len(video) for video in pixels])
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        counts = hf_inputs.get("video_frames", torch.empty(0, dtype=torch.int64))
        return {
            **super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs),
            # Frames are packed within and over requests, as one launch of the aggregator reads them.
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", counts),
            "video_frames": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_config().image_token_index

        def placeholders(item: int) -> list[int]:
            frames = int(out_mm_kwargs["video"][item]["video_frames"].data)
            return [token] * self.info.settings.count_tokens(frames)

        images = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [*images, PromptReplacement(modality="video", target=[token], replacement=placeholders)]


class _NextProcessor(_VideoProcessor, LlavaNextMultiModalProcessor):
    pass


class _Processor(_VideoProcessor, LlavaMultiModalProcessor):
    pass


class _SlowFast:
    """Mixin of a vLLM LLaVA that embeds videos too."""

    supports_tower_connector_lora = False

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return super().get_placeholder_str("image" if modality.startswith("video") else modality, i)

    def _mark_tower_model(self, vllm_config: Any, modalities: Any, **options: Any) -> Any:
        """The tower is used for both modalities, and is only omitted if neither is allowed."""
        return super()._mark_tower_model(vllm_config, {"image", "video"}, **options)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings [S, D] of every image or video. All videos are computed in one launch.

        Args:
            kwargs: For videos, `pixel_values_videos` [T, 3, h, w] with the frames of all videos, and `video_frames`
                with the number of frames of each.
        """
        if "pixel_values_videos" not in kwargs:
            return super().embed_multimodal(**kwargs)
        settings, counts = self._settings, kwargs["video_frames"].flatten().tolist()
        hidden = self._image_pixels_to_features(self.vision_tower, kwargs["pixel_values_videos"])
        tokens, _ = project_and_aggregate(
            hidden,
            self.multi_modal_projector,
            settings.layout,
            grid=settings.grid,
            frame_offsets=[0, *accumulate(counts)],
        )
        return tokens.split([settings.count_tokens(frames) for frames in counts])

    @cached_property
    def _settings(self) -> VideoSettings:
        return VideoSettings.from_config(self.config)


@MULTIMODAL_REGISTRY.register_processor(_NextProcessor, info=_NextInfo, dummy_inputs=_VideoDummyInputs)
class SlowFastLlavaNextForConditionalGeneration(_SlowFast, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, for unchanged checkpoints."""


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=_VideoDummyInputs)
class SlowFastLlavaForConditionalGeneration(_SlowFast, LlavaForConditionalGeneration):
    """LLaVA-1.5, for unchanged checkpoints."""

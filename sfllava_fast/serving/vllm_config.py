"""vLLM's configuration of our architectures, before it loads a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..errors import CheckpointError
from .settings import VideoSettings
from .vllm_video import VIDEO_BACKEND

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# By the checkpoint's model type: the stock architecture with the prefix SlowFast.
ARCHITECTURES = {
    "llava": "SlowFastLlavaForConditionalGeneration",
    "llava_next": "SlowFastLlavaNextForConditionalGeneration",
}


class SlowFastModelConfig(VerifyAndUpdateConfig):
    """Checks the config, and sets our video backend and number of frames unless --media-io-kwargs has others."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config, fitting = model_config.hf_config, ARCHITECTURES.get(model_config.hf_config.model_type)
        if model_config.architecture != fitting:
            remedy = f"name {fitting} in --hf-overrides" if fitting else "use a LLaVA-1.5 or LLaVA-NeXT checkpoint"
            raise CheckpointError(
                f"{model_config.architecture} does not support a {config.model_type} checkpoint: {remedy}"
            )
        settings = VideoSettings.from_config(config)
        if model_config.multimodal_config is not None:
            video = model_config.multimodal_config.media_io_kwargs.setdefault("video", {})
            video.setdefault("video_backend", VIDEO_BACKEND)
            video.setdefault("num_frames", settings.frames)

"""What vLLM sets up for our architectures before it loads anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..errors import CheckpointError
from .settings import VideoSettings
from .vllm_plugin import VIDEO_BACKEND

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_MODEL_TYPES = {"SlowFastLlavaForConditionalGeneration": "llava", "SlowFastLlavaNextForConditionalGeneration": "llava_next"}


class SlowFastModelConfig(VerifyAndUpdateConfig):
    """Checks the "sfllava_fast" entry of the config; has videos decoded and sampled by us unless the user says otherwise."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config, architecture = model_config.hf_config, model_config.architecture
        if config.model_type != _MODEL_TYPES[architecture]:
            fitting = [name for name, model_type in _MODEL_TYPES.items() if model_type == config.model_type]
            raise CheckpointError(
                f"{architecture} does not serve a {config.model_type} checkpoint: "
                + (f"name {fitting[0]} in --hf-overrides" if fitting else "use a LLaVA-1.5 or LLaVA-NeXT one")
            )
        settings = VideoSettings.from_config(config)
        if model_config.multimodal_config is not None:
            video = model_config.multimodal_config.media_io_kwargs.setdefault("video", {})
            video.setdefault("video_backend", VIDEO_BACKEND)
            video.setdefault("num_frames", settings.frames)

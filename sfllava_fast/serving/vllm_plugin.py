"""The entry point that vLLM calls in each of its processes (group vllm.general_plugins)."""

from __future__ import annotations

import logging

log = logging.getLogger("sfllava_fast")

# vLLM's model interface changes with every minor release. tests/serving/test_vllm.py ran with 0.31 and 0.32; of 0.33,
# which has no build for CPUs, the files that we use were compared with 0.32's.
SUPPORTED = ((0, 31), (0, 32), (0, 33))


def register() -> None:
    """Register the models and the video backend with vLLM, without importing the models.

    With an unsupported vLLM it logs an error and registers nothing: an exception would end vLLM for all models.
    """
    import vllm

    if reason := why_unsupported(vllm.__version__):
        log.error("%s", reason)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from .vllm_config import ARCHITECTURES, SlowFastModelConfig
    from .vllm_video import VIDEO_BACKEND, SlowFastVideoLoader

    VIDEO_LOADER_REGISTRY.register(VIDEO_BACKEND)(SlowFastVideoLoader)
    for architecture in ARCHITECTURES.values():
        MODELS_CONFIG_MAP[architecture] = SlowFastModelConfig
        vllm.ModelRegistry.register_model(architecture, f"sfllava_fast.serving.vllm_model:{architecture}")


def why_unsupported(version: str) -> str | None:
    """Why a version of vLLM is not supported; None if it is."""
    if tuple(version.split(".")[:2]) in [tuple(map(str, minor)) for minor in SUPPORTED]:
        return None
    *earlier, last = (f"{major}.{minor}" for major, minor in SUPPORTED)
    known = f"{', '.join(earlier)} and {last}"
    return f"sfllava_fast is not registered with vLLM {version}: it supports vLLM {known}; install one of them"

"""The entry point that lmms-eval loads for every model. A module of its own, so that it imports little."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model of `--model sfllava_fast`."""
    return ModelManifest("sfllava_fast", simple_class_path=f"{__package__}.lmms_eval.SfllavaFast")

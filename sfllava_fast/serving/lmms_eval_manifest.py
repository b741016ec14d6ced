"""What lmms-eval loads by the entry point, whichever model is to run: apart from the model, so that it stays light."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model that `--model sfllava_fast` names."""
    return ModelManifest("sfllava_fast", simple_class_path=f"{__package__}.lmms_eval.SfllavaFast")

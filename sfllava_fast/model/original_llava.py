"""The original LLaVA format, which SlowFast-LLaVA's published runs use.

It has a language model's config with `mm_*` entries, weights `model.mm_projector.*`, and a CLIP vision tower, which is
fine-tuned and in the checkpoint (LLaVA-1.6) or another checkpoint (LLaVA-1.5).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, CheckpointError
from .files import as_checkpoint_error, locate, read_config, read_json
from .weights import Renaming, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = {"LlavaLlamaForCausalLM": "LlamaConfig", "LlavaMistralForCausalLM": "MistralConfig"}

_NAMES: tuple[Renaming, ...] = (
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_TOWER = "model.vision_tower."
# Keys of a CLIP checkpoint, with the level .vision_model or, written by today's CLIPVisionModel, without it.
_CLIP_NAMES: tuple[Renaming, ...] = (
    (r"^(vision_model\.|(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.))", _TOWER),
)
_CLIP_TEXT = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$")
_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# The vision tower of all published checkpoints. Those that contain its weights need no other file.
_PUBLISHED_TOWER = "openai/clip-vit-large-patch14-336"
_PUBLISHED_TOWER_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_PUBLISHED_PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": 336, "crop_size": 336}
# The published code's placeholder of an image, which is outside the vocabulary.
_IMAGE_TOKEN_INDEX = -200
# Values of entries that the stock models support.
_ONLY = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", None),
    "mm_use_im_start_end": (False, None),
    "mm_resampler_type": ("identity", None),
    "s2": (False, None),
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a supported architecture in the original format."""
    return (config.get("architectures") or [None])[0] in ARCHITECTURES


def stock_config(path: Path, config: dict[str, Any]) -> PreTrainedConfig:
    """The config of the stock model with the same shapes: LLaVA-1.5 or, with image_newline, LLaVA-NeXT.

    Raises:
        CheckpointError: If an entry has a value that the stock models do not support.
    """
    import transformers

    for key, known in _ONLY.items():
        if config.get(key) not in known:
            raise CheckpointError(
                f"{path}: config.json has {key} {config.get(key)!r}, and only {known[0]!r} can be read: use another one"
            )
    text_class = getattr(transformers, ARCHITECTURES[config["architectures"][0]])
    text = {key: config[key] for key in _TEXT_KEYS if key in config}
    newline = "unpad" in (config.get("mm_patch_merge_type") or "")
    with as_checkpoint_error(f"{path}: config.json is not usable"):
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        rope = {**scaling, "rope_theta": config.get("rope_theta", 10000.0)}
        return (transformers.LlavaNextConfig if newline else transformers.LlavaConfig)(
            text_config=text_class(rope_parameters=rope, **text),
            vision_config=transformers.CLIPVisionConfig.from_dict(tower_config(path, config)),
            vision_feature_layer=config["mm_vision_select_layer"],
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            image_token_index=_IMAGE_TOKEN_INDEX,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )


def tower_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The vision tower's config, as in JSON. Raises CheckpointError if it is missing or not CLIP's."""
    folder = _tower_folder(path, config)
    if folder is None:
        return _PUBLISHED_TOWER_CONFIG
    clip = read_config(folder) or {}
    if clip.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{folder} holds {clip.get('model_type')}: use a LLaVA whose mm_vision_tower is a CLIP")
    return clip.get("vision_config", clip)


def tower_preprocessor(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The image processor's config, which is in the vision tower's checkpoint."""
    folder = _tower_folder(path, config)
    if folder is None:
        return _PUBLISHED_PREPROCESSOR
    settings = read_json(folder / "preprocessor_config.json")
    if not settings:
        raise CheckpointError(f"{folder} has no preprocessor_config.json: download the vision tower again")
    return settings


def tokenizer_class(path: Path) -> type[PreTrainedTokenizerBase]:
    """The class of the tokenizer. AutoTokenizer would read config.json as Hugging Face's format.

    Raises:
        BackendError: If tokenizer.model needs a package that is not installed.
    """
    model = path / "tokenizer.model"
    if not model.is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    try:
        from .llama_tokenizer import LlamaTokenizer
    except ImportError as error:
        raise BackendError(f"no sentencepiece to read {model} with: pip install sentencepiece") from error
    return LlamaTokenizer


def tensors(path: Path, config: dict[str, Any]) -> list[StoredTensor]:
    """The checkpoint's tensors, and the CLIP checkpoint's if it has no vision tower."""
    stored = stored_tensors(path, _NAMES)
    if any(tensor.name.startswith(_TOWER) for tensor in stored):
        return stored
    folder = _tower_folder(path, config, weights=True)
    assert folder is not None
    clip = stored_tensors(folder, _CLIP_NAMES)
    return stored + [tensor for tensor in clip if not _CLIP_TEXT.match(tensor.key)]


def _tower_folder(path: Path, config: dict[str, Any], weights: bool = False) -> Path | None:
    """The directory of the CLIP checkpoint in the config: relative to the checkpoint, or local, or from the hub.

    None for the published one if it is not local and `weights` is False, since its config is known.
    """
    name = config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: config.json names no mm_vision_tower: use a whole LLaVA checkpoint")
    for folder in (path / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    if name == _PUBLISHED_TOWER and not weights:
        return None
    try:
        return locate(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} needs the vision tower {name}, which cannot be found: download it and set mm_vision_tower in "
            f"config.json to its directory ({error})"
        ) from error

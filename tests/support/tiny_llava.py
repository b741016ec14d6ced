"""Tiny random LLaVA checkpoints and tokenizers, made offline, in the formats that real ones have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

GRID = 6
IMAGE_SIZE, PATCH = 24, 4
VISION_LAYERS = 3
LAYOUTS = ("v4", "v5.0", "v5")
SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")
VIDEO_ID = len(SPECIALS) + 256
_PARTS = (
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
)
_FRAMES = {
    "vicuna": ("USER: ", " ASSISTANT:"),
    "mistral": ("[INST] ", " [/INST]"),
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
}
CHAT_TEMPLATES = {
    family: f"{{% for message in messages %}}{before}{_PARTS}{after}{{% endfor %}}"
    for family, (before, after) in _FRAMES.items()
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


_ORIGINAL_KEYS = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
_TOWER_KEY = _ORIGINAL_KEYS["model.vision_tower."]


def byte_tokenizer(family: str = "vicuna") -> Any:
    """A byte-level tokenizer without merges: every byte is an id; BOS as the family has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if family != "chatml":  # Yi's tokenizer adds no BOS.
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATES.get(family),
    )


def word_tokenizer(words: list[str]) -> Any:
    """A closed vocabulary of words, with an unknown token and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template="{% for m in messages %}<s><image> {% for c in m['content'] %}"
        "{{ c['text'] if c['type'] == 'text' }}{% endfor %} answer{% endfor %}",
    )


def tiny_config(family: str = "vicuna", next_: bool = False, **settings: Any) -> Any:
    """A LLaVA-1.5 (or NeXT) config of the family's language model; settings override its top-level keys.

    `text` and `vision` among the settings are dicts that override keys of the two sub-configs.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig

    vision = CLIPVisionConfig(**_vision(settings.pop("vision", {})))
    text = _text(family, settings.pop("text", {}))
    kind = LlavaNextConfig if next_ else LlavaConfig
    return kind(vision_config=vision, text_config=text, image_token_index=3, **settings)


def tiny_video_config(kind: str, family: str = "vicuna", **settings: Any) -> Any:
    """A config of LlavaNextVideo or LlavaOnevision; the video placeholder is the first id after the bytes."""
    import transformers

    siglip = kind == "LlavaOnevision"
    tower = transformers.SiglipVisionConfig if siglip else transformers.CLIPVisionConfig
    defaults = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} if siglip else {}
    vision = tower(**_vision(settings.pop("vision", {})))
    text = _text(family, {"vocab_size": VIDEO_ID + 1} | settings.pop("text", {}))
    names = {"image_token_index": 3, "video_token_index": VIDEO_ID}
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, **names, **defaults, **settings
    )


def _vision(vision: dict[str, Any]) -> dict[str, Any]:
    return (
        dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=8,
        )
        | vision
    )


def _text(family: str, text: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, MistralConfig

    text = (
        dict(
            vocab_size=len(SPECIALS) + 256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4 if family == "vicuna" else 2,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
        | text
    )
    if family == "mistral":
        text = {"sliding_window": None} | text
    return (MistralConfig if family == "mistral" else LlamaConfig)(**text)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """The stock model with random weights, large enough that its greedy answers vary."""
    import transformers

    name = type(config).__name__.replace("Config", "ForConditionalGeneration")
    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.normal_(mean, scale, generator=generator)
        model.get_input_embeddings().weight.normal_(0.0, 1.0, generator=generator)
    return model.eval()


def stored_keys(model: Any, layout: str) -> dict[str, torch.Tensor]:
    """The weights under the keys of a release of transformers, or of the original format.

    "v4": language_model.model.*, as real checkpoints are stored; "v5.0": the modules' names of 5.0; "v5":
    those of later releases, whose vision tower has lost the level .vision_model; "original": model.mm_projector.*.
    """
    tensors = {}
    for key, value in model.state_dict().items():
        key = key.replace("vision_tower.vision_model.", "vision_tower.")
        if layout in ("v4", "v5.0"):
            key = key.replace("vision_tower.", "vision_tower.vision_model.")
        if layout == "v4":
            key = key.replace("model.language_model.", "language_model.model.").replace(
                "lm_head", "language_model.lm_head"
            )
            key = key.removeprefix("model.") if not key.startswith("language_model.") else key
        if layout == "original":
            for ours, theirs in _ORIGINAL_KEYS.items():
                key = key.replace(ours, theirs)
        tensors[key] = value.detach().clone().contiguous()
    if model.config.tie_word_embeddings:
        tensors = {key: value for key, value in tensors.items() if "lm_head" not in key}
    return tensors


def write_checkpoint(
    path: Path,
    family: str = "vicuna",
    next_: bool = False,
    layout: str = "v4",
    seed: int = 0,
    tokenizer: Any = None,
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a whole checkpoint directory; extra keys go into config.json, settings into `tiny_config`."""
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, next_, **settings)
    model = tiny_model(config, seed)
    write_tensors(path, stored_keys(model, layout))
    stored = config.to_dict() | {"architectures": [type(model).__name__]} | (extra or {})
    (path / "config.json").write_text(json.dumps(stored))
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (tokenizer or byte_tokenizer(family)).save_pretrained(path)
    return path


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], pickled: bool = False, shards: int = 1) -> None:
    """Write weight files as transformers names them: safetensors or pickles, one or several with an index."""
    from safetensors.torch import save_file

    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" if shards > 1 else stem + suffix for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key in tensors if where[key] == name}
        if pickled:
            torch.save(part, path / name)
        else:
            save_file(part, path / name, metadata={"format": "pt"})
    if shards > 1:
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_original(
    path: Path,
    family: str = "vicuna",
    next_: bool = False,
    tower: str | None = None,
    seed: int = 0,
    pickled: bool = False,
    shards: int = 1,
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a checkpoint of the original format, the weights of `write_checkpoint` in it.

    tower: None stores the vision tower's weights in the checkpoint; else they are in a CLIP checkpoint in the directory
    "clip" beside the others, written by "CLIPModel", "CLIPVisionModel", or today's CLIPVisionModel, "bare".
    """
    config = tiny_config(family, next_, **settings)
    model = tiny_model(config, seed)
    tensors = stored_keys(model, "original")
    (path / "clip").mkdir(parents=True, exist_ok=True)
    vision = {key.removeprefix(_TOWER_KEY): tensors.pop(key) for key in list(tensors) if key.startswith(_TOWER_KEY)}
    write_clip(path / "clip", config.vision_config, vision if tower else None, tower or "CLIPModel", pickled)
    if not tower:
        tensors |= {_TOWER_KEY + key: tensor for key, tensor in vision.items()}
    write_tensors(path, tensors, pickled, shards)
    mistral = family == "mistral"
    text = {key: value for key, value in config.text_config.to_dict().items() if key != "rope_parameters"}
    stored = text | {
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if mistral else "llava",
        "rope_theta": config.text_config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "mm_vision_tower": "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad" if next_ else "flat",
        "mm_use_im_start_end": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float16",
    }
    (path / "config.json").write_text(json.dumps(stored | (extra or {})))
    byte_tokenizer(family).save_pretrained(path)
    return path


def write_clip(
    path: Path, config: Any, vision: dict[str, torch.Tensor] | None, kind: str = "CLIPModel", pickled: bool = False
) -> None:
    """Write a CLIP checkpoint with OpenAI's old preprocessor_config.json; without weights if vision is None."""
    whole = kind == "CLIPModel"
    vision_config = config.to_dict() | {"model_type": "clip_vision_model"}
    stored = {"model_type": "clip", "vision_config": vision_config, "text_config": {}} if whole else vision_config
    (path / "config.json").write_text(json.dumps(stored))
    preprocessor = {key: value for key, value in PREPROCESSOR.items() if "rescale" not in key and "rgb" not in key}
    (path / "preprocessor_config.json").write_text(
        json.dumps(preprocessor | {"size": config.image_size, "crop_size": config.image_size})
    )
    if vision is None:
        return
    tensors = {key if kind == "bare" else f"vision_model.{key}": tensor for key, tensor in vision.items()}
    if whole:
        text_side = "text_model.final_layer_norm.bias", "text_projection.weight", "visual_projection.weight"
        tensors |= dict.fromkeys([*text_side, "logit_scale"], torch.zeros(2)) | {
            "text_model.embeddings.position_ids": torch.arange(5)[None],
            "vision_model.embeddings.position_ids": torch.arange(GRID * GRID + 1)[None],
        }
    write_tensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, pickled)

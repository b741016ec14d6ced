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
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
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
    """A config of LlavaNextVideo or LlavaOnevision; video placeholders are the one id behind those of the bytes."""
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
    return dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=8,
    ) | vision


def _text(family: str, text: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, MistralConfig

    text = dict(
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
    ) | text
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
    """The weights under the keys of a release of transformers.

    "v4": language_model.model.*, as real checkpoints are stored; "v5.0": the modules' names of 5.0; "v5":
    those of later releases, whose vision tower has lost the level .vision_model (5.0 cannot read them).
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
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, next_, **settings)
    model = tiny_model(config, seed)
    save_file(stored_keys(model, layout), path / "model.safetensors", metadata={"format": "pt"})
    stored = config.to_dict() | {"architectures": [type(model).__name__]} | (extra or {})
    (path / "config.json").write_text(json.dumps(stored))
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (tokenizer or byte_tokenizer(family)).save_pretrained(path)
    return path

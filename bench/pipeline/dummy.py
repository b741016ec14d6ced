"""Checkpoints of real shapes with random weights, drawn on the device; nothing is downloaded or stored."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sfllava_fast.model import checkpoint as loading
from sfllava_fast.model.attention import resolve_attention
from sfllava_fast.model.checkpoint import Checkpoint
from sfllava_fast.model.prompts import TEMPLATES
from sfllava_fast.video.preprocess import CLIP_MEAN, CLIP_STD

_CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336)
# (CLIP, Llama) by name; tiny is for tests, small has about 100M weights
SHAPES = {
    "tiny": (
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=112),
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024),
    ),
    "small": (
        dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=224),
        dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9, vocab_size=32064),
    ),
    "7b": (
        _CLIP_L,
        dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064),
    ),
    "34b": (
        _CLIP_L,
        dict(
            hidden_size=7168,
            intermediate_size=20480,
            num_hidden_layers=60,
            num_attention_heads=56,
            num_key_value_heads=8,
            vocab_size=64064,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        ),
    ),
}
NAMES = tuple(SHAPES)
_TEXT = dict(max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
_SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")


def dummy_checkpoint(
    name: str, device: str | torch.device | None, dtype: str | torch.dtype | None, attention: str = "auto"
) -> tuple[Checkpoint, nn.Module]:
    """A random checkpoint.

    Args:
        name: One of NAMES.
        device, dtype, attention: As in `load_checkpoint`.

    Returns:
        The checkpoint as `load_checkpoint` gives it, and its vision tower with all layers.
    """
    loading.require_transformers()
    device = loading.choose_device(device)
    dtype = loading.choose_dtype(dtype, device, {})
    family = "chatml" if name == "34b" else "vicuna"
    config = make_config(name)
    text = config.text_config
    chosen = resolve_attention(attention, device, dtype, text.hidden_size // text.num_attention_heads)
    context = loading.stretch_context(text)
    model = _random_model(config, device, dtype, chosen.implementation)
    tower = on_the_same_weights(model.model.vision_tower)
    depths = loading.feature_depths(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    loading.cut_tower(model.model.vision_tower, max(depths))
    checkpoint = Checkpoint(
        f"{name} (random weights)",
        model,
        make_tokenizer(family),
        None,
        _preprocessor(config.vision_config.image_size),
        chosen,
        depths,
        True,
        loading.patch_grid(model.model.vision_tower, config.vision_config, True),
        context,
        None,
    )
    return checkpoint, tower


def on_the_same_weights(module: Any) -> Any:
    """A copy of a module that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def make_config(name: str) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    vision, text = SHAPES[name]
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(patch_size=14, **vision),
        text_config=LlamaConfig(**_TEXT | text),
        image_token_index=_SPECIALS.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def dummy_decoder(shape: str | dict, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """A random language model without head. shape: one of NAMES, or the arguments of a LlamaConfig."""
    from transformers import LlamaConfig, LlamaModel

    text = SHAPES[shape][1] if isinstance(shape, str) else shape
    with torch.device(device):
        model = LlamaModel._from_config(LlamaConfig(**_TEXT | text), dtype=dtype, attn_implementation=attention)
    return _draw(model, device)


def _random_model(config: Any, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    from transformers import LlavaNextForConditionalGeneration

    with torch.device(device):
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    return _draw(model, device)


def _draw(model: nn.Module, device: torch.device) -> nn.Module:
    """Draw random weights with which the answer depends on video and question.

    Embeddings are small relative to the layers' outputs, and attention concentrates on few of thousands of tokens.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0.0, 0.1, generator=generator)
            elif weight.dim() > 1:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0.0, gain * weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))
    return model.requires_grad_(False).eval()


def make_tokenizer(family: str) -> Any:
    """A byte-level tokenizer with the words of the published prompts, so that these have about their real length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = list(_SPECIALS if family == "chatml" else _SPECIALS[:4])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATES[family].open_ended] * 2, trainer)
    if family != "chatml":  # Yi's tokenizer adds no BOS
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _preprocessor(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }

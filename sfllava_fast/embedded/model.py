"""Builds the embedded model from stock transformers parts: tower, projector, decoder, tokenizer."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model.shipped import model_dir
from . import CAVEAT
from .questions import vocabulary
from .scenes import GRID, PATCH, TOWER_SIZE

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, PreTrainedTokenizerFast

LAYOUT = "slowfast-slow_4frms_spatial_1d_max_pool-fast_2x2"
FRAMES = 16
LANGUAGE_WIDTH, VISION_WIDTH = 192, 128
VISION_LAYER = -1
PAD, UNK, BOS, EOS, IMAGE, USER, ASSISTANT = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
SPECIAL = (PAD, UNK, BOS, EOS, IMAGE, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% if message['role'] == 'user' %}<user>{% else %}<assistant>{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole lower-case words, punctuation and digits; digits after the first are `##d`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    digits = [str(d) for d in range(10)] + [f"##{d}" for d in range(10)]
    words = {word: i for i, word in enumerate([*SPECIAL, *digits, *vocabulary()])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        padding_side="left",
    )


def answer_ids(tokenizer: PreTrainedTokenizerFast, answer: str) -> list[int]:
    """Ids of an answer as the model should write it, without the end-of-sequence token; case is kept ("I")."""
    vocab = tokenizer.get_vocab()
    words: list[str] = []
    for word in answer.split():
        words += [word[0], *(f"##{digit}" for digit in word[1:])] if word.isdigit() else [word]
    return [vocab[word] for word in words]


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained model of 2.9 million parameters.

    Args:
        seed: Of the random weights.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vocab = build_tokenizer().get_vocab()
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=TOWER_SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=LANGUAGE_WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=vocab[PAD],
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
    )
    config = LlavaConfig(  # type: ignore[call-arg]  # the ids are parameters of its base class
        vision_config=vision,
        text_config=text,
        image_token_index=vocab[IMAGE],
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        pad_token_id=vocab[PAD],
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
    )
    # The model was trained without choices in its prompts: "open".
    config.sfllava_fast = {"layout": LAYOUT, "frames": FRAMES, "caveat": CAVEAT, "choices": "open"}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # Scaled initial output projections, so that the residual stream starts close to the word embeddings.
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data.mul_((2 * text.num_hidden_layers) ** -0.5)
    return model


def load_model(directory: str | Path | None = None) -> LlavaForConditionalGeneration:
    """Load a trained model in float32.

    Args:
        directory: As `export` writes it; None is the model that ships.
    """
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(directory or model_dir(), dtype=torch.float32)


def decoder_weights(model: LlavaForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    """Unfreeze the decoder's weights except the embeddings, which a reduction trains; by their names in the decoder."""
    named = model.get_decoder().named_parameters()
    return {name: p.requires_grad_() for name, p in named if "embed_tokens" not in name}


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's image processor at the tower's size."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": TOWER_SIZE}, crop_size={"height": TOWER_SIZE, "width": TOWER_SIZE}
    )


def export(model: LlavaForConditionalGeneration, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a Hugging Face directory with weights, tokenizer, image processor and chat template.

    Args:
        model: The model, which is not changed.
        directory: Made if it does not exist.
        dtype: Of the weights.

    Returns:
        The directory.
    """
    from transformers import LlavaProcessor

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    copy = deepcopy(model)
    copy.to(dtype)  # type: ignore[arg-type]  # transformers wraps `to` without its signature
    copy.generation_config.max_new_tokens = 12
    copy.generation_config.do_sample = False
    copy.save_pretrained(directory)
    images, tokenizer = image_processor(), build_tokenizer()
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    images.save_pretrained(directory)
    return directory

"""Training's shortcut: all questions of a clip behind one shared visual prefix.

Each question sees the prefix and itself, and its positions restart after the prefix, so every answer is
the one that the question would get alone; the prefix is paid for once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .guidance import NAMING_LAYER, NEWS_LAYER, Guide, pool_tokens

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

ATTENTION = "sfllava_packed"


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, packing=None, guide=None, **kwargs
):
    """Attention [B, H, P + Q * L, d] of a causal prefix of P tokens and Q questions of L tokens each."""
    prefix, questions = packing
    head = F.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling
    )
    query, own_key, own_value = (x[:, :, prefix:].unflatten(2, (questions, -1)) for x in (query, key, value))
    length = query.shape[3]
    shared = (query.flatten(2, 3) @ key[:, :, :prefix].transpose(2, 3)).unflatten(2, (questions, length))
    own = query @ own_key.transpose(3, 4)
    later = torch.ones(length, length, dtype=torch.bool, device=own.device).triu(1)
    scores = torch.cat([shared, own.masked_fill(later, float("-inf"))], -1) * scaling
    if guide is not None:
        guide.watch(module.layer_idx, scores)
    weights = scores.softmax(-1)
    tail = (weights[..., :prefix].flatten(2, 3) @ value[:, :, :prefix]).unflatten(2, (questions, length))
    tail = tail + weights[..., prefix:] @ own_value
    return torch.cat([head, tail.flatten(2, 3)], 2).transpose(1, 2), None


def use_packed_attention(model: LlavaForConditionalGeneration) -> None:
    """Makes the language model attend by blocks; only `packed_logits` may call it afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    model.model.language_model.config._attn_implementation = ATTENTION


def encode_frames(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features of the configured layer: pixel values [N, 3, 96, 96] -> [N, 64, 128]."""
    tower = model.model.vision_tower
    hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state
    return hidden[:, 1:]


@contextmanager
def _watched(layers: torch.nn.ModuleList, guide: Guide | None, prefix: int, questions: int) -> Iterator[None]:
    """Hands the guide what its layers make of the visual tokens and of the questions."""
    if guide is None:
        yield
        return

    def keep_visual(module, inputs, output):
        guide.visual = output[:, 1:prefix]

    def keep_words(module, inputs, output):
        guide.words = output[:, prefix:].unflatten(1, (questions, -1))

    hooks = [
        layers[NEWS_LAYER].register_forward_hook(keep_visual), layers[NAMING_LAYER].register_forward_hook(keep_words)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def packed_logits(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    ids: torch.Tensor,
    where: torch.Tensor,
    slow: int,
    mode: str = "both",
    guide: Guide | None = None,
) -> torch.Tensor:
    """Logits [A, vocab] at the A positions of `ids` that `where` marks.

    `features` [B, T, 64, 128] from `encode_frames`; `ids` int64 and `where` bool [B, Q, L], right-padded.
    """
    language = model.model.language_model
    visual = pool_tokens(model.model.multi_modal_projector(features), slow, mode)
    batch, questions, length = ids.shape
    start = torch.full((batch, 1), model.config.text_config.bos_token_id, device=ids.device)
    embeds = torch.cat([language.embed_tokens(start), visual, language.embed_tokens(ids.flatten(1))], 1)
    prefix = visual.shape[1] + 1
    positions = torch.cat([torch.arange(prefix), torch.arange(prefix, prefix + length).repeat(questions)])
    with _watched(language.layers, guide, prefix, questions):
        hidden = language(
            inputs_embeds=embeds, position_ids=positions[None].to(ids.device), use_cache=False,
            packing=(prefix, questions), guide=guide,
        ).last_hidden_state
    return model.lm_head(hidden[:, prefix:].unflatten(1, (questions, length))[where])

"""Training's shortcut: all questions of a clip behind one shared visual prefix.

Each question sees the prefix and itself, and its positions restart after the prefix, so every answer is
the one that the question would get alone; the prefix is paid for once. A prefix that ends in compression
tokens shows the questions those alone, and its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .guidance import NAMING_LAYER, NEWS_LAYER, Guide, pool_tokens

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

ATTENTION = "sfllava_packed"


@dataclass(frozen=True)
class Packing:
    """So many questions of `length` tokens each behind a prefix. compressed: tokens at the prefix's end that are, with
    its first, all that questions see of it; 0: they see all of it."""

    questions: int
    length: int
    compressed: int = 0

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows [B, H, P + Q * L, d]: the prefix, what questions see of it, and the questions [B, H, Q, L, d]. Layers
        that hold fewer tokens have a shorter prefix."""
        prefix, own = rows.tensor_split([rows.shape[2] - self.questions * self.length], 2)
        seen = torch.cat([prefix[:, :, :1], prefix[:, :, -self.compressed :]], 2) if self.compressed else prefix
        return prefix, seen, own.unflatten(2, (self.questions, self.length))


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, packing=None, guide=None, **kwargs
):
    """Attention of a causal prefix and of the questions behind it, [B, H, P + Q * L, d] each."""
    (prefix, _, query), (keys, key, own_key), (values, value, own_value) = map(packing.split, (query, key, value))
    head = F.scaled_dot_product_attention(prefix, keys, values, is_causal=True, scale=scaling)
    shared = (query.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, query.shape[2:4])
    own = query @ own_key.transpose(3, 4)
    later = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(1)
    scores = torch.cat([shared, own.masked_fill(later, float("-inf"))], -1) * scaling
    if guide is not None:
        guide.watch(module.layer_idx, scores)
    weights = scores.softmax(-1)
    seen = key.shape[2]
    tail = (weights[..., :seen].flatten(2, 3) @ value).unflatten(2, query.shape[2:4])
    tail = tail + weights[..., seen:] @ own_value
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
        layers[NEWS_LAYER].register_forward_hook(keep_visual),
        layers[NAMING_LAYER].register_forward_hook(keep_words),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def packed_logits(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    ids: Tensor,
    where: Tensor,
    slow: int,
    mode: str = "both",
    guide: Guide | None = None,
    compression: Tensor | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits [A, vocab] at the A positions of `ids` that `where` marks.

    `features` [B, T, 64, 128] from `encode_frames`; `ids` int64 and `where` bool [B, Q, L], right-padded.
    compression: embeddings [k, D] of tokens behind the video, through which alone questions see it. keep: says of the
    visual tokens [B, S, D] which go in, int64 [B, K], at the positions that they have among all.
    """
    language = model.model.language_model
    visual = pool_tokens(model.model.multi_modal_projector(features), slow, mode)
    batch, questions, length = ids.shape
    start = torch.full((batch, 1), model.config.text_config.bos_token_id, device=ids.device)
    tokens = visual.new_empty(0, visual.shape[-1]) if compression is None else compression
    end = 1 + visual.shape[1] + len(tokens)
    places = torch.arange(end, device=ids.device).expand(batch, -1)
    if keep is not None:
        kept = keep(visual)
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        places = torch.cat([places[:, :1], 1 + kept, places[:, end - len(tokens) :]], 1)
    asked = torch.arange(end, end + length, device=ids.device).repeat(batch, questions)
    start, asked_embeds = language.embed_tokens(start), language.embed_tokens(ids.flatten(1))
    prefix = 1 + visual.shape[1] + len(tokens)
    with _watched(language.layers, guide, prefix, questions):
        hidden = language(
            inputs_embeds=torch.cat([start, visual, tokens.expand(batch, -1, -1), asked_embeds], 1),
            position_ids=torch.cat([places, asked], 1),
            use_cache=False,
            packing=Packing(questions, length, len(tokens)),
            guide=guide,
        ).last_hidden_state
    return model.lm_head(hidden[:, prefix:].unflatten(1, (questions, length))[where])

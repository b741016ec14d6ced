"""Training's shortcut: all questions of a clip behind one shared visual prefix.

Each question sees the prefix and itself, and its positions restart after the prefix, so every answer is
the one that the question would get alone; the prefix is paid for once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ..config import SlowFastConfig
from .model import LAYOUT
from ..ops import slowfast_aggregate

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

ATTENTION = "sfllava_packed"
GUIDED_LAYERS = (1, 2)
CLOCK_LAYER = 1


class Guide:
    """Early help: two heads of the middle layers shall look at what a question is about, one in each pathway.

    `about` bool [B, Q, S]: which visual tokens show it; `start` [B, Q]: where each answer starts; `slow`: how
    many of the S tokens are slow ones. Also keeps the visual tokens after CLOCK_LAYER, to tell the time.
    """

    def __init__(self, about: torch.Tensor, start: torch.Tensor, slow: int):
        self.about, self.start, self.slow = about, start, slow
        self.losses: list[torch.Tensor] = []
        self.visual: torch.Tensor | None = None

    def watch(self, scores: torch.Tensor) -> None:
        """Adds a layer's loss; `scores` [B, H, Q, L, 1 + S + L]: attention before softmax."""
        batch, questions = self.start.shape
        rows = scores[:, :2].permute(0, 2, 3, 1, 4)  # [B, Q, L, 2, 1 + S + L]
        clips = torch.arange(batch, device=rows.device)[:, None]
        looks = rows[clips, torch.arange(questions, device=rows.device)[None], self.start]
        everything = looks.logsumexp(-1)
        tokens = self.about.shape[-1]
        for head, part in enumerate((slice(0, self.slow), slice(self.slow, tokens))):
            wanted = self.about[..., part]
            asked = wanted.any(-1)
            if asked.any():
                seen = looks[:, :, head, 1 : 1 + tokens][..., part]
                seen = seen[asked].masked_fill(~wanted[asked], float("-inf")).logsumexp(-1)
                self.losses.append((everything[:, :, head][asked] - seen).mean())


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
    if guide is not None and module.layer_idx in GUIDED_LAYERS:
        guide.watch(scores)
    weights = scores.softmax(-1)
    tail = (weights[..., :prefix].flatten(2, 3) @ value[:, :, :prefix]).unflatten(2, (questions, length))
    tail = tail + weights[..., prefix:] @ own_value
    return torch.cat([head, tail.flatten(2, 3)], 2).transpose(1, 2), None


def use_packed_attention(model: LlavaForConditionalGeneration) -> None:
    """Makes the language model attend by blocks; only `packed_logits` may call it afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    model.model.language_model.config._attn_implementation = ATTENTION


def pool_tokens(features: torch.Tensor, slow: int, mode: str = "both") -> torch.Tensor:
    """SlowFast tokens of clips of equal length, through the package's own op: [B, T, 64, D] -> [B, S, D]."""
    clips, frames = features.shape[:2]
    layout = replace(SlowFastConfig.parse(LAYOUT), slow_frames=slow)
    if mode != "both":
        layout = layout.only(mode)
    bounds = [clip * frames for clip in range(clips + 1)]
    tokens, _ = slowfast_aggregate(features.flatten(0, 1), layout, frame_offsets=bounds)
    return tokens.unflatten(0, (clips, -1))


def encode_frames(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features of the configured layer: pixel values [N, 3, 96, 96] -> [N, 64, 128]."""
    tower = model.model.vision_tower
    hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state
    return hidden[:, 1:]


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
    def keep_visual(module, inputs, output):
        guide.visual = (output[0] if isinstance(output, tuple) else output)[:, 1:prefix]

    hook = language.layers[CLOCK_LAYER].register_forward_hook(keep_visual) if guide is not None else None
    hidden = language(
        inputs_embeds=embeds, position_ids=positions[None].to(ids.device), use_cache=False,
        packing=(prefix, questions), guide=guide,
    ).last_hidden_state
    if hook is not None:
        hook.remove()
    return model.lm_head(hidden[:, prefix:].unflatten(1, (questions, length))[where])

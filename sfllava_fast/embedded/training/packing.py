"""Packed training: all questions of a clip in one sequence after a shared visual prefix.

Each question attends to the prefix and to itself, and its positions restart after the prefix, so that its answer is the
same as without the other questions. If the prefix ends in compression tokens, questions attend only to these and to the
first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .batches import Mode
from .guidance import NAMING_LAYER, NEWS_LAYER, pool_tokens

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

ATTENTION = "sfllava_packed"


@dataclass(frozen=True)
class Packing:
    """The shape of a packed sequence.

    Attributes:
        questions: Per clip.
        length: Tokens per question.
        compressed: Compression tokens at the end of the prefix; 0 lets questions attend to the whole prefix.
    """

    questions: int
    length: int
    compressed: int = 0

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [B, H, P + Q * L, d] into the prefix, the part that questions attend to, and questions [B, H, Q, L, d].

        P may differ between layers: a mixture of depths has fewer tokens in some.
        """
        prefix, own = rows.tensor_split([rows.shape[2] - self.questions * self.length], 2)
        seen = torch.cat([prefix[:, :, :1], prefix[:, :, -self.compressed :]], 2) if self.compressed else prefix
        return prefix, seen, own.unflatten(2, (self.questions, self.length))


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, packing=None, guide=None, **kwargs
):
    """Attention of a causal prefix and of the questions after it; query, key and value [B, H, P + Q * L, d]."""
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
    """Switch the language model to `packed_attention`; after that only `packed_logits` can run it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    model.model.language_model.config._attn_implementation = ATTENTION


def encode_frames(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features [N, 64, 128] of pixel values [N, 3, 96, 96]."""
    tower = model.model.vision_tower
    hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state
    return hidden[:, 1:]


class AttentionWatcher(Protocol):
    """Gets the attention of each layer, and the hidden states after two of them."""

    visual: Tensor | None
    words: Tensor | None

    def watch(self, layer: int, scores: Tensor) -> None:
        """scores: attention of the questions before softmax, [B, H, Q, L, 1 + S + L]."""


@contextmanager
def _watched(
    layers: torch.nn.ModuleList, guide: AttentionWatcher | None, prefix: int, questions: int
) -> Iterator[None]:
    """Set `visual` and `words` of the guide during the forward pass."""
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
    mode: Mode = "both",
    guide: AttentionWatcher | None = None,
    compression: Tensor | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits of all questions of a batch in one forward pass.

    Args:
        model: After `use_packed_attention`.
        features: [B, T, 64, 128] from `encode_frames`.
        ids: int64 [B, Q, L], padded on the right.
        where: Positions to compute logits at, bool [B, Q, L], A of them.
        slow: Slow frames.
        mode: The pathways.
        guide: Gets attention and hidden states.
        compression: Embeddings [k, D] of tokens after the video, the only ones through which questions attend to it.
        keep: Chooses from the visual tokens [B, S, D] those that enter the model, int64 [B, K]; they keep their
            positions.

    Returns:
        [A, vocab].
    """
    language = model.model.language_model
    visual = pool_tokens(model.model.multi_modal_projector(features), slow, mode)
    batch, questions, length = ids.shape
    start = torch.full((batch, 1), model.get_decoder().config.bos_token_id, device=ids.device)
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

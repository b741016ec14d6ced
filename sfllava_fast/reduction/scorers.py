"""Scores of a layer's vision tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, PatchError, check_count
from ..model.transformers_release import release
from ..ops.rows import attention_received


@dataclass(frozen=True)
class LayerInput:
    """The input of a scorer.

    Attributes:
        hidden: [B, S, D], the layer's input.
        start: First vision token. Tokens outside [start, stop) are text.
        stop: End of the vision tokens.
        layer: The decoder layer.
        arguments: The layer's other arguments, such as `position_embeddings`.
    """

    hidden: Tensor
    start: int
    stop: int
    layer: nn.Module
    arguments: dict[str, Any]

    @property
    def vision(self) -> Tensor:
        """The vision tokens, [B, V, D]."""
        return self.hidden[:, self.start : self.stop]

    @property
    def seen(self) -> Tensor | None:
        """The tokens that the last token attends to, bool [B, S]; None if these are all, without padding."""
        mask = self.arguments.get("attention_mask")
        if mask is None:
            return None
        last = mask if mask.dim() == 2 else mask[:, 0, -1]
        seen = last if last.dtype == torch.bool else last > (-1 if last.is_floating_point() else 0)
        return seen[:, -self.hidden.shape[1] :].expand(len(self.hidden), -1)


Score = Callable[[LayerInput], Tensor]
Scorer = str | Score | Mapping[int, str | Score]


class Norm(nn.Module):
    """The Euclidean norm of a token's hidden state."""

    @torch.no_grad()
    def forward(self, layer: LayerInput) -> Tensor:
        return layer.vision.float().norm(dim=-1)


class LayerExpert(nn.Module):
    """A learned linear score of the hidden state (VideoLLM-MoD, arXiv 2408.16730)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, layer: LayerInput) -> Tensor:
        return self.linear(layer.vision.to(self.linear.weight.dtype))[..., 0]


class TextSimilarity(nn.Module):
    """The cosine similarity of a token's hidden state and the mean of the text's in the same forward pass."""

    needs_text = True

    @torch.no_grad()
    def forward(self, layer: LayerInput) -> Tensor:
        if layer.stop - layer.start == layer.hidden.shape[1]:
            raise InputError(_NO_TEXT.format("text", "before or after"))
        hidden = layer.hidden.float()
        text = torch.ones_like(hidden[..., 0]) if layer.seen is None else layer.seen.to(hidden, copy=True)
        text[:, layer.start : layer.stop] = 0
        mean = (hidden * text[..., None]).sum(1, keepdim=True) / text.sum(1)[:, None, None]
        return F.cosine_similarity(layer.vision.float(), mean, dim=-1)


class AttentionReceived(nn.Module):
    """The attention that a token receives in this layer from the last tokens of the text after it.

    It is the mean over these tokens and the heads; FastV (arXiv 2403.06764) takes the last token. It is computed from
    the layer's projections, norms and rotary embeddings without storing an attention matrix, with any attention of the
    model.

    - Softcapped logits are not capped.
    - If a prompt is prefilled in parts, only the current part counts.
    - In a layer with a sliding window, only tokens count that the last token attends to.
    - A batch must be padded on the left.

    Attributes:
        queries: Maximum number of last tokens.
    """

    needs_text = True

    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        check_count("queries", queries)
        self.queries = queries

    @torch.no_grad()
    def forward(self, layer: LayerInput) -> Tensor:
        after = layer.hidden.shape[1] - layer.stop
        if not after:
            raise InputError(_NO_TEXT.format("attention", "after"))
        queries, keys = queries_and_keys(layer, min(self.queries, after))
        scale = attention_of(layer.layer).scaling
        if layer.seen is None:
            return attention_received(queries, keys, scale)[:, layer.start : layer.stop]
        scores = queries.new_zeros(layer.hidden.shape[:2], dtype=torch.float32)
        for row, seen in enumerate(layer.seen):  # padding is in no softmax
            scores[row, seen] = attention_received(queries[row, None], keys[row, None, :, seen], scale)[0]
        return scores[:, layer.start : layer.stop]


_NO_TEXT = (
    'the scorer "{}" needs text {} the vision tokens in the same forward pass: '
    'prefill them with the question, or use the scorer "norm" or "learned"'
)


def queries_and_keys(layer: LayerInput, count: int) -> tuple[Tensor, Tensor]:
    """A layer's queries [B, H, count, d] of the last tokens, and its keys [B, G, S, d], as its attention computes them.

    Raises:
        PatchError: If the attention is not supported.
    """
    attention = attention_of(layer.layer)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    split = hasattr(attention, "q_proj") and hasattr(attention, "k_proj")
    if rotate is None or not (split or hasattr(attention, "qkv_proj")):
        found = f"{type(attention).__name__} ({release()})"
        raise PatchError(f'the scorer "attention" does not support {found}: use another scorer')
    norm = getattr(layer.layer, "input_layernorm", None)  # OLMo 2 norms the output instead
    hidden = layer.hidden if norm is None else norm(layer.hidden)
    if split:
        queries, keys = attention.q_proj(hidden[:, -count:]), attention.k_proj(hidden)
    else:
        width = attention.o_proj.in_features
        both = attention.qkv_proj(hidden)
        queries, keys = both[:, -count:, :width], both[..., width : (width + both.shape[-1]) // 2]
    cos, sin = layer.arguments["position_embeddings"]
    queries = _heads(queries, attention, "q_norm")
    keys = _heads(keys, attention, "k_norm")
    queries = rotate(queries, queries, cos[..., -count:, :], sin[..., -count:, :])[0]
    return queries, rotate(keys, keys, cos, sin)[0]


def attention_of(layer: nn.Module) -> Any:
    """The attention module of a decoder layer."""
    return layer.self_attn


def _heads(projected: Tensor, attention: Any, norm_name: str) -> Tensor:
    """[B, n, heads * d] as [B, heads, n, d], normed if the model does that: per head, or over all heads."""
    norm = getattr(attention, norm_name, None)
    if norm is not None and norm.weight.numel() == projected.shape[-1]:
        projected, norm = norm(projected), None
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    return (heads if norm is None else norm(heads)).transpose(1, 2)


class _Function(nn.Module):
    """A function as a scorer."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def forward(self, layer: LayerInput) -> Tensor:
        return self.score(layer)


_BY_NAME = {
    "norm": lambda width: Norm(),
    "learned": LayerExpert,
    "text": lambda width: TextSimilarity(),
    "attention": lambda width: AttentionReceived(),
}


def make_scorers(scorer: Scorer, layers: Sequence[int], width: int) -> nn.ModuleDict:
    """A scorer for each layer.

    Args:
        scorer: A name, a module or a function for all layers, or a mapping of all layers to these.
        layers: The layers.
        width: Channels of the hidden states.

    Raises:
        InputError: If a scorer is unknown, or if the mapping has other layers.
    """
    if isinstance(scorer, Mapping) and set(scorer) != set(layers):
        raise InputError(f"the scorers have layers {sorted(scorer)}, and these are needed: {sorted(layers)}")
    each = {layer: scorer[layer] if isinstance(scorer, Mapping) else scorer for layer in layers}
    return nn.ModuleDict({str(layer): _make(each[layer], width) for layer in layers})


def _make(scorer: str | Score, width: int) -> nn.Module:
    if isinstance(scorer, nn.Module):
        return scorer
    if isinstance(scorer, str) and scorer in _BY_NAME:
        return _BY_NAME[scorer](width)
    if isinstance(scorer, str) or not callable(scorer):
        raise InputError(f"unknown scorer {scorer!r}: give one of {', '.join(_BY_NAME)}, or a module or function")
    return _Function(scorer)

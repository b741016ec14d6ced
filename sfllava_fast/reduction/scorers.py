"""What says which vision tokens matter to a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerInput:
    """What a scorer may look at.

    hidden: [B, S, D], what enters the layer. start, stop: the vision tokens in it; what is outside of them is text.
    layer: the decoder layer. arguments: what else the layer is called with, such as `position_embeddings`.
    """

    hidden: Tensor
    start: int
    stop: int
    layer: nn.Module
    arguments: dict[str, Any]

    @property
    def vision(self) -> Tensor:
        """[B, V, D]"""
        return self.hidden[:, self.start : self.stop]

    @property
    def text(self) -> Tensor:
        """[B, S - V, D]"""
        return torch.cat([self.hidden[:, : self.start], self.hidden[:, self.stop :]], dim=1)


class Norm(nn.Module):
    """The length of a token's hidden state."""

    def forward(self, layer: LayerInput) -> Tensor:
        return layer.vision.float().norm(dim=-1)


class LayerExpert(nn.Module):
    """A learned score: a linear map of the hidden state (VideoLLM-MoD, arXiv 2408.16730)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, layer: LayerInput) -> Tensor:
        return self.linear(layer.vision.to(self.linear.weight.dtype))[..., 0]


def queries_and_keys(layer: LayerInput, count: int) -> tuple[Tensor, Tensor]:
    """A layer's queries [B, H, count, d] of the last tokens and keys [B, G, S, d] of all, as its attention has them."""
    attention = layer.layer.self_attn
    hidden, (cos, sin) = layer.layer.input_layernorm(layer.hidden), layer.arguments["position_embeddings"]
    queries, keys = attention.q_proj(hidden[:, -count:]), attention.k_proj(hidden)
    queries = _turned(queries, attention.head_dim, cos[:, -count:], sin[:, -count:])
    return queries, _turned(keys, attention.head_dim, cos, sin)


def _turned(rows: Tensor, width: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Projections [B, n, H * width] as heads [B, H, n, width], with the rotary embedding of their positions."""
    heads = rows.unflatten(-1, (-1, width)).transpose(1, 2)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

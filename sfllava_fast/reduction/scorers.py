"""What says which vision tokens matter to a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rows import attention_received


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


class AttentionReceived(nn.Module):
    """The attention that a token gets from the last `queries` tokens in this layer, over all heads (FastV, arXiv
    2403.06764, asks the last one): a block of rows, whatever attention the model runs on."""

    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        self.queries = queries

    def forward(self, layer: LayerInput) -> Tensor:
        attention = layer.layer.self_attn
        hidden, (cos, sin) = layer.layer.input_layernorm(layer.hidden), layer.arguments["position_embeddings"]
        last = slice(-self.queries, None)
        queries = _turned(attention.q_proj(hidden[:, last]), attention.head_dim, cos[:, last], sin[:, last])
        keys = _turned(attention.k_proj(hidden), attention.head_dim, cos, sin)
        return attention_received(queries, keys, attention.scaling)[:, layer.start : layer.stop]


def _turned(rows: Tensor, width: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Projections [B, n, H * width] as heads [B, H, n, width], with the rotary embedding of their positions."""
    heads = rows.unflatten(-1, (-1, width)).transpose(1, 2)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

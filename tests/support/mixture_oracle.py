"""Mixture of depths in plain PyTorch, without a cache: every token through every layer, and masks for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Score = Callable[..., Tensor]  # layer, hidden [1, S, D], what the layer is called with -> scores [S]


def norm_score(layer: torch.nn.Module | None, hidden: Tensor, **_: Any) -> Tensor:
    return hidden[0].square().sum(-1)


def attention_score(layer: torch.nn.Module, hidden: Tensor, rows: slice = slice(-1, None), **arguments: Any) -> Tensor:
    """Rows of the attention matrix of the stock layer."""
    if hasattr(layer, "input_layernorm"):
        hidden = layer.input_layernorm(hidden)
    weights = layer.self_attn(hidden_states=hidden, **arguments)[1]
    return weights[0, :, rows].mean((0, 1))


def kept_tokens(scores: Tensor, frames: Sequence[int], ratio: float) -> Tensor:
    """Bool [S]: text, and of each frame the best. Counted with sorted(), one frame after the other."""
    kept = torch.ones(len(scores), dtype=torch.bool)
    for start, stop in zip(frames, frames[1:]):
        best = sorted(range(start, stop), key=lambda at: (-float(scores[at]), at))
        kept[best[math.ceil(ratio * (stop - start) - 1e-9) :]] = False
    return kept


def allowed_pairs(total: int, padding: int = 0, window: int | None = None) -> Tensor:
    """Causal mask, bool [S, S], with `padding` masked tokens at the start."""
    query, key = torch.arange(total)[:, None], torch.arange(total)[None]
    seen = (key <= query) & (key >= padding)
    return seen if window is None else seen & (key > query - window)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def logits_by_layers(
    model: Any,
    ids: Tensor,
    frames: Sequence[int],
    ratio: dict[int, float],
    score: Score = norm_score,
    paddings: Sequence[int] | None = None,
    select_at: int | None = None,
    weighted: bool = False,
) -> Tensor:
    """Logits [B, S, V] of a stock model, eager attention: the model's own layers on all tokens, where a mixed one sees
    the tokens it keeps through a mask, and its output for the others is thrown away."""
    core, rows, attention = model.model, [], model.config._attn_implementation
    model.set_attn_implementation("eager")
    for row, tokens in enumerate(ids):
        padding = paddings[row] if paddings else 0
        hidden = core.embed_tokens(tokens[None])
        positions = (torch.arange(len(tokens)) - padding).clamp(min=0)[None]
        kinds = getattr(core.config, "layer_types", None)
        kept = None
        for number, layer in enumerate(core.layers):
            kind = kinds[number] if kinds else None
            rotary = core.rotary_emb(hidden, positions, *((kind,) if "Gemma3" in type(core).__name__ else ()))
            window = getattr(core.config, "sliding_window", None) if kind in (None, "sliding_attention") else None
            allowed = allowed_pairs(len(tokens), padding, window)
            mask = additive(allowed, hidden.dtype)
            if (number in ratio and select_at is None) or number == select_at:
                scores = score(layer, hidden, position_embeddings=rotary, attention_mask=mask)
                kept = kept_tokens(scores, frames, ratio.get(number, next(iter(ratio.values()))))
            of_layer = kept if number in ratio else torch.ones(len(tokens), dtype=torch.bool)
            mask = additive(allowed & (of_layer | torch.eye(len(tokens), dtype=torch.bool)), hidden.dtype)
            out = type(layer).forward(layer, hidden, attention_mask=mask, position_embeddings=rotary)
            if weighted and number in ratio:
                vision = torch.zeros(len(tokens), dtype=torch.bool)
                vision[frames[0] : frames[-1]] = True
                gain = torch.where(vision, scores, 1.0)[None, :, None]
                out = hidden + gain * (out - hidden)
            hidden = torch.where(of_layer[None, :, None], out, hidden)
        rows.append(model.lm_head(core.norm(hidden))[0])
    model.set_attn_implementation(attention)
    return torch.stack(rows)


def llama_logits(model, ids: Tensor, frames: Sequence[int], ratio: dict[int, float]) -> Tensor:
    """The same for a row of tokens [S] of a Llama, from its weights alone, in arithmetic of its own: [S, V]."""
    weights, config = model.state_dict(), model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    angles = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [S, 1, width / 2]

    def rms(hidden: Tensor, name: str) -> Tensor:
        return hidden * (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[name]

    def rotated(projected: Tensor, count: int) -> Tensor:
        parts = projected.view(len(projected), count, 2, width // 2)
        turned = torch.complex(parts[:, :, 0], parts[:, :, 1]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    hidden = weights["model.embed_tokens.weight"][ids]
    for number in range(config.num_hidden_layers):
        of = f"model.layers.{number}."
        kept = torch.ones(len(ids), dtype=torch.bool)
        if number in ratio:
            kept = kept_tokens(norm_score(None, hidden[None]), frames, ratio[number])
        normed = rms(hidden, of + "input_layernorm.weight")
        queries, keys, values = (normed @ weights[f"{of}self_attn.{name}_proj.weight"].T for name in "qkv")
        queries, keys, values = rotated(queries, heads), rotated(keys, groups), values.view(len(ids), groups, width)
        attended = torch.zeros(len(ids), heads, width, dtype=hidden.dtype)
        for query in range(len(ids)):
            seen = [key for key in range(query + 1) if kept[key]]
            for head in range(heads if kept[query] else 0):
                group = head * groups // heads
                share = (keys[seen, group] @ queries[query, head] * width**-0.5).softmax(0)
                attended[query, head] = share @ values[seen, group]
        middle = hidden + attended.flatten(1) @ weights[of + "self_attn.o_proj.weight"].T
        normed = rms(middle, of + "post_attention_layernorm.weight")
        gate, up = (normed @ weights[f"{of}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        out = middle + (gate * gate.sigmoid() * up) @ weights[of + "mlp.down_proj.weight"].T
        hidden = torch.where(kept[:, None], out, hidden)
    return rms(hidden, "model.norm.weight") @ weights["lm_head.weight"].T

"""Cases for the row and attention kernels, and plain loops that compute what is right."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from kernel_cases import DTYPES, SOURCES

VIEWS = {
    "contiguous": lambda make, b, s, d: make((b, s, d)),
    "behind a token": lambda make, b, s, d: make((b, s + 1, d))[:, 1:],
    "every other token": lambda make, b, s, d: make((b, 2 * s, d))[:, ::2],
    "some channels": lambda make, b, s, d: make((b, s, d + 5))[:, :, 3 : 3 + d],
    "token-major": lambda make, b, s, d: make((s, b, d)).transpose(0, 1),
    "one row": lambda make, b, s, d: make((d,)).expand(b, s, d),
}


def best_tokens(scores: list[float], frames: tuple[int, ...], ratio: float) -> list[int]:
    """By sorting, NaN first, of equals the first."""
    kept = []
    for start, stop in zip(frames, frames[1:]):
        key = {at: scores[at - frames[0]] for at in range(start, stop)}
        order = sorted(key, key=lambda at: (0, 0, at) if math.isnan(key[at]) else (1, -key[at], at))
        kept += sorted(order[: math.ceil(ratio * (stop - start) - 1e-9)])
    return kept


@st.composite
def choices(draw, most: int = 40):
    """(scores [B, V], frames, ratio)"""
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    frames = [draw(st.integers(0, 9))]
    for size in sizes:
        frames.append(frames[-1] + size)
    torch.manual_seed(draw(st.integers(0, 1000)))
    make, dtype = draw(st.sampled_from(SOURCES)), draw(st.sampled_from(DTYPES))
    batch, step = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    scores = make((batch, step * sum(sizes)), dtype)[:, ::step]
    return scores, tuple(frames), draw(st.sampled_from([0.1, 0.2, 0.5, 1.0]))


@st.composite
def merges(draw, channels: tuple[int, ...] = (1, 7, 16, 33, 130), tokens: int = 9):
    """(hidden [B, S, D], index [B, K], rows [B, K, D], weights [B, K])"""
    dtype, make = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SOURCES))
    torch.manual_seed(draw(st.integers(0, 1000)))
    views = st.sampled_from(list(VIEWS)).map(VIEWS.get)
    batch, tokens, width = draw(st.integers(1, 2)), draw(st.integers(1, tokens)), draw(st.sampled_from(channels))
    count = draw(st.integers(0, tokens))
    index = torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(batch)])
    if draw(st.booleans()):
        index = index[:1].expand(batch, -1)
    hidden, rows = (draw(views)(lambda shape: make(shape, dtype), batch, n, width) for n in (tokens, max(count, 1)))
    return hidden, index, rows[:, :count], torch.rand(batch, count) * 2


def taken(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows = [hidden[batch % len(hidden), at] for batch, places in enumerate(index.tolist()) for at in places]
    return torch.stack(rows).view(*index.shape, -1) if rows else hidden.new_empty(*index.shape, hidden.shape[2])


def merged(hidden, index, rows, weights=None):
    """Row by row; 16 bits in float32, rounded once."""
    out = hidden.clone()
    for batch, places in enumerate(index.tolist()):
        for place, at in enumerate(places):
            row = rows[batch, place]
            if weights is not None:
                before = hidden[batch, at].float()
                row = (before + weights[batch, place] * (row.float() - before)).to(hidden.dtype)
            out[batch, at] = row
    return out


def received(queries, keys, scale):
    """In float64, query by query."""
    (batch, heads, count, _), (_, groups, tokens, _) = queries.shape, keys.shape
    total = torch.zeros(batch, tokens, dtype=torch.float64)
    for head in range(heads):
        for query in range(count):
            seen = tokens - count + query + 1
            key = keys[:, head // (heads // groups), :seen].double()
            total[:, :seen] += (key @ queries[:, head, query].double()[..., None] * scale)[..., 0].softmax(-1)
    return total / (heads * count)


def check_received(got, queries, keys, scale):
    """FlashAttention's rule: no more than twice the error of the plain formula in the inputs' own dtype.

    And what two roundings of a log-sum-exp below 8 make of a probability: 2**-21 of it.
    """
    exact = received(queries, keys, scale)
    wide = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    logits = (queries @ wide.transpose(2, 3)).float() * scale
    count, tokens = logits.shape[2:]
    later = torch.ones(count, tokens, dtype=torch.bool).triu(tokens - count + 1)
    eager = logits.masked_fill(later, -torch.inf).softmax(-1).mean((1, 2))
    assert got.dtype == torch.float32 and got.shape == exact.shape
    error = (got.double().cpu() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max() + exact.max() * 2**-21 + 2e-8, error

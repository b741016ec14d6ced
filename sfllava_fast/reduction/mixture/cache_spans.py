"""Record of the token positions in each layer of a KV cache when layers skip tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError


class KeptSpan(NamedTuple):
    """Tokens [start, stop) of a sequence, of which a layer stores those at positions `kept` [B, K], ascending."""

    start: int
    stop: int
    kept: Tensor

    @property
    def left_out(self) -> int:
        """Number of tokens that the layer does not store."""
        return self.stop - self.start - self.kept.shape[1]


def spans_of(cache: Any, number: int, past: int) -> list[KeptSpan]:
    """The spans of a layer of a cache of `past` tokens, a list that the caller may append to."""
    if cache is None:
        return []
    # A KvCache tracks its own length. Text attends to every kept token, so an empty span in any place suffices.
    if hasattr(cache, "skipped"):
        absent = cache.skipped[number] if past else 0
        return [KeptSpan(0, absent, torch.empty(1, 0, dtype=torch.long))] if absent else []
    return _layers(cache).setdefault(number, [])


def recall(cache: Any, past: int) -> bool:
    """Whether a cache of `past` tokens lacks tokens in any layer. Drops spans of tokens that are no longer in it.

    Raises:
        InputError: If the cache was truncated so that its layers are inconsistent.
    """
    for number, spans in _layers(cache).items():
        spans[:] = [span for span in spans if span.start < past]
        held = past - sum(span.left_out for span in spans)
        if (spans and spans[-1].stop > past) or cache.get_seq_length(number) != held:
            raise InputError("the KV cache was truncated inside the vision tokens: start from an empty cache")
    return any(_layers(cache).values())


def _layers(cache: Any) -> dict[int, list[KeptSpan]]:
    return vars(cache).setdefault("sfllava_fast_spans", {})  # on the cache, so that copies have them too


def columns(spans: list[KeptSpan], total: int, rows: int, device: torch.device) -> Tensor:
    """Positions [B, n], ascending, of those of the first `total` tokens that a layer with these spans stores."""
    parts: list[Tensor] = []
    at = 0
    for span in spans:
        if len(span.kept) not in (1, rows):
            raise InputError(
                f"the cache's vision tokens have {len(span.kept)} rows, not {rows}: start from an empty cache"
            )
        parts += [torch.arange(at, span.start, device=device)[None], span.kept]
        at = span.stop
    parts.append(torch.arange(at, total, device=device)[None])
    return torch.cat([part.to(device).expand(rows, -1) for part in parts], dim=1)


def cut_mask(mask: Tensor | None, columns: Tensor, rows: Tensor | None = None, total: int = 0) -> Tensor | None:
    """Select columns, and rows if given, of an attention mask.

    Args:
        mask: [B, P], or [B or 1, H or 1, Q, P], bool or additive, or None. Its columns are the last P of `total`
            positions; earlier ones are outside a sliding window.
        columns: [B, n], positions of keys in the sequence.
        rows: [B, m], numbers of queries, or None for all.
        total: Number of positions of the sequence.

    Returns:
        The mask, [B, n] or [B, H or 1, m, n], or None without a mask.
    """
    if mask is None:
        return None
    columns = columns - max(0, total - mask.shape[-1])
    inside, columns = columns >= 0, columns.clamp(min=0)
    if mask.dim() == 2:
        return mask.gather(1, columns) * inside
    mask = mask.expand(len(columns), -1, -1, -1)
    inside, columns = inside[:, None, None], columns[:, None, None]
    if rows is not None:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns.expand(-1, *mask.shape[1:3], -1))
    return mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, torch.finfo(mask.dtype).min)

"""Which tokens of a sequence each layer of a key/value cache holds, where some were left out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError


class KeptSpan(NamedTuple):
    """Tokens [start, stop) of a sequence, of which a layer holds those at positions `kept` [B, K], ascending."""

    start: int
    stop: int
    kept: Tensor

    @property
    def left_out(self) -> int:
        return self.stop - self.start - self.kept.shape[1]


def spans_of(cache: Any, number: int, past: int) -> list[KeptSpan]:
    """What a layer of a cache of `past` tokens holds of vision tokens, to be added to; of no cache, nothing."""
    if cache is None:
        return []
    if hasattr(cache, "skipped"):  # a KvCache counts for itself; text sees all alike, so that any may stand for them
        absent = cache.skipped[number] if past else 0
        return [KeptSpan(0, absent, torch.empty(1, 0, dtype=torch.long))] if absent else []
    return _layers(cache).setdefault(number, [])


def recall(cache: Any, past: int) -> bool:
    """Whether a cache of `past` tokens lacks some in some layer; what it was set back from is forgotten.

    Raises InputError where it was cut so that its layers no longer fit together.
    """
    for number, spans in _layers(cache).items():
        spans[:] = [span for span in spans if span.start < past]
        held = past - sum(span.left_out for span in spans)
        if (spans and spans[-1].stop > past) or cache.get_seq_length(number) != held:
            raise InputError("the cache was cut before or among its vision tokens: prefill a new one")
    return any(_layers(cache).values())


def _layers(cache: Any) -> dict[int, list[KeptSpan]]:
    return vars(cache).setdefault("sfllava_fast_spans", {})  # on it, so that what copies it or drops it has them too


def columns(spans: list[KeptSpan], total: int, rows: int, device: torch.device) -> Tensor:
    """Positions [B, n] of the first `total` tokens that a layer with these spans holds, ascending."""
    parts, at = [], 0
    for span in spans:
        if len(span.kept) not in (1, rows):
            raise InputError(f"the cache's vision tokens are of {len(span.kept)} rows, not {rows}: prefill a new one")
        parts += [torch.arange(at, span.start, device=device)[None], span.kept]
        at = span.stop
    parts.append(torch.arange(at, total, device=device)[None])
    return torch.cat([part.to(device).expand(rows, -1) for part in parts], dim=1)


def cut_mask(mask: Tensor | None, columns: Tensor, rows: Tensor | None = None, total: int = 0) -> Tensor | None:
    """An attention mask that has only these columns [B, n], and rows [B, m] where given: positions of the sequence and
    of its queries.

    mask: [B, P], or [B or 1, H or 1, Q, P], bool or additive. Its columns are the last P of `total` positions: those
        before them are out of a sliding window.
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

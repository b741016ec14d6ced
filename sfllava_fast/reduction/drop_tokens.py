"""Tokens taken out of a transformers cache; what comes after goes on at the positions that it would have had."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError


class GappedLayer(DynamicLayer):
    """A layer of a DynamicCache without the tokens that were dropped from it.

    Its length stays the position of the next token, by which models and `generate` number what comes; what a mask
    covers is what it holds, as in the layers of a sliding window.
    """

    def __init__(self, layer: DynamicLayer, start: int, stop: int) -> None:
        vars(self).update(vars(layer))  # whatever this release of transformers keeps there
        before = getattr(layer, "dropped", 0)
        first, last = start - before, stop - before
        assert layer.keys is not None and layer.values is not None  # the caller has checked the length
        # Copies: slices would keep the memory.
        self.keys, self.values = (
            torch.cat([rows[..., :first, :], rows[..., last:, :]], dim=-2) for rows in (layer.keys, layer.values)
        )
        self.dropped, self.gap_end = before + stop - start, stop

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(queries)
        return length - self.dropped, offset + self.dropped

    def reset(self) -> None:
        super().reset()
        self.dropped = self.gap_end = 0


def drop_tokens(cache: DynamicCache, start: int, stop: int) -> None:
    """Drop the keys and values of tokens [start, stop) from every layer of a cache, in place, in all rows alike.

    Tokens are counted as the sequence has them, dropped ones too. The others keep the positions that they were computed
    at, and what comes goes on behind the whole sequence; so `generate` takes ids of the whole sequence, whatever stands
    in the dropped places. The memory is given back.

    Raises InputError, with the cache as it was, for tokens that it does not hold, tokens before dropped ones, and
    layers that do not hold every token as it is: static, sliding, quantized.
    """
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, GappedLayer):
            raise InputError(f"a {type(layer).__name__} cannot drop tokens: use a DynamicCache of full attention")
    length, first = cache.get_seq_length(), max((getattr(layer, "gap_end", 0) for layer in cache.layers), default=0)
    if not first <= start < stop <= length:
        raise InputError(f"tokens [{start}, {stop}) cannot be dropped: the cache has [{first}, {length}) to drop from")
    layers: list[Any] = cache.layers
    layers[:] = [GappedLayer(layer, start, stop) for layer in layers]

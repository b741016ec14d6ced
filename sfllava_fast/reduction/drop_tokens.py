"""Removal of tokens from a transformers cache. Later tokens keep their positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import InputError


class GappedLayer(DynamicLayer):
    """A layer of a DynamicCache after tokens were dropped.

    Its length remains the position of the next token, which models and `generate` read. Masks cover only the stored
    tokens, as in layers with a sliding window.

    Attributes:
        dropped: Number of dropped tokens.
        gap_end: End of the last dropped tokens.
    """

    def __init__(self, layer: DynamicLayer, start: int, stop: int) -> None:
        vars(self).update(vars(layer))  # attributes differ between releases of transformers
        before = getattr(layer, "dropped", 0)
        first, last = start - before, stop - before
        # Copies, since slices would keep the memory.
        self.keys, self.values = (
            torch.cat([rows[..., :first, :], rows[..., last:, :]], dim=-2) for rows in _stored(layer)
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


def _stored(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def drop_tokens(cache: DynamicCache, start: int, stop: int) -> None:
    """Drop the keys and values of tokens [start, stop) from all layers and rows of a cache, in place; frees the memory.

    The other tokens keep their positions, and new tokens follow the whole sequence. `generate` takes the ids of the
    whole sequence, with any ids in the dropped places.

    Args:
        cache: The cache.
        start: First token to drop, counted in the sequence, including dropped tokens.
        stop: End of the tokens to drop.

    Raises:
        InputError: If the cache does not have these tokens, if later tokens were dropped before, or if layers do not
            store all tokens unchanged (static, sliding, quantized). The cache is unchanged.
    """
    layers = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or type(layer) not in (DynamicLayer, GappedLayer):
            raise InputError(f"a {type(layer).__name__} cannot drop tokens: use a DynamicCache of full attention")
        layers.append(layer)
    length, first = cache.get_seq_length(), max((getattr(layer, "gap_end", 0) for layer in cache.layers), default=0)
    if not first <= start < stop <= length:
        raise InputError(f"tokens [{start}, {stop}) cannot be dropped: the cache has [{first}, {length}) to drop from")
    cache.layers[:] = [GappedLayer(layer, start, stop) for layer in layers]

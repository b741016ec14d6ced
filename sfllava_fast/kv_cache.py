"""Keys and values of a language model, in buffers that never move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class Filled(Exception):
    """Raised out of a forward pass once the last layer's keys and values are written: nothing after them is wanted."""


class KvCache(Cache):
    """A transformers cache of `rows` sequences with room for `capacity` tokens each.

    length: tokens that every row holds; the next ones are written behind them, and the cache is seen up to there.
        Setting it back forgets tokens.
    positions: [rows] on the device, or None. Where each row's next tokens go when rows differ in length; the forward
        pass then needs a mask of its own, over the first `stop` tokens, so that shapes can stay the same.
    """

    def __init__(self, config: Any, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Zeros, since a masked value still enters a product, and 0 * NaN is NaN.
        shape = config.num_hidden_layers, 2, rows, config.num_key_value_heads, capacity, width
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        self.length, self.stop = 0, capacity
        self.positions: Tensor | None = None
        self.fill_only = False
        self.step: Any = None  # what decodes in this cache, kept for the next answer

    @property
    def rows(self) -> int:
        return self.buffer.shape[2]

    @property
    def capacity(self) -> int:
        return self.buffer.shape[4]

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def take(self, other: KvCache, rows: list[int]) -> None:
        """Copy these rows of another cache, as far as they fit."""
        length = min(self.capacity, other.capacity)
        for row, source in enumerate(rows):
            self.buffer[:, :, row, :, :length] = other.buffer[:, :, source, :, :length]
        self.length = other.length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, n, width] into a layer and return all that its queries may see."""
        written = self.buffer[layer_idx]
        stop = self.length + keys.shape[2] if self.positions is None else self.stop
        for kind, new in enumerate((keys, values)):
            if self.positions is None:
                written[kind, :, :, self.length : stop] = new
            else:
                rows, columns = torch.broadcast_tensors(
                    torch.arange(self.rows, device=new.device)[:, None],
                    self.positions[:, None] + torch.arange(new.shape[2], device=new.device),
                )
                written[kind].transpose(1, 2).index_put_((rows, columns), new.transpose(1, 2))
        if self.fill_only and layer_idx == len(self.buffer) - 1:
            raise Filled
        return written[0, :, :, :stop], written[1, :, :, :stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, queries: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        # Earlier releases of transformers pass the queries' positions.
        return self.length + (queries.shape[0] if isinstance(queries, Tensor) else queries), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

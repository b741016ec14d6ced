"""KV cache of a language model, in buffers with fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .config_sizes import head_width


class Filled(Exception):
    """Ends a forward pass after the last layer's keys and values are written."""


class KvCache(Cache):
    """A transformers cache of `rows` sequences with a capacity of `capacity` tokens each.

    Attributes:
        length: Number of tokens of every row, and the position of the next one. Setting it back drops tokens.
        skipped: Number of a video's tokens that each layer does not store. `length` includes them. The tokens that are
            written first lack them; later tokens are stored in all layers.
        positions: [rows] on the device, or None. The position of each row's next token if rows differ in length. The
            forward pass then needs a mask over the first `stop` tokens; shapes stay fixed.
        stop: Number of tokens that queries may attend to if `positions` is set.
        fill_only: Whether the last layer raises Filled after it is written.
        step: The `StaticStep` that decodes in this cache, kept for the next answer.
        buffers: Keys and values of each layer, [2, rows, heads, tokens, width].
    """

    def __init__(
        self,
        config: Any,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        skipped: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers=[])
        width = head_width(config)
        self.skipped = tuple(skipped or [0] * config.num_hidden_layers)
        # Zeros, since a masked value still enters a product, and 0 * NaN is NaN.
        self.buffers = [
            torch.zeros(2, rows, config.num_key_value_heads, capacity - absent, width, dtype=dtype, device=device)
            for absent in self.skipped
        ]
        self.rows, self.capacity = rows, capacity
        self.length, self.stop = 0, capacity
        self.positions: Tensor | None = None
        self.fill_only = False
        self.step: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def first(self, tokens: int) -> list[Tensor]:
        """Keys and values of the first `tokens` tokens in each layer, [2, rows, heads, n, width]."""
        return [buffer[..., : tokens - absent, :] for buffer, absent in zip(self.buffers, self.skipped)]

    def take(self, other: KvCache, rows: Sequence[int]) -> None:
        """Copy rows of another cache with the same `skipped`, up to this one's capacity."""
        for mine, theirs in zip(self.buffers, other.buffers):
            places = min(mine.shape[3], theirs.shape[3])
            for row, source in enumerate(rows):
                mine[:, row, :, :places] = theirs[:, source, :, :places]
        self.length = other.length

    def take_around(self, other: KvCache, start: int, stop: int) -> None:
        """Copy all rows of another cache, which skips no tokens, without tokens [start, stop), which this one skips."""
        for mine, theirs in zip(self.buffers, other.buffers):
            mine[..., :start, :] = theirs[..., :start, :]
            mine[..., start : start + other.length - stop, :] = theirs[..., stop : other.length, :]
        self.length = other.length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, n, width] into a layer. Returns the keys and values that its queries attend to."""
        written = self.buffers[layer_idx]
        start = self.get_seq_length(layer_idx)
        stop = start + key_states.shape[2] if self.positions is None else self.stop - self.skipped[layer_idx]
        for kind, new in enumerate((key_states, value_states)):
            if self.positions is None:
                written[kind, :, :, start:stop] = new
            else:
                rows, columns = torch.broadcast_tensors(
                    torch.arange(self.rows, device=new.device)[:, None],
                    self.positions[:, None] + torch.arange(new.shape[2], device=new.device) - self.skipped[layer_idx],
                )
                written[kind].transpose(1, 2).index_put_((rows, columns), new.transpose(1, 2))
        if self.fill_only and layer_idx == len(self.buffers) - 1:
            raise Filled
        return written[0, :, :, :stop], written[1, :, :, :stop]

    def advance(self, tokens: int) -> None:
        """Count `tokens` tokens that were written to the first layer, and before these the tokens that it skips."""
        self.length += tokens if self.length else tokens + self.skipped[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that a layer stores."""
        return max(0, self.length - self.skipped[layer_idx])

    def get_mask_sizes(self, queries: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        # Earlier releases of transformers pass the positions of the queries.
        count = queries.shape[0] if isinstance(queries, Tensor) else queries
        return self.get_seq_length(layer_idx) + count, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

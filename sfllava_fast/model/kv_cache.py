"""Keys and values of a language model, in buffers that never move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .config_sizes import head_width


class Filled(Exception):
    """Raised out of a forward pass once the last layer's keys and values are written: nothing after them is wanted."""


class KvCache(Cache):
    """A transformers cache of `rows` sequences with room for `capacity` tokens each.

    length: tokens that every row has had; the next ones are written behind them, and the cache is seen up to there.
        Setting it back forgets tokens.
    skipped: by layer, how many of a video's tokens it never gets a place for. They count in `length`, which stays the
        position of the next token, and go missing in the first tokens that are written: all later ones go everywhere.
    positions: [rows] on the device, or None. Where each row's next tokens go when rows differ in length; the forward
        pass then needs a mask of its own, over the first `stop` tokens, so that shapes can stay the same.
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
        self.step: Any = None  # what decodes in this cache, kept for the next answer

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def first(self, tokens: int) -> list[Tensor]:
        """What each layer holds of so many tokens, [2, rows, heads, n, width]."""
        return [buffer[..., : tokens - absent, :] for buffer, absent in zip(self.buffers, self.skipped)]

    def take(self, other: KvCache, rows: Sequence[int]) -> None:
        """Copy these rows of another cache that skips the same, as far as they fit."""
        for mine, theirs in zip(self.buffers, other.buffers):
            places = min(mine.shape[3], theirs.shape[3])
            for row, source in enumerate(rows):
                mine[:, row, :, :places] = theirs[:, source, :, :places]
        self.length = other.length

    def take_around(self, other: KvCache, start: int, stop: int) -> None:
        """Copy all rows of another cache, which skips nothing, without its tokens [start, stop): those this skips."""
        for mine, theirs in zip(self.buffers, other.buffers):
            mine[..., :start, :] = theirs[..., :start, :]
            mine[..., start : start + other.length - stop, :] = theirs[..., stop : other.length, :]
        self.length = other.length

    def update(  # type: ignore[override]  # the names of the states differ by release
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, n, width] into a layer and return all that its queries may see."""
        written = self.buffers[layer_idx]
        start = self.get_seq_length(layer_idx)
        stop = start + keys.shape[2] if self.positions is None else self.stop - self.skipped[layer_idx]
        for kind, new in enumerate((keys, values)):
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
        """So many tokens were written into the first layer: those that it skips went with the first of them."""
        self.length += tokens if self.length else tokens + self.skipped[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer holds."""
        return max(0, self.length - self.skipped[layer_idx])

    def get_mask_sizes(self, queries: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        # Earlier releases of transformers pass the queries' positions.
        count = queries.shape[0] if isinstance(queries, Tensor) else queries
        return self.get_seq_length(layer_idx) + count, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

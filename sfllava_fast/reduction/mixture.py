"""Mixture of depths for vision tokens (VideoLLM-MoD, arXiv 2408.16730): in some layers only the vision tokens of each
frame that score highest are computed on; the others pass unchanged, and leave no keys and values there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..replacement import Patch
from .frames import check_frames, check_ratio, clip_frames, kept_of
from .rows import gather_rows, scatter_rows, top_per_frame
from .scorers import LayerExpert, LayerInput, Norm


class MixtureOfDepths(nn.Module):
    """Wraps a transformers model with a Llama-like decoder, in place; `undo` restores it exactly.

    ratio: of each frame's vision tokens, which share a mixed layer computes on. scorer: "norm" or "learned".
    layers: which layers are mixed; None: every other one, from the second on.
    """

    def __init__(
        self, model: nn.Module, ratio: float = 0.2, scorer: str = "norm", layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        decoder = model.get_decoder()
        self.ratio = check_ratio(ratio)
        self.layers = tuple(range(1, len(decoder.layers), 2) if layers is None else layers)
        width = decoder.config.hidden_size
        make = {"norm": Norm, "learned": partial(LayerExpert, width)}[scorer]
        self.scorers = nn.ModuleDict({str(number): make() for number in self.layers})
        self._count = len(decoder.layers)
        self._frames: tuple[int, ...] | None = None
        self._past = 0  # tokens before those of this forward pass
        mixed = [(decoder.layers[at], "forward", self._mixed(at, decoder.layers[at])) for at in self.layers]
        self._patch = Patch(decoder, [(decoder, "forward", self._counted(decoder)), *mixed])

    @contextmanager
    def frames(self, frames: Sequence[int]) -> Iterator[None]:
        """Within it the model's sequences have vision tokens at these offsets [F + 1]; all else is text."""
        before, self._frames = self._frames, check_frames(frames)
        try:
            yield
        finally:
            self._frames = before

    def skipped(self, frames: Sequence[int]) -> tuple[int, ...]:
        """How many tokens of a sequence with these frames each layer leaves out, known before any forward pass."""
        sizes = [stop - start for start, stop in zip(frames, frames[1:])]
        left_out = sum(size - kept_of(self.ratio, size) for size in sizes)
        return tuple(left_out if number in self.layers else 0 for number in range(self._count))

    def undo(self) -> None:
        self._patch.undo()

    def _counted(self, decoder: nn.Module) -> Callable[..., Any]:
        plain = decoder.forward

        def forward(*positional: Any, **arguments: Any) -> Any:
            cache = arguments.get("past_key_values")
            self._past = cache.get_seq_length() if cache is not None else 0
            return plain(*positional, **arguments)

        return forward

    def _mixed(self, number: int, layer: nn.Module) -> Callable[..., Tensor]:
        plain = layer.forward

        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            total = hidden_states.shape[1]
            frames = clip_frames(self._frames, self._past, self._past + total) if self._frames else ()
            if not frames or self.ratio == 1:
                return plain(hidden_states, **arguments)
            scores = self.scorers[str(number)](LayerInput(hidden_states, frames[0], frames[-1], layer, arguments))
            kept = top_per_frame(scores.detach(), frames, self.ratio)
            text = torch.cat([torch.arange(frames[0]), torch.arange(frames[-1], total)]).expand(len(kept), -1)
            index = torch.cat([text[:, : frames[0]], kept, text[:, frames[0] :]], dim=1)
            rows = gather_rows(hidden_states, index)
            cos, sin = (
                gather_rows(part.expand(len(index), -1, -1), index) for part in arguments["position_embeddings"]
            )
            arguments |= {"position_embeddings": (cos, sin), "attention_mask": None, "position_ids": None}
            out = plain(rows, **arguments)
            if scores.requires_grad:  # straight through: the value is the block's, the score gets its gradient
                gate = scores.sigmoid().gather(1, kept - frames[0])
                gate = nn.functional.pad(gate, (frames[0], total - frames[-1]))
                out = out + (gate - gate.detach())[..., None] * (out - rows)
            return scatter_rows(hidden_states, index, out)

        return forward

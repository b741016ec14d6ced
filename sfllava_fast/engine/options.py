"""Everything that is chosen when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError, InputError, check_count
from ..layouts.layout import Layout
from ..layouts.presets import parse_layout
from ..model.attention import resolve_attention
from ..model.checkpoint import choose_device, choose_dtype
from ..model.prompts import check_family
from ..ops.backends.aggregate import choose
from ..ops.projector import Mode, check_mode, why_layout_not_commuted
from .session_pool import DEFAULT_SESSIONS

if TYPE_CHECKING:
    from ..reduction.prefilling import Reduction


@dataclass(frozen=True)
class ModelOptions:
    """How a model runs. Making one checks everything that can be checked without a checkpoint.

    Attributes:
        layout: A layout or its text, such as a name of `layouts.PRESETS`. None: the checkpoint's, else the paper's.
        dtype: Such as "bfloat16". None: float32 on a CPU, the checkpoint's 16-bit dtype on a GPU.
        device: Such as "cuda:1". None: a GPU if there is one.
        backend: Of the aggregator: "auto", or a name of `ops.backends.aggregate.BACKENDS`.
        attention: One of `model.attention.CHOICES`.
        prompt: "auto", or one of `model.prompts.FAMILIES`.
        projector: "exact", "commuted" or "auto", as in `project_and_aggregate`.
        max_sessions: Sessions whose KV caches stay in memory; beyond it the least recently used one is released.
        max_session_bytes: The same in bytes, with the cache that `answer` keeps for the next call. None: no bound.
        separators: The layout's separators, [D] each, by name. None: the checkpoint's newline, else the embedding of a
            text (see `model.separator_vectors.find_separators`).
        reduction: Fewer video tokens in the language model: a text (`reduction.settings.FORMS`) or its settings.

    Raises:
        LayoutError, InputError, BackendError, CheckpointError: For a value that no checkpoint can be loaded with.
    """

    layout: str | Layout | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    backend: str = "auto"
    attention: str = "auto"
    prompt: str = "auto"
    projector: Mode = "exact"
    max_sessions: int = DEFAULT_SESSIONS
    max_session_bytes: int | None = None
    separators: Mapping[str, torch.Tensor] | None = None
    reduction: str | Reduction | None = None

    def __post_init__(self) -> None:
        from ..reduction.settings import parse_reduction

        check_mode(self.projector)
        if self.prompt != "auto":
            check_family(self.prompt)
        if self.layout is not None:
            check_commutes(parse_layout(self.layout), self.projector)
        reduction = parse_reduction(self.reduction) if isinstance(self.reduction, str) else self.reduction
        if (file := getattr(reduction, "file", None)) and not Path(file).is_file():
            raise CheckpointError(f"the reduction's file {file} does not exist: check its path")
        self._check_sessions()
        if self.separators is not None and not isinstance(self.separators, Mapping):
            raise InputError(f"separators must be a dict of vectors by name, not a {type(self.separators).__name__}")
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device, {})
        if self.backend != "auto":
            choose(self.backend, torch.empty(1, 1, 8, dtype=dtype, device=device))
        if self.attention not in ("auto", "sdpa"):  # these two always work, and "auto" may time kernels on a GPU
            resolve_attention(self.attention, device, dtype)

    def _check_sessions(self) -> None:
        check_count("max_sessions", self.max_sessions)
        most = self.max_session_bytes
        if most is not None and not (isinstance(most, int) and most > 0):
            raise InputError(f"max_session_bytes must be a number of bytes of at least 1, not {most!r}")


def check_commutes(layout: Layout, projector: Mode) -> None:
    """Raise InputError if the projector is to be commuted with a layout that cannot be."""
    if projector == "commuted" and (reason := why_layout_not_commuted(layout)):
        raise InputError(f"the projector cannot be commuted with pooling: {reason}; take exact or auto")

"""The aggregator, alone and with the projector, as modules, for pipelines built of modules."""

from __future__ import annotations

from torch import Tensor, nn

from .config import Layout, SlowFastConfig
from .layouts import parse_layout
from .ops import slowfast_aggregate
from .projector import Mode, project_and_aggregate, why_not_commuted


class SlowFastAggregator(nn.Module):
    """`slowfast_aggregate` with its layout, backend and grid kept: [T, N, D] -> [S, D].

    Has no parameters and no buffers. Errors are those of `slowfast_aggregate`.
    """

    def __init__(
        self,
        config: Layout | str = SlowFastConfig(),
        backend: str = "auto",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backend, self.grid = parse_layout(config), backend, grid

    def forward(self, features: Tensor, frame_offsets: Tensor | None = None, out: Tensor | None = None):
        return slowfast_aggregate(
            features, self.config, out=out, backend=self.backend, grid=self.grid, frame_offsets=frame_offsets
        )

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend}"


class FusedProjectorAggregator(nn.Module):
    """`project_and_aggregate` with a projector and its settings kept: [T, N, C] -> [S, D].

    projector: is the submodule `projector`, under which name the state dict has its weights. One that is wrapped (by
        LoRA, quantization, FSDP, DDP) is called whole: "auto" is "exact" then, "commuted" an InputError that says why.
    The module itself may be wrapped as any other. Errors are those of `project_and_aggregate`.
    """

    def __init__(
        self,
        projector: nn.Module,
        config: Layout | str = SlowFastConfig(),
        mode: Mode = "auto",
        backend: str = "auto",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.projector = projector
        self.config, self.mode, self.backend, self.grid = parse_layout(config), mode, backend, grid

    def forward(self, hidden: Tensor, frame_offsets: Tensor | None = None, out: Tensor | None = None):
        return project_and_aggregate(
            hidden,
            self.projector,
            self.config,
            mode=self.mode,
            out=out,
            backend=self.backend,
            grid=self.grid,
            frame_offsets=frame_offsets,
        )

    def extra_repr(self) -> str:
        reason = why_not_commuted(self.projector) if self.mode != "exact" else None
        return f"{self.config}, mode={self.mode}" + (f" (never commuted: {reason})" if reason else "")

"""The aggregator as modules, alone and with the projector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layouts.layout import Layout
from ..layouts.presets import parse_layout
from ..layouts.slowfast import SlowFastLayout
from .aggregate import aggregate_by_pathway, check_apart, check_sides, slowfast_aggregate
from .backends.aggregate import check_name
from .projector import Mode, check_mode, project_and_aggregate, why_not_commuted


class SlowFastAggregator(nn.Module):
    """`slowfast_aggregate` as a module without parameters: [T, N, D] -> [S, D], [B, T, N, D] -> [B, S, D].

    Args:
        layout, backend, grid: as in `slowfast_aggregate`.

    Raises:
        InputError, LayoutError, BackendError: a setting is wrong. Calls raise the errors of `slowfast_aggregate`.
    """

    def __init__(
        self,
        layout: Layout | str = SlowFastLayout(),
        backend: str = "auto",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check_settings(backend, grid)
        self.layout, self.backend, self.grid = parse_layout(layout), backend, grid

    def forward(
        self,
        features: Tensor,
        frame_offsets: Tensor | None = None,
        out: Tensor | None = None,
        separators: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return slowfast_aggregate(
            features,
            self.layout,
            out=out,
            backend=self.backend,
            grid=self.grid,
            frame_offsets=frame_offsets,
            separators=separators,
        )

    def extra_repr(self) -> str:
        return f"{self.layout}, backend={self.backend}"


class FusedProjectorAggregator(nn.Module):
    """`project_and_aggregate` as a module: [T, N, C] -> [S, D], [B, T, N, C] -> [B, S, D].

    The module may be wrapped like any other.

    Args:
        projector: the submodule `projector`, by which name its weights are in the state dict. A wrapped one (by LoRA,
            quantization, FSDP, DDP) is called as a whole: then "auto" is "exact", and "commuted" an InputError.
        layout, mode, backend, grid: as in `project_and_aggregate`.

    Raises:
        InputError, LayoutError, BackendError: a setting is wrong. Calls raise the errors of `project_and_aggregate`.
    """

    def __init__(
        self,
        projector: nn.Module,
        layout: Layout | str = SlowFastLayout(),
        mode: Mode = "auto",
        backend: str = "auto",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check_modules(projector)
        _check_settings(backend, grid)
        check_mode(mode)
        self.projector = projector
        self.layout, self.mode, self.backend, self.grid = parse_layout(layout), mode, backend, grid

    def forward(
        self,
        hidden: Tensor,
        frame_offsets: Tensor | None = None,
        out: Tensor | None = None,
        separators: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return project_and_aggregate(
            hidden,
            self.projector,
            self.layout,
            mode=self.mode,
            out=out,
            backend=self.backend,
            grid=self.grid,
            frame_offsets=frame_offsets,
            separators=separators,
        )

    def extra_repr(self) -> str:
        reason = why_not_commuted(self.projector) if self.mode != "exact" else None
        return f"{self.layout}, mode={self.mode}" + (f" (never commuted: {reason})" if reason else "")


class PathwayProjectors(nn.Module):
    """Pools, then projects each pathway's tokens by a projector of its own: [T, N, C] -> [S, D], or of a batch.

    RED-VILLM (arXiv 2404.11865) projects its temporal and its spatial tokens so. A padded pathway's zeros are projected
    too.

    Args:
        projectors: by the names of the pathways; they become submodules `projectors.<name>`.
        layout: a layout whose pathways follow one another, without separators, or its text.
        backend, grid: as in `slowfast_aggregate`.

    Raises:
        InputError: the names are not those of the pathways, or the pathways do not follow one another.
    """

    def __init__(
        self,
        projectors: Mapping[str, nn.Module],
        layout: Layout | str = "red_villm",
        backend: str = "auto",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check_settings(backend, grid)
        self.layout, self.backend, self.grid = parse_layout(layout), backend, grid
        check_apart(self.layout)
        names = [path.name for path in self.layout.pathways]
        if not isinstance(projectors, (Mapping, nn.ModuleDict)) or set(projectors) != set(names):
            raise InputError(f"{self.layout} needs a projector for each of {', '.join(names)}, and no other")
        _check_modules(*projectors.values())
        self.projectors = nn.ModuleDict({name: projectors[name] for name in names})

    def forward(self, hidden: Tensor) -> Tensor:
        parts = aggregate_by_pathway(hidden, self.layout, backend=self.backend, grid=self.grid)
        return torch.cat([self.projectors[name](part) for name, part in parts.items()], dim=-2)

    def extra_repr(self) -> str:
        return f"{self.layout}, backend={self.backend}"


def _check_settings(backend: object, grid: object) -> None:
    """Raises what a call would for these settings."""
    check_name(backend)
    if grid is not None:
        check_sides(grid)


def _check_modules(*projectors: object) -> None:
    for projector in projectors:
        if not isinstance(projector, nn.Module):
            raise InputError(f"a projector must be a torch.nn.Module, not {type(projector).__name__}")

"""The aggregator as a module, for pipelines built of modules."""

from __future__ import annotations

from torch import Tensor, nn

from .config import Layout, SlowFastConfig
from .ops import slowfast_aggregate


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
        self.config, self.backend, self.grid = Layout.parse(config), backend, grid

    def forward(self, features: Tensor, frame_offsets: Tensor | None = None, out: Tensor | None = None):
        return slowfast_aggregate(
            features, self.config, out=out, backend=self.backend, grid=self.grid, frame_offsets=frame_offsets
        )

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend}"

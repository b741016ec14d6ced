"""Linear1, GELU and the pooling between the projector's layers in float64, box by box."""

from __future__ import annotations

import torch

from sfllava_fast.layouts.plan import Plan


def boxes(plan: Plan, reduce: str):
    """(frame, patches) of every token of the pathways that reduce so, in the plan's order."""
    for video in range(len(plan.lengths)):
        for path in plan.pathways:
            grid = torch.arange(plan.grid[0] * plan.grid[1]).view(path.shape)
            for frame, _ in path.frames[video] if path.pathway.reduce == reduce else ():
                for top, bottom in path.rows:
                    yield from ((frame, grid[top:bottom, left:right].flatten()) for left, right in path.cols)


def project(hidden, weight, bias, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled [M, I], kept [F, N, I]) in float64."""
    x = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    x = x * torch.special.erfc(-x / 2**0.5) / 2
    pooled = [x[frame, patches].mean(0) for frame, patches in boxes(plan, "mean")]
    kept = sorted({frame for frame, _ in boxes(plan, "max")})
    return torch.stack(pooled) if pooled else x.new_empty(0, x.shape[2]), x[kept]

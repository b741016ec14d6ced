"""Rows of the output that no patch is pooled into: separators, which the caller supplies, and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts.plan import Plan, kept_with_plan
from .backends.plan_table import host_table, on_device


def write_separators(out: Tensor, plan: Plan, separators: Tensor | None) -> None:
    """Writes separators [K, D] into their rows of out [S, D], and zeros into the plan's rows of zeros."""
    if plan.zeros:
        out[on_device(_rows(plan)[0], out.device)] = 0
    if separators is not None:
        rows, which = (on_device(part, out.device) for part in _rows(plan)[1:])
        out[rows] = separators[which]


def with_separators(tokens: Tensor, plan: Plan, separators: Tensor) -> Tensor:
    """Tokens [S, D] or [B, S, D] with separators [K, D] in their rows; differentiable.

    plan: of a batch, that of one video.
    """
    _, rows, which = (on_device(part, tokens.device) for part in _rows(plan))
    written = separators[which]
    return tokens.index_copy(-2, rows, written.expand(*tokens.shape[:-2], *written.shape))


def separators_backward(grad: Tensor, plan: Plan) -> Tensor:
    """Gradient [K, D] of the separators for the tokens' gradient [S, D], added in float32 at least."""
    _, rows, which = (on_device(part, grad.device) for part in _rows(plan))
    wide = grad[rows].to(torch.promote_types(grad.dtype, torch.float32))
    total = wide.new_zeros(len(plan.separators), grad.shape[1]).index_add_(0, which, wide)
    return total.to(grad.dtype)


@kept_with_plan
def _rows(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are zero, rows of separators, and which separator each of those is."""
    rows, which = zip(*plan.separator_rows) if plan.separator_rows else ((), ())
    return host_table(plan.zeros, torch.long), host_table(rows, torch.long), host_table(which, torch.long)

"""Derivatives of the op of any order, in reverse and forward mode, alone or under vmap.

As long as each maximum keeps its element, tokens are linear in features and separators, and the gradients of both are
linear in the tokens' gradient. So each of the three maps is differentiated by the other two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from ..errors import InputError


def is_transformed() -> bool:
    """Whether forward-mode gradients are on, or one of torch.func's transforms is running."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient of these may be wanted, of either mode."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return wanted or is_transformed()


def below_autograd(op: Callable, *args: Any) -> Any:
    """Runs an op without its autograd kernel; within torch.func, without that of the innermost level."""
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._functorch.peek_interpreter_stack() is None:
            return op(*args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # a Function's forward has them off
            return op(*args)


def fold_into_channels(run: Callable, info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    """The batching rule of vmap for ops that treat all channels alike: the batch becomes channels, in a copy."""
    folded = []
    for arg, dim in zip(args, in_dims):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            if dim is None:
                arg, dim = arg[None].expand(info.batch_size, *arg.shape), 0
            arg = arg.movedim(dim, -2).flatten(-2)
        elif dim is not None:
            raise InputError("vmap cannot batch frame_offsets: pack the videos, or pass features as [B, T, N, D]")
        folded.append(arg)
    result = run(*folded)
    return result.unflatten(-1, (info.batch_size, -1)), result.dim() - 1


# The class of autograd kernels of ops, which torch.func runs after it has unwrapped a level.
OneLevel = torch.autograd.function._SingleLevelFunction


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The function's results, which autograd will differentiate."""
    with enable_single_level_autograd_function():
        return function.apply(*args)


class Pool(OneLevel):
    """Tokens of `values`; with `features`, whose maxima decide, the tokens' tangent for the tangent `values`."""

    @staticmethod
    def forward(values, features, separators, layout, height, width, frame_offsets, backend):
        call = layout, height, width, frame_offsets, backend, separators
        if features is None:
            return below_autograd(torch.ops.sfllava_fast.aggregate, values, *call)
        return below_autograd(torch.ops.sfllava_fast.aggregate_tangent, values, features, *call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, features, separators, *call = inputs
        ctx.count = 0 if separators is None else separators.shape[0]
        _keep(ctx, values if features is None else features, *call)

    @staticmethod
    def backward(ctx, grad):
        features, *call, backend = _kept(ctx)
        of_values = of_separators = None
        if grad is not None and ctx.needs_input_grad[0]:
            of_values = torch.ops.sfllava_fast.aggregate_backward(grad, features, *call, backend)
        if grad is not None and ctx.needs_input_grad[2]:
            of_separators = torch.ops.sfllava_fast.separators_backward(grad, features, *call, ctx.count)
        return of_values, None, of_separators, *[None] * 5

    @staticmethod
    def jvp(ctx, tangent, _, separators, *others):
        features, *call = _kept(ctx)
        tangent = _zeros_like(features) if tangent is None else tangent
        return torch.ops.sfllava_fast.aggregate_tangent(tangent, features, *call, separators)


class Spread(OneLevel):
    """The features' gradient for the tokens' gradient."""

    @staticmethod
    def forward(grad, features, layout, height, width, frame_offsets, backend):
        call = layout, height, width, frame_offsets, backend
        return below_autograd(torch.ops.sfllava_fast.aggregate_backward, grad, features, *call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        tokens = None if grad is None else torch.ops.sfllava_fast.aggregate_tangent(grad, *_kept(ctx))
        return tokens, *[None] * 6

    @staticmethod
    def jvp(ctx, grad, *_):
        features, *call = _kept(ctx)
        if grad is None:  # only the features move, and no maximum changes
            return torch.zeros_like(features, memory_format=torch.contiguous_format)
        return torch.ops.sfllava_fast.aggregate_backward(grad, features, *call)


class OfSeparators(OneLevel):
    """The separators' gradient for the tokens' gradient."""

    @staticmethod
    def forward(grad, features, layout, height, width, frame_offsets, count):
        call = layout, height, width, frame_offsets, count
        return below_autograd(torch.ops.sfllava_fast.separators_backward, grad, features, *call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        features, *call, _ = _kept(ctx)
        if grad is None:
            return (None,) * 7
        zeros = _zeros_like(features)
        return torch.ops.sfllava_fast.aggregate_tangent(zeros, features, *call, "auto", grad), *[None] * 6

    @staticmethod
    def jvp(ctx, grad, *_):
        features, *call, count = _kept(ctx)
        if grad is None:
            return features.new_zeros(count, features.shape[-1])
        return torch.ops.sfllava_fast.separators_backward(grad, features, *call, count)


def _keep(ctx, features, layout, height, width, frame_offsets, last):
    ctx.call = layout, height, width
    ctx.last = last
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, frame_offsets)
    ctx.save_for_forward(features, frame_offsets)


def _kept(ctx) -> tuple:
    features, frame_offsets = ctx.saved_tensors
    return features, *ctx.call, frame_offsets, ctx.last


def _zeros_like(features: Tensor) -> Tensor:
    """Zeros that take no memory."""
    return features.new_zeros(features.shape[-1]).expand(features.shape)

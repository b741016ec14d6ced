"""Ops on rows of hidden states: the best rows of each frame, gather, scatter, and the attention that tokens receive.

`backend` is "auto", "cpu" (C++ kernels), "triton" (on a GPU) or "torch", the reference in backends/rows_reference.py,
which takes every dtype. Copies and choices equal the reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import InputError
from .aggregate import is_unwatched, overlap
from .backends import rows_reference as reference
from .backends.registry import unfit_dtype
from .backends.rows import check_name, find_kernels, frame_table
from .backends.rows_reference import wide
from .gradients import OneLevel, apply, below_autograd, is_differentiated, is_transformed
from .token_offsets import check_frames, check_ratio, kept_of

_MOST_TOKENS = 1 << 14  # of a frame, that a Triton program holds

_library = torch.library.Library("sfllava_fast", "FRAGMENT")
_library.define(
    "top_per_frame(Tensor scores, int[] token_offsets, float ratio, Tensor(a!)? nan, str backend) -> Tensor"
)
_library.define("gather_rows(Tensor[] tensors, Tensor index, str backend) -> Tensor[]")
_library.define("scatter_rows(Tensor hidden, Tensor index, Tensor rows, Tensor? weights, str backend) -> Tensor")
_library.define("attention_received(Tensor queries, Tensor keys, float scale, str backend) -> Tensor")
# What compiled kernels implement, into results that the caller allocates.
_library.define("top_per_frame_out(Tensor scores, Tensor table, Tensor(a!) kept, Tensor(b!) nan) -> ()")
_library.define("gather_rows_out(Tensor[] tensors, Tensor index, Tensor(a!)[] out) -> ()")
_library.define("scatter_rows_out(Tensor hidden, Tensor index, Tensor rows, Tensor(a!) out) -> ()")
_library.define(
    "scatter_rows_weighted_out(Tensor hidden, Tensor index, Tensor rows, Tensor weights, Tensor(a!) out) -> ()"
)
_library.define("attention_received_out(Tensor queries, Tensor keys, float scale, Tensor(a!) out) -> ()")


def top_per_frame(
    scores: Tensor, token_offsets: Sequence[int], ratio: float, *, nan: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Finds the tokens with the highest scores in each frame. Not differentiable.

    Args:
        scores: [B, V], floating point, one for each token from token_offsets[0] on.
        token_offsets: [F + 1] positions, ascending: where each frame's tokens begin, and where the last frame ends.
        ratio: the part of each frame that is kept, in (0, 1]: ceil(ratio * n) of n tokens.
        nan: a flag, int32 [1] on the scores' device, which a NaN score sets to 1. NaN then ranks highest and raises
            nothing, so that a caller can check once per forward pass. Without it, NaN raises and a GPU is waited for.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        int64 [B, K] positions, as `token_offsets` counts them, ascending; the first of equal scores.

    Raises:
        InputError: an argument does not fit, or a score is NaN and there is no flag.
        BackendError: the named backend cannot run this call.
    """
    offsets, ratio = check_frames(token_offsets), check_ratio(ratio)
    _check_tensors(scores=scores)
    if nan is not None:
        _check_tensors(nan=nan)
    check_name(backend)
    tokens = offsets[-1] - offsets[0]
    if scores.dim() != 2 or scores.shape[1] != tokens or not scores.is_floating_point():
        shape = f"{scores.dtype} {list(scores.shape)}"
        raise InputError(f"scores must be floating [batch, {tokens}], one for each token, not {shape}")
    if nan is not None and (nan.shape != (1,) or nan.dtype != torch.int32 or nan.device != scores.device):
        shape = f"{nan.dtype} {list(nan.shape)} on {nan.device}"
        raise InputError(f"nan= must be int32 [1] on {scores.device}, not {shape}")
    if torch._C._functorch.is_batchedtensor(scores):
        raise InputError("vmap cannot batch top_per_frame, which looks for NaN: pass scores as [batch, tokens]")
    run = _top_per_frame if is_unwatched(scores) else torch.ops.sfllava_fast.top_per_frame
    return run(scores.detach(), offsets, ratio, nan, backend)


def gather_rows(hidden: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Gathers rows `index` [B, K] of hidden [B, S, D]: [B, K, D]. See `gather_rows_of`."""
    return gather_rows_of((hidden,), index, backend=backend)[0]


def gather_rows_of(tensors: Sequence[Tensor], index: Tensor, *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Gathers the same rows of several tensors, such as hidden states and rotary cosines and sines, in one launch.

    Differentiable in `tensors`.

    Args:
        tensors: each [B or 1, S, D], of any dtype, with unit stride over D and any other strides; D may differ.
        index: int64 [B, K], ascending in each row and without repeats. This is checked on a CPU. On a GPU the check
            would wait for the device: rows outside of a tensor are left out instead.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [B, K, D] of each tensor.

    Raises:
        InputError: an argument does not fit.
        BackendError: the named backend cannot run this call.
    """
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise InputError(f"tensors must be a list of one or more, not {type(tensors).__name__}")
    _check_tensors(index=index)
    for tensor in tensors:
        _check_tensors(tensors=tensor)
    check_name(backend)
    _check_dims(index)
    for tensor in tensors:
        batch, tokens = tensor.shape[:2] if tensor.dim() == 3 else (0, 0)
        if batch not in (1, len(index)) or tokens != tensors[0].shape[1]:
            raise InputError(f"tensors must be [{len(index)} or 1, tokens, channels], not {list(tensor.shape)}")
        _check_device(tensor, index)
    _check_index(index, tensors[0].shape[1])
    if _takes_reference(tensors[0]):
        return tuple(reference.gather_rows(tensor, index) for tensor in tensors)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if needs_grad and not torch.compiler.is_compiling():
        return _Gather.apply(index, backend, *tensors)
    run = _gather_rows if is_unwatched(tensors[0]) else torch.ops.sfllava_fast.gather_rows
    return tuple(run(list(tensors), index, backend))


def scatter_rows(
    hidden: Tensor,
    index: Tensor,
    rows: Tensor,
    weights: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Replaces rows of hidden states, in one pass.

    Differentiable in `hidden`, `rows` and `weights`, unless `out` is given.

    Args:
        hidden: [B, S, D], of any dtype, with unit stride over D and any other strides.
        index: int64 [B, K], the rows to replace; see `gather_rows_of`.
        rows: [B, K, D] of hidden's dtype, with unit stride over D.
        weights: [B, K], or None. With weights, a row becomes hidden + weights * (rows - hidden), of 16-bit input in
            float32 and rounded once.
        out: like hidden, written and returned: hidden itself, of which only the rows of the index are then touched, or
            memory that does not overlap it.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [B, S, D].

    Raises:
        InputError: an argument does not fit.
        BackendError: the named backend cannot run this call.
    """
    _check_tensors(hidden=hidden, index=index, rows=rows)
    if weights is not None:
        _check_tensors(weights=weights)
    if out is not None:
        _check_tensors(out=out)
    check_name(backend)
    _check_dims(index)
    if hidden.dim() != 3:
        raise InputError(f"hidden must be [batch, tokens, channels], not {list(hidden.shape)}")
    _check_like(hidden, "hidden", (len(index), *hidden.shape[1:2], *hidden.shape[-1:]), hidden, index)
    _check_like(rows, "rows", (*index.shape, hidden.shape[2]), hidden, index)
    _check_index(index, hidden.shape[1])
    if weights is not None and (weights.shape != index.shape or weights.device != hidden.device):
        shape = f"{list(weights.shape)} on {weights.device}"
        raise InputError(f"weights must be {list(index.shape)} on {hidden.device}, one for each row, not {shape}")
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, rows, weights))
    if out is not None:
        if needs_grad or out.requires_grad or _takes_reference(hidden):
            raise InputError("out= is not differentiable: leave it out, or call under torch.no_grad()")
        _check_like(out, "out", hidden.shape, hidden, index)
        if not is_unwatched(hidden):
            return out.copy_(torch.ops.sfllava_fast.scatter_rows(hidden, index, rows, weights, backend))
        _check_memory(out, hidden, rows)
        _scatter_into(hidden, index, rows, weights, backend, out)
        return out
    if _takes_reference(hidden):
        return reference.scatter_rows(hidden, index, rows, weights)
    if needs_grad and not torch.compiler.is_compiling():
        return _Scatter.apply(hidden, index, rows, weights, backend)
    run = _scatter_rows if is_unwatched(hidden) else torch.ops.sfllava_fast.scatter_rows
    return run(hidden, index, rows, weights, backend)


def attention_received(queries: Tensor, keys: Tensor, scale: float, *, backend: str = "auto") -> Tensor:
    """Computes the attention that each token gets from the last tokens: causal softmax, mean over queries and heads.

    Only a few rows of the [H, M, N] probabilities exist at a time, so it can be used beside FlashAttention, which
    stores none. Not differentiable: the result is detached.

    Args:
        queries: [B, H, M, d], those of the last M of the N tokens.
        keys: [B, G, N, d] of the queries' floating dtype; H is a multiple of G. Both need unit stride over d.
        scale: factor of the logits, usually d ** -0.5.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        float32 [B, N]; each row sums to 1.

    Raises:
        InputError: an argument does not fit.
        BackendError: the named backend cannot run this call.
    """
    _check_tensors(queries=queries, keys=keys)
    check_name(backend)
    if not isinstance(scale, (int, float)):
        raise InputError(f"scale must be a number, usually d ** -0.5, not {scale!r}")
    shapes = f"{list(queries.shape)} and {list(keys.shape)}"
    if queries.dim() != 4 or keys.dim() != 4 or queries.shape[::3] != keys.shape[::3]:
        raise InputError(f"queries must be [B, H, M, d] and keys [B, G, N, d], not {shapes}")
    if not keys.shape[1] or queries.shape[1] % keys.shape[1]:
        raise InputError(f"the queries' heads must be a multiple of the keys', not {shapes}")
    if not 1 <= queries.shape[2] <= keys.shape[2]:
        raise InputError(f"{queries.shape[2]} queries cannot be those of the last of {keys.shape[2]} tokens")
    if queries.dtype != keys.dtype or queries.device != keys.device or not keys.is_floating_point():
        kinds = f"{queries.dtype} on {queries.device} and {keys.dtype} on {keys.device}"
        raise InputError(f"queries and keys must be of one floating dtype on one device, not {kinds}")
    queries, keys = queries.detach(), keys.detach()
    if _takes_reference(queries):
        return reference.attention_received(queries, keys, float(scale))
    run = _attention_received if is_unwatched(queries) else torch.ops.sfllava_fast.attention_received
    return run(queries, keys, float(scale), backend)


def _takes_reference(tensor: Tensor) -> bool:
    """Whether a call runs the reference, whose torch operators support forward mode and torch.func's transforms."""
    return not is_unwatched(tensor) and not torch.compiler.is_compiling() and is_transformed()


def _movers(grad: Tensor, backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(gather_rows, scatter_rows) for a gradient; the reference's for a batch of gradients (`is_grads_batched`)."""
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        return reference.gather_rows, reference.scatter_rows
    return partial(gather_rows, backend=backend), partial(scatter_rows, backend=backend)


class _Gather(OneLevel):
    @staticmethod
    def forward(index, backend, *tensors):
        return tuple(below_autograd(torch.ops.sfllava_fast.gather_rows, list(tensors), index, backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        index, ctx.backend, *tensors = inputs
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(*(rows for rows, of in zip(output, tensors) if not of.requires_grad))

    @staticmethod
    def backward(ctx, *grads):
        (index,) = ctx.saved_tensors
        found = []
        for grad, shape, needed in zip(grads, ctx.shapes, ctx.needs_input_grad[2:]):
            if needed:
                nothing = grad.new_zeros(shape[2]).expand(len(index), *shape[1:])
                grad = _movers(grad, ctx.backend)[1](nothing, index, grad.contiguous())
                grad = grad if shape[0] == len(index) else grad.sum(0, keepdim=True)
            found.append(grad if needed else None)
        return None, None, *found


class _Scatter(OneLevel):
    @staticmethod
    def forward(hidden, index, rows, weights, backend):
        return below_autograd(torch.ops.sfllava_fast.scatter_rows, hidden, index, rows, weights, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, index, rows, weights, ctx.backend = inputs
        ctx.save_for_backward(index, weights, *((hidden, rows) if weights is not None else ()))

    @staticmethod
    def backward(ctx, grad):
        index, weights, *moved = ctx.saved_tensors
        gather, scatter = _movers(grad, ctx.backend)
        grad = grad.contiguous()
        of_rows = gather(grad, index)
        nothing = grad.new_zeros(grad.shape[2]).expand_as(of_rows)
        of_hidden = scatter(grad, index, nothing, weights) if ctx.needs_input_grad[0] else None
        if weights is None:
            return of_hidden, None, of_rows, None, None
        hidden, rows = moved
        way = wide(rows) - wide(gather(hidden, index))
        of_weights = (way * wide(of_rows)).sum(-1).to(weights.dtype)
        of_rows = (wide(weights)[..., None] * wide(of_rows)).to(rows.dtype)
        return of_hidden, None, of_rows, of_weights, None


def _top_per_frame(scores, token_offsets, ratio, nan, backend):
    flag = scores.new_zeros(1, dtype=torch.int32) if nan is None else nan
    longest = max(stop - start for start, stop in zip(token_offsets, token_offsets[1:]))
    unfit = unfit_dtype(scores)
    if scores.is_cuda and longest > _MOST_TOKENS:
        unfit = f"a frame has {longest} tokens, more than {_MOST_TOKENS}"
    kernels = find_kernels(backend, scores, unfit)
    if kernels is None:
        kept = reference.top_per_frame(scores, token_offsets, ratio)
        flag |= scores.isnan().any()
    else:
        kept = _fake_top_per_frame(scores, token_offsets, ratio, nan, backend)
        kernels.top_per_frame_out(scores, frame_table(tuple(token_offsets), ratio), kept, flag)
    if nan is None and flag.item():
        raise InputError("a score is NaN: the scorer, or the hidden states that it reads, are not finite")
    return kept


def _gather_rows(tensors, index, backend):
    unfit = next(filter(None, map(_unfit_rows, tensors)), None)
    kernels = find_kernels(backend, tensors[0], unfit)
    if kernels is None:
        return [reference.gather_rows(tensor, index) for tensor in tensors]
    out = _fake_gather_rows(tensors, index, backend)
    kernels.gather_rows_out([tensor.expand(len(index), -1, -1) for tensor in tensors], index, out)
    return out


def _scatter_rows(hidden, index, rows, weights, backend):
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _scatter_into(hidden, index, rows, weights, backend, out)
    return out


def _scatter_into(hidden, index, rows, weights, backend, out):
    unfit = _unfit_rows(hidden) or _unfit_rows(rows) or _unfit_rows(out)
    if weights is not None:
        unfit = unfit or unfit_dtype(hidden) or unfit_dtype(weights)
    kernels = find_kernels(backend, hidden, unfit)
    if kernels is None:
        out.copy_(reference.scatter_rows(hidden, index, rows, weights))
    elif weights is None:
        kernels.scatter_rows_out(hidden, index, rows, out)
    else:
        kernels.scatter_rows_weighted_out(hidden, index, rows, weights.float().contiguous(), out)


def _attention_received(queries, keys, scale, backend):
    unfit = unfit_dtype(keys)
    if queries.shape[3] > 1 and (queries.stride(3) != 1 or keys.stride(3) != 1):
        unfit = "queries and keys need unit stride over channels"
    kernels = find_kernels(backend, keys, unfit)
    if kernels is None:
        return reference.attention_received(queries, keys, scale)
    out = _fake_attention_received(queries, keys, scale, backend)
    kernels.attention_received_out(queries, keys, scale, out)
    return out


def _fake_top_per_frame(scores, token_offsets, ratio, nan, backend):
    kept = sum(kept_of(ratio, stop - start) for start, stop in zip(token_offsets, token_offsets[1:]))
    return scores.new_empty(scores.shape[0], kept, dtype=torch.int64)


def _fake_gather_rows(tensors, index, backend):
    return [tensor.new_empty(*index.shape, tensor.shape[2]) for tensor in tensors]


def _fake_scatter_rows(hidden, index, rows, weights, backend):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _fake_attention_received(queries, keys, scale, backend):
    return keys.new_empty(keys.shape[0], keys.shape[2], dtype=torch.float32)


for _name, _run, _fake in (
    ("top_per_frame", _top_per_frame, _fake_top_per_frame),
    ("gather_rows", _gather_rows, _fake_gather_rows),
    ("scatter_rows", _scatter_rows, _fake_scatter_rows),
    ("attention_received", _attention_received, _fake_attention_received),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfllava_fast::{_name}", _fake, lib=_library)


# The public functions bypass these; they are for traces, and for direct calls of the ops.
def _watched_gather_rows(tensors, index, backend):
    if is_differentiated(*tensors):
        return list(apply(_Gather, index, backend, *tensors))
    return below_autograd(torch.ops.sfllava_fast.gather_rows, tensors, index, backend)


def _watched_scatter_rows(hidden, index, rows, weights, backend):
    if is_differentiated(hidden, rows, weights):
        return apply(_Scatter, hidden, index, rows, weights, backend)
    return below_autograd(torch.ops.sfllava_fast.scatter_rows, hidden, index, rows, weights, backend)


_library.impl("gather_rows", _watched_gather_rows, "Autograd")
_library.impl("scatter_rows", _watched_scatter_rows, "Autograd")
for _name in ("top_per_frame", "attention_received"):  # not differentiable
    _library.impl(_name, partial(below_autograd, getattr(torch.ops.sfllava_fast, _name)), "Autograd")
for _name in (
    "top_per_frame_out",
    "gather_rows_out",
    "scatter_rows_out",
    "scatter_rows_weighted_out",
    "attention_received_out",
):
    torch.library.register_fake(f"sfllava_fast::{_name}", lambda *_: None, lib=_library)


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise InputError(f"{name} must be dense, not {tensor.layout}: call .to_dense() on it")


def _check_dims(index: Tensor) -> None:
    if index.dim() != 2 or index.dtype != torch.int64:
        raise InputError(f"the index must be int64 [batch, rows], not {index.dtype} {list(index.shape)}")


def _check_index(index: Tensor, tokens: int) -> None:
    if not (index.is_cpu and index.numel() and is_unwatched(index)):
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= tokens:
        raise InputError(f"the index must be in [0, {tokens}), not in [{least}, {most}]")
    if (index.diff(dim=1) <= 0).any():
        raise InputError("the index must ascend in each row, without repeats")


def _check_like(rows: Tensor, name: str, shape: Sequence[int], hidden: Tensor, index: Tensor) -> None:
    if rows.dim() != 3 or tuple(rows.shape) != tuple(shape) or rows.dtype != hidden.dtype:
        raise InputError(f"{name} must be {hidden.dtype} {list(shape)}, not {rows.dtype} {list(rows.shape)}")
    _check_device(rows, index)


def _check_device(tensor: Tensor, index: Tensor) -> None:
    if tensor.device != index.device:
        raise InputError(f"the index is on {index.device} and a tensor on {tensor.device}: move one of them")


def _check_memory(out: Tensor, hidden: Tensor, rows: Tensor) -> None:
    """InputError where out overlaps what is read, unless it is hidden itself."""
    itself = out.data_ptr() == hidden.data_ptr() and out.stride() == hidden.stride()
    for name, tensor in (("rows", rows), *(() if itself else (("hidden", hidden),))):
        if overlap(out, tensor):
            raise InputError(f"out overlaps {name} in memory: pass hidden itself, or a buffer of its own")


def _unfit_rows(tensor: Tensor) -> str | None:
    if tensor.shape[2] > 1 and tensor.stride(2) != 1:
        return "rows need unit stride over channels"
    return f"{tensor.dtype} is wider than 8 bytes" if tensor.element_size() > 8 else None

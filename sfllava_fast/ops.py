"""The aggregator as a PyTorch op.

Schemas are defined here, once; compiled libraries only register implementations of `pool`, `pool_gpu` and
`pool_backward_gpu`, so the op exists, traces and exports with no binary at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .config import Layout, Plan, SlowFastConfig, square_grid
from .errors import InputError

_library = torch.library.Library("sfllava_fast", "DEF")
_ARGUMENTS = "str layout, int height, int width, Tensor? frame_offsets"
_library.define(f"aggregate(Tensor features, {_ARGUMENTS}, str backend) -> Tensor")
_library.define(f"aggregate_out(Tensor features, {_ARGUMENTS}, str backend, Tensor(a!) out) -> ()")
_library.define(f"aggregate_backward(Tensor grad, Tensor features, {_ARGUMENTS}, str backend) -> Tensor")
_library.define("token_offsets(Tensor frame_offsets, str layout, int height, int width) -> Tensor")
# What compiled kernels implement: out[:] = the plan table's pooling of features, or the features' gradient of it;
# `table` is the plan on the GPU.
_library.define("pool(Tensor features, Tensor plan, Tensor(a!) out) -> ()")
_library.define("pool_gpu(Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> ()")
_library.define("pool_backward_gpu(Tensor grad, Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> ()")


def slowfast_aggregate(
    features: Tensor,
    config: Layout | str = SlowFastConfig(),
    *,
    out: Tensor | None = None,
    backend: str = "auto",
    grid: tuple[int, int] | None = None,
    frame_offsets: Tensor | Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SlowFast tokens of a video's patch features (arXiv 2407.15841, section 3.2): selection, both poolings,
    flatten and concatenation in one pass.

    features: [T, N, D], floating, unit stride over D, any other strides (`hidden[:, 1:]` as it is); N = rows *
        columns of `grid`, row-major. 16-bit input is accumulated in float32 and rounded once.
    config: any layout, or its text; a string such as slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4 is one.
    out: [S, D] of the features' dtype and device with unit stride over D, written in place and returned; for
        example the rows of a language model's `inputs_embeds`. Not differentiable.
    backend: "auto", or one of `sfllava_fast.backends.BACKENDS` by name.
    grid: (rows, columns); square by default.
    frame_offsets: [V + 1] integers for V videos packed along T: 0, ..., T, as cumulative sequence lengths.

    Returns tokens [S, D]: all slow tokens (frame, row, column), then all fast ones; the paper's defaults make
    3680 of 50 frames. With `frame_offsets`, video after video, and the token offsets [V + 1] (int64) as well.
    Raises InputError, LayoutError or BackendError in one line that says what to change.
    """
    _check_features(features)
    layout = str(config)  # the op parses it: a trace holds nothing but the string
    height, width = check_grid(grid, features.shape[1])
    offsets = None if frame_offsets is None else as_offsets(frame_offsets)
    call = (features, layout, height, width, offsets)
    needs_grad = torch.is_grad_enabled() and features.requires_grad
    if out is not None:
        if needs_grad:
            raise InputError("out= is not differentiable: leave it out, or call under torch.no_grad()")
        if _is_unwatched(features):
            _aggregate_out(*call, backend, out)
        else:
            _check_same_kind(out, features)  # the dispatcher would serve a meta tensor with nothing
            torch.ops.sfllava_fast.aggregate_out(*call, backend, out)
        tokens = out
    elif needs_grad:
        tokens = _Aggregate.apply(*call, backend)
    else:
        tokens = (_aggregate if _is_unwatched(features) else torch.ops.sfllava_fast.aggregate)(*call, backend)
    if offsets is None:
        return tokens
    return tokens, torch.ops.sfllava_fast.token_offsets(offsets, layout, height, width)


def _is_unwatched(features: Tensor) -> bool:
    """Whether nothing traces, transforms or intercepts the call: then what the op would run can be called at once.

    Dispatching to an op written in Python takes as long as all of the rest of a call.
    """
    return (
        not torch.compiler.is_compiling()
        and type(features) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Aggregate(torch.autograd.Function):
    """Autograd around the op rather than in it: a call that needs no gradient pays nothing for it."""

    @staticmethod
    def forward(features, layout, height, width, frame_offsets, backend):
        return torch.ops.sfllava_fast.aggregate(features, layout, height, width, frame_offsets, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, ctx.layout, ctx.height, ctx.width, frame_offsets, ctx.backend = inputs
        ctx.save_for_backward(features, frame_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, frame_offsets = ctx.saved_tensors
        call = (grad, features, ctx.layout, ctx.height, ctx.width, frame_offsets, ctx.backend)
        return torch.ops.sfllava_fast.aggregate_backward(*call), None, None, None, None, None


def _aggregate(features, layout, height, width, frame_offsets, backend):
    plan = _plan(features, layout, height, width, frame_offsets)
    out = features.new_empty(plan.offsets[-1], features.shape[2])
    backends.choose(backend, features).run(features, plan, out)
    return out


def _aggregate_out(features, layout, height, width, frame_offsets, backend, out):
    plan = _plan(features, layout, height, width, frame_offsets)
    check_out(out, features, plan.offsets[-1], features.shape[2])
    backends.choose(backend, features).run(features, plan, out)


def _aggregate_backward(grad, features, layout, height, width, frame_offsets, backend):
    plan = _plan(features, layout, height, width, frame_offsets)
    if grad.shape[1] > 1 and grad.stride(1) != 1:  # a sum's gradient is one number, expanded
        grad = grad.contiguous()
    out = torch.empty_like(features, memory_format=torch.contiguous_format)
    backends.choose(backend, features).run_backward(grad, features, plan, out)
    return out


def _token_offsets(frame_offsets, layout, height, width):
    """Where each video's tokens begin: affine in the frame offsets, so no value has to be read."""
    config, grid = Layout.parse(layout), (height, width)
    per_video = config.count_tokens(0, grid)
    per_frame = config.count_tokens(1, grid) - per_video
    videos = torch.arange(frame_offsets.shape[0], device=frame_offsets.device)
    return frame_offsets.long() * per_frame + videos * per_video


def _fake_aggregate(features, layout, height, width, frame_offsets, backend):
    videos = 1 if frame_offsets is None else frame_offsets.shape[0] - 1
    tokens = Layout.parse(layout).count_tokens(features.shape[0], (height, width), videos)
    return features.new_empty(tokens, features.shape[2])


def _fake_aggregate_backward(grad, features, layout, height, width, frame_offsets, backend):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


_library.impl("aggregate", _aggregate, "CompositeExplicitAutograd")
_library.impl("aggregate_out", _aggregate_out, "CompositeExplicitAutograd")
_library.impl("aggregate_backward", _aggregate_backward, "CompositeExplicitAutograd")
_library.impl("token_offsets", _token_offsets, "CompositeExplicitAutograd")
torch.library.register_fake("sfllava_fast::token_offsets", _token_offsets, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate", _fake_aggregate, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_out", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_backward", _fake_aggregate_backward, lib=_library)
torch.library.register_fake("sfllava_fast::pool", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::pool_gpu", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::pool_backward_gpu", lambda *_: None, lib=_library)


def resolve_plan(
    features: Tensor,
    config: Layout | str,
    grid: tuple[int, int] | None = None,
    frame_offsets: Tensor | Sequence[int] | None = None,
) -> Plan:
    """What `slowfast_aggregate` would do with these arguments; its errors."""
    _check_features(features)
    offsets = None if frame_offsets is None else as_offsets(frame_offsets)
    return _plan(features, str(config), *check_grid(grid, features.shape[1]), offsets)


def _plan(features: Tensor, layout: str, height: int, width: int, frame_offsets: Tensor | None) -> Plan:
    frames = features.shape[0] if frame_offsets is None else _lengths(frame_offsets, features.shape[0])
    return _cached_plan(layout, frames, height, width)


@lru_cache(maxsize=256)
def _cached_plan(layout: str, frames: int | tuple[int, ...], height: int, width: int) -> Plan:
    """Saves a call from hashing a config."""
    return Layout.parse(layout).plan(frames, (height, width))


def _check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise InputError(f"features must be a torch.Tensor, not {type(features).__name__}")
    if features.dim() != 3:
        raise InputError(f"features must be [frames, patches, channels], not {list(features.shape)}")
    if not features.is_floating_point():
        raise InputError(f"features must be floating point, not {features.dtype}")
    if features.shape[2] > 1 and features.stride(2) != 1:
        raise InputError("features need unit stride over channels: call .contiguous() on them, once")


def check_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if grid is None:
        return square_grid(int(patches))
    height, width = grid
    if height * width != patches:
        raise InputError(f"grid {height}x{width} does not fit {patches} patches")
    return height, width


def as_offsets(frame_offsets: Tensor | Sequence[int]) -> Tensor:
    offsets = torch.as_tensor(frame_offsets)
    if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype not in (torch.int32, torch.int64):
        raise InputError("frame_offsets must be [videos + 1] int32 or int64: 0, ..., frames")
    return offsets


def _lengths(frame_offsets: Tensor, frames: int) -> tuple[int, ...]:
    ends = frame_offsets.tolist()
    lengths = tuple(stop - start for start, stop in zip(ends, ends[1:]))
    if ends[0] != 0 or ends[-1] != frames or min(lengths) < 1:
        raise InputError(f"frame_offsets must rise from 0 to {frames}, a frame or more at a time, not {ends}")
    return lengths


def check_out(out: Tensor, features: Tensor, tokens: int, channels: int) -> None:
    """InputError unless `out` can take [tokens, channels] made of these features."""
    _check_same_kind(out, features)
    if out.shape != (tokens, channels):
        raise InputError(f"out must be [{tokens}, {channels}] for this layout, not {list(out.shape)}")
    rows, unit = out.stride()
    if (channels > 1 and unit != 1) or (tokens > 1 and rows < channels):
        raise InputError("out needs unit stride over channels and rows that do not overlap")
    if out.requires_grad and torch.is_grad_enabled():
        raise InputError("out= requires grad: pass out.detach(), or call under torch.no_grad()")
    first, last = _span(out)
    begin, end = _span(features)
    if first < end and begin < last:
        raise InputError("out overlaps the features in memory: pass a buffer of its own")


def _check_same_kind(out: Tensor, features: Tensor) -> None:
    if out.dtype != features.dtype or out.device != features.device:
        raise InputError(f"out must be {features.dtype} on {features.device}, not {out.dtype} on {out.device}")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and past the last byte, that the tensor can touch."""
    begin, last = tensor.data_ptr(), 0
    for size, stride in zip(tensor.shape, tensor.stride()):
        if size == 0:
            return begin, begin
        last += (size - 1) * stride
    return begin, begin + (last + 1) * tensor.element_size()

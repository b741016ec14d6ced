"""The aggregator as a PyTorch op.

Schemas are defined here, once; compiled libraries only register implementations of `pool`, `pool_gpu` and
`pool_backward_gpu`, so the op exists, traces and exports with no binary at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .config import Layout, SlowFastConfig, square_grid
from .errors import InputError
from .layouts import parse_layout
from .plan import Plan
from .separators import separators_backward, write_separators

_library = torch.library.Library("sfllava_fast", "DEF")
_ARGUMENTS = "str layout, int height, int width, Tensor? frame_offsets"
_SEPARATORS = "Tensor? separators=None"
_library.define(f"aggregate(Tensor features, {_ARGUMENTS}, str backend, {_SEPARATORS}) -> Tensor")
_library.define(f"aggregate_out(Tensor features, {_ARGUMENTS}, str backend, Tensor(a!) out, {_SEPARATORS}) -> ()")
_library.define(f"aggregate_backward(Tensor grad, Tensor features, {_ARGUMENTS}, str backend) -> Tensor")
_library.define(f"separators_backward(Tensor grad, Tensor features, {_ARGUMENTS}, int count) -> Tensor")
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
    separators: Tensor | None = None,
    apart: bool = False,
) -> Tensor | dict[str, Tensor] | tuple[Tensor, Tensor]:
    """Tokens of a video's patch features: selection, pooling, flatten and concatenation in one pass. By default
    SlowFast-LLaVA's (arXiv 2407.15841, section 3.2).

    features: [T, N, D], floating, unit stride over D, any other strides (`hidden[:, 1:]` as it is); N = rows *
        columns of `grid`, row-major, and one more in front where the layout reads the class token (`hidden` as it is).
        16-bit input is accumulated in float32 and rounded once.
    config: any layout, or its text: a name of `layouts.PRESETS`, or such as
        slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4.
    out: [S, D] of the features' dtype and device with unit stride over D, written in place and returned; for
        example the rows of a language model's `inputs_embeds`. Not differentiable.
    backend: "auto", or one of `sfllava_fast.backends.BACKENDS` by name.
    grid: (rows, columns); square by default.
    frame_offsets: [V + 1] integers for V videos packed along T: 0, ..., T, as cumulative sequence lengths.
    separators: [K, D] of the features' dtype and device, one for each of the layout's `separators`, such as a learned
        newline; differentiable.
    apart: return the pathways' tokens by name, as views of one buffer, for layouts that have them one after the other.

    Returns tokens [S, D], by default all slow tokens (frame, row, column), then all fast ones: 3680 of 50 frames of
    24x24. With `frame_offsets`, video after video, and the token offsets [V + 1] (int64) as well.
    Raises InputError, LayoutError or BackendError in one line that says what to change.
    """
    _check_features(features)
    layout = str(config)  # the op parses it: a trace holds nothing but the string
    height, width = check_grid(grid, features.shape[1] - _class_tokens(layout))
    offsets = None if frame_offsets is None else as_offsets(frame_offsets)
    check_separators(separators, layout, features)
    call = (features, layout, height, width, offsets)
    of_separators = separators is not None and separators.requires_grad
    needs_grad = torch.is_grad_enabled() and (features.requires_grad or of_separators)
    if out is not None:
        if needs_grad:
            raise InputError("out= is not differentiable: leave it out, or call under torch.no_grad()")
        if is_unwatched(features):
            _aggregate_out(*call, backend, out, separators)
        else:
            _check_same_kind(out, features)  # the dispatcher would serve a meta tensor with nothing
            torch.ops.sfllava_fast.aggregate_out(*call, backend, out, separators)
        tokens = out
    elif needs_grad:
        tokens = _Aggregate.apply(*call, backend, separators)
    else:
        aggregate = _aggregate if is_unwatched(features) else torch.ops.sfllava_fast.aggregate
        tokens = aggregate(*call, backend, separators)
    if apart:
        return _split(tokens, config, features.shape[0], (height, width), offsets)
    if offsets is None:
        return tokens
    return tokens, torch.ops.sfllava_fast.token_offsets(offsets, layout, height, width)


def is_unwatched(features: Tensor) -> bool:
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
    def forward(features, layout, height, width, frame_offsets, backend, separators):
        return torch.ops.sfllava_fast.aggregate(features, layout, height, width, frame_offsets, backend, separators)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, ctx.layout, ctx.height, ctx.width, frame_offsets, ctx.backend, separators = inputs
        ctx.separators = 0 if separators is None else separators.shape[0]
        ctx.save_for_backward(features, frame_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, frame_offsets = ctx.saved_tensors
        call = (grad, features, ctx.layout, ctx.height, ctx.width, frame_offsets)
        of_features = of_separators = None
        if ctx.needs_input_grad[0]:
            of_features = torch.ops.sfllava_fast.aggregate_backward(*call, ctx.backend)
        if ctx.needs_input_grad[6]:
            of_separators = torch.ops.sfllava_fast.separators_backward(*call, ctx.separators)
        return of_features, None, None, None, None, None, of_separators


def _aggregate(features, layout, height, width, frame_offsets, backend, separators=None):
    plan = _plan(features, layout, height, width, frame_offsets)
    out = features.new_empty(plan.offsets[-1], features.shape[2])
    backends.choose(backend, features).run(features, plan, out)
    write_separators(out, plan, separators)
    return out


def _aggregate_out(features, layout, height, width, frame_offsets, backend, out, separators=None):
    plan = _plan(features, layout, height, width, frame_offsets)
    check_out(out, features, plan.offsets[-1], features.shape[2])
    backends.choose(backend, features).run(features, plan, out)
    write_separators(out, plan, separators)


def _aggregate_backward(grad, features, layout, height, width, frame_offsets, backend):
    plan = _plan(features, layout, height, width, frame_offsets)
    if grad.shape[1] > 1 and grad.stride(1) != 1:  # a sum's gradient is one number, expanded
        grad = grad.contiguous()
    out = torch.empty_like(features, memory_format=torch.contiguous_format)
    backends.choose(backend, features).run_backward(grad, features, plan, out)
    return out


def _separators_backward(grad, features, layout, height, width, frame_offsets, count):
    return separators_backward(grad, _plan(features, layout, height, width, frame_offsets))


def _token_offsets(frame_offsets, layout, height, width):
    """Where each video's tokens begin, with no value read."""
    lengths = frame_offsets.long().diff()
    tokens = lengths * 0 + parse_layout(layout).count_tokens(lengths, (height, width))
    return torch.nn.functional.pad(tokens.cumsum(0), (1, 0))


def _fake_aggregate(features, layout, height, width, frame_offsets, backend, separators=None):
    tokens = count_open_tokens(features.shape[0], layout, (height, width), frame_offsets)
    return features.new_empty(tokens, features.shape[2])


def count_open_tokens(frames: Any, layout: str, grid: tuple[int, int], frame_offsets: Tensor | None) -> Any:
    """Tokens of so many frames where a trace leaves the number of frames open."""
    parsed = parse_layout(layout)
    if frame_offsets is None:
        return parsed.count_tokens(frames, grid)
    if parsed.is_affine:
        return parsed.count_packed_tokens(frames, grid, frame_offsets.shape[0] - 1)
    return torch.library.get_ctx().new_dynamic_size()  # how many frames each video has decides it


def _fake_aggregate_backward(grad, features, layout, height, width, frame_offsets, backend):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


def _fake_separators_backward(grad, features, layout, height, width, frame_offsets, count):
    return grad.new_empty(count, grad.shape[1])


_library.impl("aggregate", _aggregate, "CompositeExplicitAutograd")
_library.impl("aggregate_out", _aggregate_out, "CompositeExplicitAutograd")
_library.impl("aggregate_backward", _aggregate_backward, "CompositeExplicitAutograd")
_library.impl("separators_backward", _separators_backward, "CompositeExplicitAutograd")
_library.impl("token_offsets", _token_offsets, "CompositeExplicitAutograd")
torch.library.register_fake("sfllava_fast::token_offsets", _token_offsets, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate", _fake_aggregate, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_out", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_backward", _fake_aggregate_backward, lib=_library)
torch.library.register_fake("sfllava_fast::separators_backward", _fake_separators_backward, lib=_library)
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
    layout = str(config)
    return _plan(features, layout, *check_grid(grid, features.shape[1] - _class_tokens(layout)), offsets)


def _plan(features: Tensor, layout: str, height: int, width: int, frame_offsets: Tensor | None) -> Plan:
    frames = features.shape[0] if frame_offsets is None else _lengths(frame_offsets, features.shape[0])
    return _cached_plan(layout, frames, height, width)


@lru_cache(maxsize=256)
def _cached_plan(layout: str, frames: int | tuple[int, ...], height: int, width: int) -> Plan:
    """Saves a call from hashing a config."""
    return parse_layout(layout).plan(frames, (height, width))


@torch.compiler.assume_constant_result
def _class_tokens(layout: str) -> int:
    """How many tokens stand before the patches."""
    return _facts(layout)[0]


@torch.compiler.assume_constant_result
def _count_separators(layout: str) -> int:
    return _facts(layout)[1]


@lru_cache(maxsize=256)
def _facts(layout: str) -> tuple[int, int]:
    parsed = parse_layout(layout)
    return int(parsed.class_token), len(parsed.separators)


def check_separators(separators: Tensor | None, layout: str, features: Tensor) -> None:
    count = _count_separators(layout)
    if separators is None and not count:
        return
    shape = [count, features.shape[-1]]
    if separators is None:
        names = ", ".join(separator.name for separator in parse_layout(layout).separators)
        raise InputError(f"the layout has separators ({names}): pass separators={shape}")
    if not count:
        raise InputError(f"the layout {layout} has no separators: leave separators= out")
    if list(separators.shape) != shape:
        raise InputError(f"separators must be {shape}, not {list(separators.shape)}")
    _check_same_kind(separators, features, "separators")


def _split(tokens: Tensor, config: Layout | str, frames: int, grid: tuple[int, int], offsets: Tensor | None):
    """Tokens [S, D] by pathway, in their order."""
    layout = parse_layout(config)
    if layout.interleaved or layout.separators or offsets is not None:
        raise InputError("apart= is for one video, and pathways one after the other with no separators: leave it out")
    counts = [path.count_frames(frames) * path.tokens_per_frame(grid) for path in layout.pathways]
    return dict(zip((path.name for path in layout.pathways), tokens.split(counts)))


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
    first, last = span(out)
    begin, end = span(features)
    if first < end and begin < last:
        raise InputError("out overlaps the features in memory: pass a buffer of its own")


def _check_same_kind(out: Tensor, features: Tensor, name: str = "out") -> None:
    if out.dtype != features.dtype or out.device != features.device:
        raise InputError(f"{name} must be {features.dtype} on {features.device}, not {out.dtype} on {out.device}")


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and past the last byte, that the tensor can touch."""
    begin, last = tensor.data_ptr(), 0
    for size, stride in zip(tensor.shape, tensor.stride()):
        if size == 0:
            return begin, begin
        last += (size - 1) * stride
    return begin, begin + (last + 1) * tensor.element_size()

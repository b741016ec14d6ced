"""The aggregator as a PyTorch op.

Schemas are defined here, once; compiled libraries only register implementations of `pool`, `pool_backward`,
`pool_gpu` and `pool_backward_gpu`, so the op exists, traces and exports with no binary at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ..errors import InputError
from ..layouts.layout import PLANS, Layout, square_grid
from ..layouts.plan import Plan
from ..layouts.presets import parse_layout
from ..layouts.slowfast import SlowFastLayout
from . import gradients
from .backends import aggregate as backends
from .backends import reference
from .separators import separators_backward, write_separators

_library = torch.library.Library("sfllava_fast", "DEF")
_ARGUMENTS = "str layout, int height, int width, Tensor? frame_offsets"
_SEPARATORS = "Tensor? separators=None"
_library.define(f"aggregate(Tensor features, {_ARGUMENTS}, str backend, {_SEPARATORS}) -> Tensor")
_library.define(f"aggregate_out(Tensor features, {_ARGUMENTS}, str backend, Tensor(a!) out, {_SEPARATORS}) -> ()")
_library.define(
    f"aggregate_tangent(Tensor tangent, Tensor features, {_ARGUMENTS}, str backend, {_SEPARATORS}) -> Tensor"
)
_library.define(f"aggregate_backward(Tensor grad, Tensor features, {_ARGUMENTS}, str backend) -> Tensor")
_library.define(f"separators_backward(Tensor grad, Tensor features, {_ARGUMENTS}, int count) -> Tensor")
_library.define("token_offsets(Tensor frame_offsets, str layout, int height, int width) -> Tensor")
# What compiled kernels implement: out[:] = the plan table's pooling of features, or the features' gradient of it;
# `table` is the plan on the GPU.
_library.define("pool(Tensor features, Tensor plan, Tensor(a!) out) -> ()")
_library.define("pool_backward(Tensor grad, Tensor features, Tensor plan, Tensor(a!) out) -> ()")
_library.define("pool_gpu(Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> ()")
_library.define("pool_backward_gpu(Tensor grad, Tensor features, Tensor plan, Tensor table, Tensor(a!) out) -> ()")


@overload
def slowfast_aggregate(
    features: Tensor,
    layout: Layout | str = ...,
    *,
    out: Tensor | None = ...,
    backend: str = ...,
    grid: tuple[int, int] | None = ...,
    frame_offsets: None = None,
    separators: Tensor | None = ...,
) -> Tensor: ...


@overload
def slowfast_aggregate(
    features: Tensor,
    layout: Layout | str = ...,
    *,
    out: Tensor | None = ...,
    backend: str = ...,
    grid: tuple[int, int] | None = ...,
    frame_offsets: Tensor | Sequence[int],
    separators: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def slowfast_aggregate(
    features: Tensor,
    layout: Layout | str = SlowFastLayout(),
    *,
    out: Tensor | None = None,
    backend: str = "auto",
    grid: tuple[int, int] | None = None,
    frame_offsets: Tensor | Sequence[int] | None = None,
    separators: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pools a video's patch features into the tokens of a layout, by default SlowFast-LLaVA's.

    Frames are selected, pooled, flattened and concatenated in one pass (arXiv 2407.15841, section 3.2). Differentiable
    in `features` and `separators` any number of times, in reverse and forward mode. `torch.func.vmap` folds its batch
    into the channels, which copies the features; [B, T, N, D] does not.

    Args:
        features: [T, N, D], floating point, with unit stride over D and any other strides, such as `hidden[:, 1:]`. N
            is the rows * columns of `grid`, row-major, and one more at the front if the layout reads the class token.
            16-bit input is accumulated in float32 and rounded once. [B, T, N, D] is a batch of B videos of one length:
            one launch if the videos are contiguous in memory, also in `out`, else one launch each. Nothing is copied.
        layout: a layout or its text, which is a name of `layouts.PRESETS` or, for example,
            "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4".
        out: [S, D] or [B, S, D] of the features' dtype and device, with unit stride over D, such as rows of a language
            model's `inputs_embeds`. It is written in place and returned. Not differentiable.
        backend: "auto" or a name of `ops.backends.aggregate.BACKENDS`.
        grid: (rows, columns); None means square.
        frame_offsets: [V + 1] integers 0, ..., T, the cumulative lengths of V videos packed along T of [T, N, D]. Each
            call waits for values on a GPU.
        separators: [K, D] of the features' dtype and device, one for each separator of the layout, such as a learned
            newline.

    Returns:
        Tokens [S, D], by default all slow tokens (frame, row, column), then all fast tokens: 3680 of 50 frames of
        24 x 24 patches. [B, S, D] for a batch. With `frame_offsets`, a tuple of the tokens, video after video, and
        their int64 offsets [V + 1].

    Raises:
        InputError: a tensor, the grid or the offsets do not fit.
        LayoutError: the layout is malformed or does not fit the frames.
        BackendError: the named backend cannot run this call.
    """
    layout = str(layout)  # the op parses it, so that a trace contains only the string
    kind = None
    if frame_offsets is None and separators is None and _is_plain(features, out) and _is_known_grid(grid):
        kind = _kind(features, layout, out, backend, grid)
        if plan := _find_checked(kind):
            return _run_checked(features, plan, backend, out)
    _check_features(features)
    height, width = check_grid(grid, features.shape[-2] - _class_tokens(layout))
    offsets = None if frame_offsets is None else as_offsets(frame_offsets, features)
    check_separators(separators, layout, features)
    backends.check_name(backend)
    call = (layout, height, width, offsets, backend)
    of_separators = separators is not None and separators.requires_grad
    needs_grad = torch.is_grad_enabled() and (features.requires_grad or of_separators)
    unwatched = is_unwatched(features)
    transformed = not unwatched and not is_compiling() and gradients.is_transformed()
    if out is not None:
        if needs_grad or transformed:
            raise InputError("out= is not differentiable: leave it out, or call under torch.no_grad() and no transform")
        if unwatched:
            _aggregate_out(features, *call, out, separators)
        else:
            _check_same_kind(out, features)  # the dispatcher would do nothing for a meta tensor
            torch.ops.sfllava_fast.aggregate_out(features, *call, out, separators)
        tokens = out
    else:
        aggregate = _aggregate if unwatched and not needs_grad else torch.ops.sfllava_fast.aggregate
        tokens = aggregate(features, *call, separators)
    if kind:
        _remember_checked(kind, _plan(features, layout, height, width, None))
    if offsets is None:
        return tokens
    return tokens, torch.ops.sfllava_fast.token_offsets(offsets, layout, height, width)


def aggregate_by_pathway(
    features: Tensor,
    layout: Layout | str = SlowFastLayout(),
    *,
    out: Tensor | None = None,
    backend: str = "auto",
    grid: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """The tokens of `slowfast_aggregate`, by the name of their pathway.

    Args:
        features, out, backend, grid: as in `slowfast_aggregate`.
        layout: a layout whose pathways follow one another, without separators.

    Returns:
        Each pathway's tokens, [S_i, D] or [B, S_i, D], in the order of the pathways: views of one buffer.

    Raises:
        InputError: also if the layout interleaves its pathways or has separators.
        LayoutError, BackendError: as in `slowfast_aggregate`.
    """
    layout = parse_layout(layout)
    check_apart(layout)
    tokens = slowfast_aggregate(features, layout, out=out, backend=backend, grid=grid)
    grid = check_grid(grid, features.shape[-2] - layout.class_token)
    counts = [path.count_frames(features.shape[-3]) * path.tokens_per_frame(grid) for path in layout.pathways]
    return dict(zip((path.name for path in layout.pathways), tokens.split(counts, dim=-2)))


def check_apart(layout: Layout) -> None:
    """InputError unless each pathway's tokens are one run of rows."""
    if layout.interleaved or layout.separators:
        raise InputError(f"{layout} interleaves its pathways or has separators: take a layout that does neither")


def is_unwatched(features: Tensor) -> bool:
    """True if no tracer, transform or dispatch mode is active, so that the implementation can be called directly.

    Dispatching to an op that is written in Python takes as long as the rest of a call.
    """
    return (
        not is_compiling()
        and type(features) in _PLAIN
        and not _count_modes()
        and forward_ad._current_level < 0
        and _innermost_transform() is None
    )


_PLAIN = Tensor, torch.nn.Parameter
_count_modes, _innermost_transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack


# A plain call is of one video, without a gradient. Its arguments are checked once for each kind of call, because the
# checks take as long as the rest of the host's work. Plans are referenced weakly: layout.PLANS bounds them.
_checked: dict[tuple, weakref.ref[Plan]] = {}
_MOST_CHECKED = 256


def _is_plain(features: Tensor, out: Tensor | None) -> bool:
    if not is_unwatched(features) or features.layout is not torch.strided or features.dim() != 3:
        return False
    if out is not None and (type(out) not in _PLAIN or out.layout is not torch.strided):
        return False
    return not torch.is_grad_enabled() or not (features.requires_grad or (out is not None and out.requires_grad))


def _is_known_grid(grid: object) -> bool:
    """Whether it is None or of integers: (4.0, 4.0) equals a right grid, and is none."""
    return grid is None or (type(grid) in (tuple, list) and all(type(side) is int for side in grid))


def _kind(
    features: Tensor, layout: str, out: Tensor | None, backend: str, grid: tuple[int, int] | list[int] | None
) -> tuple:
    """All that the checks read, except the tensors' addresses."""
    into = None if out is None else (out.shape, out.stride(), out.dtype, out.device)
    sides = tuple(grid) if type(grid) is list else grid
    return layout, backend, sides, features.shape, features.stride(), features.dtype, features.device, into


def _find_checked(kind: tuple) -> Plan | None:
    try:
        return _checked[kind]()
    except (KeyError, TypeError):  # a new kind; an argument that is not hashable
        return None


def _remember_checked(kind: tuple, plan: Plan) -> None:
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked[kind] = weakref.ref(plan)


def _run_checked(features: Tensor, plan: Plan, backend: str, out: Tensor | None) -> Tensor:
    if out is None:
        out = features.new_empty(plan.offsets[-1], features.shape[2])
    else:
        _check_overlap(out, features)
        _mark_written(out)
    backends.choose(backend, features, plan).run(features, plan, out)
    write_separators(out, plan, None)  # rows of zeros
    return out


def _mark_written(out: Tensor) -> None:
    """Makes a backward that has saved `out` raise, instead of reading the new values."""
    if not out.is_inference():
        increment_version(out)


def _aggregate(features, layout, height, width, frame_offsets, backend, separators=None):
    plan = _plan(features, layout, height, width, frame_offsets)
    if features.dim() == 3:  # as below, half a microsecond faster
        out = features.new_empty(plan.offsets[-1], features.shape[2])
        backends.choose(backend, features, plan).run(features, plan, out)
        write_separators(out, plan, separators)
        return out
    out = features.new_empty(token_shape(plan, features, features.shape[-1]))
    _pool(features, plan, layout, backend, out, separators)
    return out


def _aggregate_out(features, layout, height, width, frame_offsets, backend, out, separators=None):
    plan = _plan(features, layout, height, width, frame_offsets)
    check_out(out, features, token_shape(plan, features, features.shape[-1]))
    _mark_written(out)
    _pool(features, plan, layout, backend, out, separators)


def _pool(features, plan, layout, backend, out, separators):
    chosen = backends.choose(backend, features, plan)
    if out.dim() == 2:  # as below
        chosen.run(features, plan, out)
        write_separators(out, plan, separators)
        return
    for part, part_plan, rows in launches(features, plan, layout, out):
        chosen.run(part, part_plan, rows)
        write_separators(rows, part_plan, separators)


def _aggregate_tangent(tangent, features, layout, height, width, frame_offsets, backend, separators=None):
    plan = _plan(features, layout, height, width, frame_offsets)
    tangent, packed = tangent.flatten(0, -3), features.flatten(0, -3)
    if any(path.reduce == "max" for path in plan.pathways):
        out = reference.aggregate_tangent(tangent, packed, plan)
    else:
        tangent = _with_unit_stride(tangent)
        out = tangent.new_zeros(plan.offsets[-1], tangent.shape[2])
        backends.choose(backend, tangent, plan).run(tangent, plan, out)
    write_separators(out, plan, separators)
    return out.view(token_shape(plan, features, out.shape[1]))


def _aggregate_backward(grad, features, layout, height, width, frame_offsets, backend):
    plan = _plan(features, layout, height, width, frame_offsets)
    grad = _with_unit_stride(grad)
    out = torch.empty_like(features, memory_format=torch.contiguous_format)
    chosen = backends.choose(backend, features, plan, backward=True)
    for part, part_plan, rows, into in launches(features, plan, layout, grad, out):
        chosen.run_backward(rows, part, part_plan, into)
    return out


def _separators_backward(grad, features, layout, height, width, frame_offsets, count):
    return separators_backward(grad.flatten(0, -2), _plan(features, layout, height, width, frame_offsets))


def _with_unit_stride(tensor: Tensor) -> Tensor:
    """A copy if needed: the gradient of a sum is one number, expanded."""
    return tensor.contiguous() if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 else tensor


def launches(features: Tensor, plan: Plan, layout: str, *others: Tensor) -> Sequence[tuple]:
    """The launches for features [T, N, D] or [B, T, N, D]. Nothing is copied.

    Args:
        features: of one video, or of a batch.
        plan: of all videos.
        layout: the text of the plan's layout.
        others: [S, D] or [T, N, D], of a batch [B, ...], such as the output.

    Returns:
        (features [T, N, D], plan, *others) of each launch: one for videos that are contiguous in all tensors, which
        are then packed along T, else one for each video.
    """
    if features.dim() == 3:
        return ((features, plan, *others),)
    tensors = features, *others
    if all(map(_is_packed, tensors)):
        packed, *rest = (tensor.flatten(0, 1) for tensor in tensors)
        return ((packed, plan, *rest),)
    plan = parse_layout(layout).plan(plan.lengths[0], plan.grid)
    return [(part, plan, *rest) for part, *rest in zip(*tensors)]


def _is_packed(batch: Tensor) -> bool:
    return 1 in batch.shape[:2] or batch.stride(0) == batch.shape[1] * batch.stride(1)


def token_shape(plan: Plan, features: Tensor, channels: int) -> tuple[int, ...]:
    """(S, D) of features [T, N, ...], (B, S, D) of a batch of them."""
    if features.dim() == 3:
        return plan.offsets[-1], channels
    return features.shape[0], plan.offsets[1], channels


def _token_offsets(frame_offsets, layout, height, width):
    """The offset of each video's tokens, without reading a value."""
    lengths = frame_offsets.long().diff()
    tokens = lengths * 0 + parse_layout(layout).count_tokens(lengths, (height, width))
    return torch.nn.functional.pad(tokens.cumsum(0), (1, 0))


def _fake_aggregate(features, layout, height, width, frame_offsets, backend, separators=None):
    tokens = open_token_shape(features, layout, (height, width), frame_offsets)
    return features.new_empty(*tokens, features.shape[-1])


def _fake_aggregate_tangent(tangent, features, *call):
    return _fake_aggregate(features, *call)


def open_token_shape(features: Tensor, layout: str, grid: tuple[int, int], frame_offsets: Tensor | None) -> tuple:
    """(S,), or (B, S) of a batch, in a trace, in which the number of frames is open."""
    parsed, (*batch, frames) = parse_layout(layout), features.shape[:-2]
    if frame_offsets is None:
        return *batch, parsed.count_tokens(frames, grid)
    if parsed.is_affine:
        return (parsed.count_packed_tokens(frames, grid, frame_offsets.shape[0] - 1),)
    return (torch.library.get_ctx().new_dynamic_size(),)  # it depends on the frames of each video


def _fake_aggregate_backward(grad, features, layout, height, width, frame_offsets, backend):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


def _fake_separators_backward(grad, features, layout, height, width, frame_offsets, count):
    return grad.new_empty(count, grad.shape[-1])


_library.impl("aggregate", _aggregate, "CompositeExplicitAutograd")
_library.impl("aggregate_out", _aggregate_out, "CompositeExplicitAutograd")
_library.impl("aggregate_tangent", _aggregate_tangent, "CompositeExplicitAutograd")
_library.impl("aggregate_backward", _aggregate_backward, "CompositeExplicitAutograd")
_library.impl("separators_backward", _separators_backward, "CompositeExplicitAutograd")
_library.impl("token_offsets", _token_offsets, "CompositeExplicitAutograd")


def _watched_aggregate(features, layout, height, width, frame_offsets, backend, separators=None):
    call = layout, height, width, frame_offsets, backend
    if gradients.is_differentiated(features, separators):
        return gradients.apply(gradients.Pool, features, None, separators, *call)
    return gradients.below_autograd(torch.ops.sfllava_fast.aggregate, features, *call, separators)


def _watched_tangent(tangent, features, layout, height, width, frame_offsets, backend, separators=None):
    call = layout, height, width, frame_offsets, backend
    return gradients.apply(gradients.Pool, tangent, features, separators, *call)


def _watched_aggregate_out(features, layout, height, width, frame_offsets, backend, out, separators=None):
    if gradients.is_differentiated(features, separators, out):
        raise InputError("out= is not differentiable: call aggregate, or call under torch.no_grad()")
    call = layout, height, width, frame_offsets, backend
    gradients.below_autograd(torch.ops.sfllava_fast.aggregate_out, features, *call, out, separators)


# The public function bypasses these; they are for traces, and for direct calls of the op.
_library.impl("aggregate", _watched_aggregate, "Autograd")
_library.impl("aggregate_out", _watched_aggregate_out, "Autograd")
_library.impl("aggregate_tangent", _watched_tangent, "Autograd")
_library.impl("aggregate_backward", partial(gradients.apply, gradients.Spread), "Autograd")
_library.impl("separators_backward", partial(gradients.apply, gradients.OfSeparators), "Autograd")
for _name in ("aggregate", "aggregate_tangent", "aggregate_backward", "separators_backward"):
    _run = partial(gradients.fold_into_channels, getattr(torch.ops.sfllava_fast, _name))
    torch.library.register_vmap(f"sfllava_fast::{_name}", _run, lib=_library)
torch.library.register_fake("sfllava_fast::token_offsets", _token_offsets, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate", _fake_aggregate, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_out", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_tangent", _fake_aggregate_tangent, lib=_library)
torch.library.register_fake("sfllava_fast::aggregate_backward", _fake_aggregate_backward, lib=_library)
torch.library.register_fake("sfllava_fast::separators_backward", _fake_separators_backward, lib=_library)
torch.library.register_fake("sfllava_fast::pool", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::pool_backward", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::pool_gpu", lambda *_: None, lib=_library)
torch.library.register_fake("sfllava_fast::pool_backward_gpu", lambda *_: None, lib=_library)


def resolve_plan(
    features: Tensor,
    layout: Layout | str,
    grid: tuple[int, int] | None = None,
    frame_offsets: Tensor | Sequence[int] | None = None,
) -> Plan:
    """The plan of `slowfast_aggregate` for these arguments.

    Args:
        features, layout, grid, frame_offsets: as in `slowfast_aggregate`. The videos of a batch count as packed ones.

    Raises:
        InputError, LayoutError: as in `slowfast_aggregate`.
    """
    _check_features(features)
    offsets = None if frame_offsets is None else as_offsets(frame_offsets, features)
    layout = str(layout)
    return _plan(features, layout, *check_grid(grid, features.shape[-2] - _class_tokens(layout)), offsets)


def _plan(features: Tensor, layout: str, height: int, width: int, frame_offsets: Tensor | None) -> Plan:
    frames: int | tuple[int, ...] = features.shape[0]
    if frame_offsets is not None:
        frames = _lengths(frame_offsets, features.shape[0])
    elif features.dim() == 4:
        frames = (features.shape[1],) * features.shape[0]
    plan = PLANS.find((layout, frames, height, width))
    return plan or _make_plan(layout, frames, height, width, features.shape[-2] - _class_tokens(layout))


def _make_plan(layout: str, frames: int | tuple[int, ...], height: int, width: int, patches: int) -> Plan:
    if height * width != patches:  # in a direct call of the op
        raise InputError(f"grid {height}x{width} does not fit {patches} patches")
    plan = parse_layout(layout).plan(frames, (height, width))
    # Layout.plan has cached it by the layout's own text; a name of it, such as "sf_llava", is one more key.
    return PLANS.keep((layout, frames, height, width), plan, plan.nbytes)


@torch.compiler.assume_constant_result
def _class_tokens(layout: str) -> int:
    """How many tokens precede the patches."""
    return _facts(layout)[0]


@torch.compiler.assume_constant_result
def _count_separators(layout: str) -> int:
    return _facts(layout)[1]


@lru_cache(maxsize=256)
def _facts(layout: str) -> tuple[int, int]:
    parsed = parse_layout(layout)
    return int(parsed.class_token), len(parsed.separators)


def check_separators(separators: Tensor | None, layout: str, features: Tensor) -> None:
    """InputError unless separators [K, D] are there if and only if the layout has K of them."""
    count = _count_separators(layout)
    if separators is None and not count:
        return
    shape = [count, features.shape[-1]]
    if separators is not None and not isinstance(separators, Tensor):
        raise InputError(f"separators must be a torch.Tensor {shape}, not {type(separators).__name__}")
    if separators is None:
        names = ", ".join(separator.name for separator in parse_layout(layout).separators)
        raise InputError(f"the layout has separators ({names}): pass separators={shape}")
    if not count:
        raise InputError(f"the layout {layout} has no separators: leave separators= out")
    if list(separators.shape) != shape:
        raise InputError(f"separators must be {shape}, not {list(separators.shape)}")
    _check_same_kind(separators, features, "separators")


def _check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise InputError(f"features must be a torch.Tensor, not {type(features).__name__}")
    if features.dim() not in (3, 4):
        shape = "[frames, patches, channels], or of a batch [videos, frames, patches, channels]"
        raise InputError(f"features must be {shape}, not {list(features.shape)}")
    if not features.is_floating_point():
        raise InputError(f"features must be floating point, not {features.dtype}")
    if features.layout is not torch.strided:
        raise InputError(f"features must be dense, not {features.layout}: call .to_dense() on them")
    if features.shape[-1] > 1 and features.stride(-1) != 1:
        strides = list(features.stride())
        raise InputError(f"features need unit stride over channels, not {strides}: call .contiguous() on them, once")


def check_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    """(rows, columns), of a square for None; InputError unless they fit the patches."""
    if grid is None:
        return square_grid(int(patches))
    height, width = check_sides(grid)
    if height * width != patches or height < 1:
        raise InputError(f"grid {height}x{width} does not fit {patches} patches")
    return height, width


def check_sides(grid: object) -> tuple[int, int]:
    """(rows, columns); InputError for anything else."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(n, _INTEGERS) for n in grid):
        raise InputError(f"grid must be two integers, (rows, columns) such as (24, 24), not {grid!r}")
    return grid[0], grid[1]


_INTEGERS = (int, np.integer, torch.SymInt)


def as_offsets(frame_offsets: Tensor | Sequence[int], features: Tensor) -> Tensor:
    """Frame offsets as a tensor; InputError unless they are one-dimensional integers, of packed videos."""
    if features.dim() != 3:
        raise InputError("frame_offsets are for videos packed as [T, N, D]: leave them out for [B, T, N, D]")
    offsets = frame_offsets if isinstance(frame_offsets, Tensor) else as_tensor(frame_offsets)
    if offsets is None or offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype not in (torch.int32, torch.int64):
        wrong = type(frame_offsets).__name__ if offsets is None else f"{offsets.dtype} {list(offsets.shape)}"
        raise InputError(f"frame_offsets must be [videos + 1] int32 or int64: 0, ..., frames; not {wrong}")
    return offsets


def as_tensor(numbers: object, dtype: torch.dtype | None = None) -> Tensor | None:
    """A tensor of the numbers; None if torch cannot make one, and for complex numbers."""
    if _is_complex(numbers):
        return None
    try:
        return torch.as_tensor(numbers, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _ends(frame_offsets: Tensor) -> list[int]:
    """The values. They are not cached: a write to a tensor on a GPU, such as a graph's replay, cannot be noticed."""
    if frame_offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError("a CUDA graph cannot capture frame_offsets on the GPU: pass a list, or a tensor on the CPU")
    return frame_offsets.tolist()


def _is_complex(numbers: object) -> bool:
    """Whether torch would drop imaginary parts; of a list of Python's own complex numbers it drops none."""
    if isinstance(numbers, Tensor):
        return numbers.is_complex()
    if isinstance(numbers, (list, tuple)):
        return any(isinstance(number, np.complexfloating) for number in numbers)
    return isinstance(numbers, np.ndarray) and np.iscomplexobj(numbers)


def _lengths(frame_offsets: Tensor, frames: int) -> tuple[int, ...]:
    ends = _ends(frame_offsets)
    lengths = tuple(stop - start for start, stop in zip(ends, ends[1:]))
    if ends[0] != 0 or ends[-1] != frames or min(lengths) < 1:
        raise InputError(f"frame_offsets must rise from 0 to {frames}, a frame or more at a time, not {ends}")
    return lengths


def check_out(out: Tensor, features: Tensor, shape: tuple[int, ...]) -> None:
    """InputError unless `out` can take tokens of `shape`, [..., tokens, channels], made of these features."""
    _check_same_kind(out, features)
    if out.shape != shape:
        raise InputError(f"out must be {list(shape)} for this layout, not {list(out.shape)}")
    tokens, channels = shape[-2:]
    rows, unit = out.stride()[-2:]
    if (channels > 1 and unit != 1) or (tokens > 1 and rows < channels):
        raise InputError(f"out needs unit stride over channels and rows that do not overlap, not {out.stride()}")
    if len(shape) == 3 and shape[0] > 1 and out.stride(0) < (tokens - 1) * rows + channels:
        raise InputError(f"out needs videos that follow one another and do not overlap, not strides {out.stride()}")
    if out.requires_grad and torch.is_grad_enabled():
        raise InputError("out= requires grad: pass out.detach(), or call under torch.no_grad()")
    _check_overlap(out, features)


def _check_overlap(out: Tensor, features: Tensor) -> None:
    if overlap(out, features):
        raise InputError("out overlaps the features in memory: pass a buffer of its own")


def _check_same_kind(out: Tensor, features: Tensor, name: str = "out") -> None:
    if not isinstance(out, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, not {type(out).__name__}")
    if out.dtype != features.dtype or out.device != features.device:
        raise InputError(f"{name} must be {features.dtype} on {features.device}, not {out.dtype} on {out.device}")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes between the first and the last element of one hold any of the other's."""
    first, second = a.data_ptr(), b.data_ptr()
    if first > second:
        a, b, first, second = b, a, second, first
    end = first + _reach(a)
    return second < end and b.numel() > 0


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element past the last one."""
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride()):
        if size == 0:
            return 0
        last += (size - 1) * stride
    return (last + 1) * tensor.element_size()

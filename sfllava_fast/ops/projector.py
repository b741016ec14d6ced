"""The projector and the aggregator together: tokens pooled from Linear2(GELU(Linear1(x))).

A mean commutes with Linear2, so its tokens can be pooled between GELU and Linear2, which then runs on tokens instead of
patches: with the paper's layout on 6,560 rows instead of 28,800. Equal in real arithmetic, not bit for bit. What is
pooled there stays in float32, or is split into two 16-bit halves: rounding it to 16 bits would make the error larger
than the standard order's.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, first_line
from ..layouts.layout import Layout
from ..layouts.pathways import Range
from ..layouts.plan import Plan, kept_with_plan
from ..layouts.presets import parse_layout
from ..layouts.slowfast import SlowFastLayout
from . import gradients
from .aggregate import (
    as_offsets,
    check_grid,
    check_out,
    check_separators,
    launches,
    open_token_shape,
    resolve_plan,
    slowfast_aggregate,
    token_shape,
)
from .backends import aggregate as backends
from .backends import registry
from .separators import with_separators

log = logging.getLogger("sfllava_fast")

Mode = Literal["exact", "commuted", "auto"]
MODES = get_args(Mode)
Projector = Callable[[Tensor], Tensor]  # usually a module
Stage = Callable[[str], AbstractContextManager[None]]  # of a stage's name
# auto commutes where Linear2 is left with at most this part of its work: a rule, measured with 1 to 8 frames in
# bfloat16 and float32 on AMD Zen 4, which has bfloat16 products, and with emulated ones. Within it exact took 1.08
# times commuted's time or more; beyond it commuted took up to 1.3 times exact's.
_WORTHWHILE = 0.8
# On a CPU, about how many patches are activated at once, and how many of Linear2's channels are multiplied at once.
_ROWS_AT_ONCE, _CHANNELS_AT_ONCE = 3072, 1024

# A trace sees one op, whose plan is made when it runs: the number of frames stays open.
_library = torch.library.Library("sfllava_fast", "FRAGMENT")
_library.define(
    "commuted(Tensor hidden, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str layout, int height, "
    "int width, Tensor? frame_offsets, str backend) -> Tensor"
)


def untimed(stage: str) -> AbstractContextManager[None]:
    """A Stage that does nothing."""
    return nullcontext()


@overload
def project_and_aggregate(
    hidden: Tensor,
    projector: Projector,
    layout: Layout | str = ...,
    *,
    mode: Mode = ...,
    out: Tensor | None = ...,
    backend: str = ...,
    grid: tuple[int, int] | None = ...,
    frame_offsets: None = None,
    separators: Tensor | None = ...,
    stage: Stage = ...,
) -> Tensor: ...


@overload
def project_and_aggregate(
    hidden: Tensor,
    projector: Projector,
    layout: Layout | str = ...,
    *,
    mode: Mode = ...,
    out: Tensor | None = ...,
    backend: str = ...,
    grid: tuple[int, int] | None = ...,
    frame_offsets: Tensor | Sequence[int],
    separators: Tensor | None = ...,
    stage: Stage = ...,
) -> tuple[Tensor, Tensor]: ...


def project_and_aggregate(
    hidden: Tensor,
    projector: Projector,
    layout: Layout | str = SlowFastLayout(),
    *,
    mode: Mode = "exact",
    out: Tensor | None = None,
    backend: str = "auto",
    grid: tuple[int, int] | None = None,
    frame_offsets: Tensor | Sequence[int] | None = None,
    separators: Tensor | None = None,
    stage: Stage = untimed,
) -> Tensor | tuple[Tensor, Tensor]:
    """Projects and pools the vision tower's features into the tokens of a layout, by default SlowFast-LLaVA's.

    Arguments without an entry here are those of `slowfast_aggregate`. See arXiv 2407.15841, section 3.2. A layout whose
    `stage` is "before" is pooled first, in every mode, and then its tokens are projected.

    Args:
        hidden: [T, N, C] or [B, T, N, C], the projector's input, with unit stride over C and any other strides, such as
            `hidden[:, 1:]`, or with the class token if the layout reads it.
        projector: any module or function in mode "exact"; Linear, exact GELU, Linear in mode "commuted".
        mode: the order of projection and pooling:

            - "exact" is the published order, equal to `slowfast_aggregate(projector(hidden))` bit for bit.
            - "commuted" pools means before the second Linear, for inference only. Its error against float64 is no
              larger than that of the published order.
            - "auto" is "commuted" if that is possible and saves at least a fifth of the second Linear's work, else
              "exact". In a trace (torch.compile, torch.export) it is "exact", because the number of frames is open.
        stage: called with "projector" or "aggregate" for a context manager around that part of the work, such as a
            stopwatch.

    Returns:
        As `slowfast_aggregate`: tokens [S, D] or [B, S, D], with `frame_offsets` also their offsets.

    Raises:
        InputError: an argument does not fit, or mode "commuted" is not possible.
        LayoutError, BackendError: as in `slowfast_aggregate`.
    """
    check_mode(mode)
    if not callable(projector):
        raise InputError(f"the projector must be a module or a function, not {type(projector).__name__}")
    if not isinstance(hidden, Tensor):
        raise InputError(f"features must be a torch.Tensor, not {type(hidden).__name__}")
    if _pools_first(str(layout)):
        return _aggregate_and_project(hidden, projector, layout, out, backend, grid, frame_offsets, separators, stage)
    traced = torch.compiler.is_compiling()
    plan = None if traced else resolve_plan(hidden, layout, grid, frame_offsets)
    if mode == "auto":
        commutes = plan is not None and _why_not(projector, hidden, layout) is None and _pays(plan, hidden)
        mode = "commuted" if commutes else "exact"
    if mode == "exact":
        with stage("projector"):
            features = projector(hidden)
        with stage("aggregate"):
            return slowfast_aggregate(
                features,
                layout,
                out=out,
                backend=backend,
                grid=grid,
                frame_offsets=frame_offsets,
                separators=separators,
            )
    if reason := _why_not(projector, hidden, layout):
        raise InputError(f"the projector cannot be commuted with pooling: {reason}; use mode='exact'")
    first, second = _layers(projector)
    if plan is None:
        return _trace_commuted(hidden, first, second, str(layout), out, backend, grid, frame_offsets)
    shape = token_shape(plan, hidden, len(second.weight))
    if out is None:
        out = hidden.new_empty(shape)
    check_out(out, hidden, shape)
    with torch.no_grad():
        _commuted_launches(hidden, first, second, plan, str(layout), out, backend, stage)
    return out if frame_offsets is None else (out, torch.tensor(plan.offsets, device=hidden.device))


@torch.compiler.assume_constant_result
def check_mode(mode: object) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(f"unknown projector mode {mode!r}: choose one of {', '.join(MODES)}")


def _pools_first(layout: str) -> bool:
    return parse_layout(layout).stage == "before"


def _aggregate_and_project(
    hidden: Tensor,
    projector: Projector,
    layout: Layout | str,
    out: Tensor | None,
    backend: str,
    grid: tuple[int, int] | None,
    frame_offsets: Tensor | Sequence[int] | None,
    separators: Tensor | None,
    stage: Stage,
) -> Tensor | tuple[Tensor, Tensor]:
    """The order of layouts that pool first: zero tokens are projected too, separators are not."""
    names = parse_layout(layout).separators
    placeholders = plan = None
    if names:
        plan = resolve_plan(hidden, layout, grid, frame_offsets)
        placeholders = hidden.new_zeros(len(names), hidden.shape[-1])
    with stage("aggregate"):
        pooled = slowfast_aggregate(
            hidden, layout, backend=backend, grid=grid, frame_offsets=frame_offsets, separators=placeholders
        )
    pooled, *offsets = (pooled,) if isinstance(pooled, Tensor) else pooled
    with stage("projector"):
        tokens = projector(pooled)
    if plan is not None:
        check_separators(separators, str(layout), tokens)
        assert separators is not None  # checked
        if hidden.dim() == 4:
            plan = resolve_plan(hidden[0], layout, grid)
        tokens = with_separators(tokens, plan, separators)
    if out is not None:
        check_out(out, tokens, tuple(tokens.shape))
        tokens = out.copy_(tokens)
    return (tokens, offsets[0]) if offsets else tokens


class _Layer(NamedTuple):
    """What is read of a Linear."""

    weight: Tensor
    bias: Tensor | None


def _layers(projector: Projector) -> tuple[_Layer, _Layer]:
    """The two layers of Linear, GELU, Linear."""
    first, _, second = cast(nn.Module, projector).children()
    return _layer(first), _layer(second)


def _layer(linear: Any) -> _Layer:
    return _Layer(linear.weight, linear.bias)


def _trace_commuted(hidden, first, second, layout, out, backend, grid, frame_offsets):
    height, width = check_grid(grid, hidden.shape[-2])
    offsets = None if frame_offsets is None else as_offsets(frame_offsets, hidden)
    tokens = torch.ops.sfllava_fast.commuted(hidden, *first, *second, layout, height, width, offsets, backend)
    tokens = tokens if out is None else out.copy_(tokens)
    if offsets is None:
        return tokens
    return tokens, torch.ops.sfllava_fast.token_offsets(offsets, layout, height, width)


def _run_commuted(hidden, weight1, bias1, weight2, bias2, layout, height, width, frame_offsets, backend):
    plan = resolve_plan(hidden, layout, (height, width), frame_offsets)
    out = hidden.new_empty(token_shape(plan, hidden, weight2.shape[0]))
    _commuted_launches(hidden, _Layer(weight1, bias1), _Layer(weight2, bias2), plan, layout, out, backend)
    return out


def _watched_commuted(hidden, weight1, bias1, weight2, bias2, *call):
    if gradients.is_differentiated(hidden, weight1, bias1, weight2, bias2):
        raise InputError("commuted is not differentiable: use mode='exact', or call under torch.no_grad()")
    return gradients.below_autograd(torch.ops.sfllava_fast.commuted, hidden, weight1, bias1, weight2, bias2, *call)


def _fake_commuted(hidden, weight1, bias1, weight2, bias2, layout, height, width, frame_offsets, backend):
    tokens = open_token_shape(hidden, layout, (height, width), frame_offsets)
    return hidden.new_empty(*tokens, weight2.shape[0])


_library.impl("commuted", _run_commuted, "CompositeExplicitAutograd")
_library.impl("commuted", _watched_commuted, "Autograd")
torch.library.register_fake("sfllava_fast::commuted", _fake_commuted, lib=_library)


def why_not_commuted(projector: nn.Module) -> str | None:
    """Why pooling can never go before this projector's second layer; None where it can."""
    name = type(projector).__name__
    parts = dict(projector.named_children()) if isinstance(projector, nn.Module) else {}
    if len(parts) != 3 or (type(projector) is not nn.Sequential and list(parts) != ["linear_1", "act", "linear_2"]):
        return f"{name} is not Linear, GELU, Linear"
    first, act, second = parts.values()
    for part in (first, second):
        if type(part) is not nn.Linear:
            return f"{type(part).__name__} is not a plain Linear"
        if type(part.weight).__name__ not in ("Tensor", "Parameter", "FakeTensor"):  # the last while it is exported
            return f"its weights are {type(part.weight).__name__}"
    if not _is_exact_gelu(act):
        return f"its activation {act} is not the exact GELU"
    for part in (projector, first, act, second):
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return "hooks watch it"
    return None


def why_layout_not_commuted(layout: Layout) -> str | None:
    """Why a layout's pooling cannot go before the second layer; None where it can, or goes before the first anyway."""
    if layout.stage == "before":
        return None
    if not layout.is_plain:
        return f"{layout} has more than pooled patches, pathway after pathway"
    if any(path.frames.rule in ("adaptive", "repeat", "stride") for path in layout.pathways):
        return f"{layout} pools several frames together"
    return None


@torch.compiler.assume_constant_result
def _why_layout_not_commuted(layout: str) -> str | None:
    return why_layout_not_commuted(parse_layout(layout))


def _why_not(projector: Any, hidden: Tensor, layout: Layout | str) -> str | None:
    """Why pooling cannot go before the second layer in this call; None where it can."""
    if reason := why_not_commuted(projector):
        return reason
    first = next(projector.children())
    if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in projector.parameters())):
        return "it needs gradients"
    if not torch.compiler.is_compiling() and gradients.is_transformed():
        return "forward-mode gradients or torch.func transform it"
    if hidden.shape[-1] != first.in_features:
        return f"features have {hidden.shape[-1]} channels, and it takes {first.in_features}"
    if hidden.dtype != first.weight.dtype:
        return f"features are {hidden.dtype} and its weights {first.weight.dtype}"
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        return "autocast chooses the dtypes"
    return _why_layout_not_commuted(str(layout))


def _is_exact_gelu(act: nn.Module) -> bool:
    if isinstance(act, nn.GELU):
        return act.approximate == "none"
    return type(act).__name__ == "GELUActivation"  # transformers' name for it


def _pays(plan: Plan, hidden: Tensor) -> bool:
    """Whether Linear2 is left with little enough work: a maximum's patches and a mean's tokens."""
    if hidden.is_cuda and hidden.dtype is torch.float32:  # its float64 products take longer on most GPUs
        return False
    maxima, means = _split(plan)
    patches = plan.grid[0] * plan.grid[1]
    tokens = sum(stop - start for start, stop in means.rows)
    rows = len(maxima.frames) * patches + tokens * _mean_cost(hidden.dtype, hidden.device)
    return rows <= _WORTHWHILE * sum(plan.lengths) * patches


def _mean_cost(dtype: torch.dtype, device: torch.device) -> int:
    """A mean's row in Linear2 over a patch's in the published order: two halves, or float64, are twice the work."""
    if dtype is torch.float32:
        return 2
    return 2 if dtype in (torch.bfloat16, torch.float16) and _multiplies(dtype, device) else 1


def describe_auto() -> str:
    """What decides mode="auto" on this processor, in a line."""
    native = "native" if _multiplies(torch.bfloat16, torch.device("cpu")) else "no"
    cost = _mean_cost(torch.bfloat16, torch.device("cpu"))
    return (
        f"commuted if Linear2 is left with {_WORTHWHILE:.0%} of its work or less (a measured rule): {native} bfloat16 "
        f"products on this CPU, a mean's row counts {cost} in bfloat16, 2 in float32"
    )


@dataclass(frozen=True)
class _Half:
    """A plan's pathways of one reduction: the frames they read, sorted, and which rows of the tokens are theirs.

    plan: these pathways alone on the frames they read, numbered anew; its tokens are those rows, in order. None where
    there is no such pathway.
    """

    frames: tuple[int, ...]
    rows: tuple[Range, ...]
    plan: Plan | None


@kept_with_plan
def _split(plan: Plan) -> tuple[_Half, _Half]:
    """The maxima, which need Linear2 of every patch, and the means."""
    return _half(plan, "max"), _half(plan, "mean")


def _half(plan: Plan, reduce: str) -> _Half:
    paths = [path for path in plan.pathways if path.pathway.reduce == reduce]
    if not paths:
        return _Half((), (), None)
    by_video = [sorted({start for path in paths for start, _ in path.frames[v]}) for v in range(len(plan.lengths))]
    frames = tuple(frame for video in by_video for frame in video)
    place = {frame: i for i, frame in enumerate(frames)}
    renumbered = tuple(
        replace(path, frames=tuple(tuple((place[f], place[f] + 1) for f, _ in video) for video in path.frames))
        for path in paths
    )
    rows: list[Range] = []
    at = 0
    for video in range(len(plan.lengths)):
        for path in plan.pathways:
            count = len(path.frames[video]) * path.tokens_per_frame
            if path.pathway.reduce == reduce:
                begin = rows.pop()[0] if rows and rows[-1][1] == at else at
                rows.append((begin, at + count))
            at += count
    return _Half(frames, tuple(rows), Plan(tuple(map(len, by_video)), plan.grid, renumbered))


def _commuted_launches(hidden, first, second, plan, layout, out, backend, stage=untimed):
    for part, part_plan, rows in launches(hidden, plan, layout, out):
        _commuted(part, first, second, part_plan, rows, backend, stage)


class _Block(NamedTuple):
    """Frames whose activations are in memory together.

    frames: which of the packed frames. kept: those that maxima read, numbered from the block's first, and which of all
    such frames they are. pools: plans of means on these frames, with their rows of all means' tokens.
    """

    frames: Range
    kept: tuple[int, ...]
    kept_at: Range
    pools: list[tuple[Plan, Range]]


@kept_with_plan
def _blocks(plan: Plan, size: int) -> list[_Block]:
    """Blocks of `size` frames, the last of what is left."""
    maxima, means = _split(plan)
    total = sum(plan.lengths)
    kept = {block: list(frames) for block, frames in groupby(maxima.frames, lambda frame: frame // size)}
    pools = defaultdict(list)
    items = means.plan.items if means.plan else ()
    for (number, block), group in groupby(items, lambda item: (item.pathway, means.frames[item.frame_begin] // size)):
        assert means.plan is not None  # whose items these are
        run, path, start = [*group], means.plan.pathways[number], block * size
        read = tuple((frame, frame + 1) for frame in (means.frames[item.frame_begin] - start for item in run))
        part = Plan((min(size, total - start),), plan.grid, (replace(path, frames=(read,)),))
        pools[block].append((part, (run[0].first_token, run[-1].first_token + path.tokens_per_frame)))
    blocks, at = [], 0
    for block, start in enumerate(range(0, total, size)):
        frames = tuple(frame - start for frame in kept.get(block, ()))
        blocks.append(_Block((start, min(start + size, total)), frames, (at, at + len(frames)), pools[block]))
        at += len(frames)
    return blocks


def _commuted(
    hidden: Tensor, first: _Layer, second: _Layer, plan: Plan, out: Tensor, backend: str, stage: Stage
) -> None:
    """Fills out [S, D]: means are pooled before Linear2, maxima after it, on the frames that have any."""
    layers = _FusedLayers(first, second) if _is_fused(hidden, backend) else _TorchLayers(first, second, hidden, backend)
    maxima, means = _split(plan)
    pooled, kept = layers.pool(hidden, plan, stage)
    if means.plan:
        with stage("projector"):
            _fill(out, means, lambda tokens: layers.project_pooled(pooled, tokens))
    if maxima.plan:
        with stage("projector"):
            features = layers.project(kept).to(out.dtype)
        with stage("aggregate"):
            chosen = backends.choose(backend, features, maxima.plan)
            _fill(out, maxima, lambda tokens: chosen.run(features, maxima.plan, tokens))


def _fill(out: Tensor, half: _Half, write: Callable[[Tensor], object]) -> None:
    """Writes the half's tokens into its rows, straight if these adjoin."""
    if len(half.rows) == 1:
        write(out[slice(*half.rows[0])])
        return
    assert half.plan is not None  # it has rows
    tokens = out.new_empty(half.plan.offsets[-1], out.shape[1])
    write(tokens)
    for rows, part in zip(half.rows, tokens.split([stop - start for start, stop in half.rows])):
        out[slice(*rows)] = part


class _FusedLayers:
    """Linear1, GELU and pooling in one Triton kernel, so that activations never reach memory; Linear2 in another."""

    def __init__(self, first: _Layer, second: _Layer) -> None:
        self.first, self.second, self.kernels = first, second, registry.triton_kernels()

    def pool(self, hidden: Tensor, plan: Plan, stage: Stage = untimed) -> tuple[Tensor, Tensor]:
        with stage("projector"):
            return self.kernels.project_pool(hidden, self.first.weight, self.first.bias, plan)

    def project(self, kept: Tensor) -> Tensor:
        return F.linear(kept, *self.second)

    def project_pooled(self, pooled: Tensor, out: Tensor) -> None:
        self.kernels.project_pooled(pooled, self.second.weight, self.second.bias, out)


class _TorchLayers:
    """The same on torch's operators.

    Of 16-bit weights the products are 16-bit if the processor has those, and what is pooled is split into two
    halves; otherwise all is float32, which emulation would only slow down. Of float32 weights, Linear2 of what is
    pooled is float64: the standard order averages the errors of a float32 sum away, which this order makes once.

    On a CPU memory that was never touched costs more than the arithmetic between the products: a few frames at a time
    pass through one buffer, and Linear2's weights through another.
    """

    def __init__(self, first: _Layer, second: _Layer, hidden: Tensor, backend: str) -> None:
        self.split = hidden.dtype in (torch.bfloat16, torch.float16) and _multiplies(hidden.dtype, hidden.device)
        self.onednn = self.split and hidden.is_cpu and _has_onednn(hidden.dtype)
        dtype = hidden.dtype if self.split or hidden.dtype is torch.float64 else torch.float32
        self.first, self.first_bias = _parameters(first, dtype)
        self.second, self.second_bias = _parameters(second, dtype)
        self.wide = torch.float32 if self.split else dtype  # in which means are pooled
        self.pooled = torch.float64 if hidden.dtype is torch.float32 else dtype
        self.backend = backend

    def pool(self, hidden: Tensor, plan: Plan, stage: Stage = untimed) -> tuple[Tensor, Tensor]:
        """(pooled, kept): the means' tokens [M, I] of GELU(Linear1) in float32, and the maxima's frames [F, N, I]."""
        maxima, means = _split(plan)
        frames, patches, inner = len(hidden), hidden.shape[1], len(self.first)
        size = min(frames, max(1, _ROWS_AT_ONCE // patches)) if hidden.is_cpu else frames
        pooled = hidden.new_empty(means.plan.offsets[-1] if means.plan else 0, inner, dtype=self.wide)
        kept = hidden.new_empty(len(maxima.frames), patches, inner, dtype=self.second.dtype)
        buffer = hidden.new_empty(size, patches, inner, dtype=self.wide)
        for block in _blocks(plan, size) if frames else ():
            part = hidden[slice(*block.frames)]
            wide = buffer[: len(part)]
            with stage("projector"):
                values = self._activate(part, wide)
            with stage("aggregate"):
                if block.kept:
                    kept[slice(*block.kept_at)] = values[list(block.kept)]
                if block.pools and values is not wide:
                    wide.copy_(values)
                for pools, rows in block.pools:
                    backends.choose(self.backend, wide, pools).run(wide, pools, pooled[slice(*rows)])
        return pooled, kept

    def _activate(self, hidden: Tensor, wide: Tensor) -> Tensor:
        """GELU(Linear1) [T, N, I] of hidden [T, N, C], in `wide` or, rounded once, in 16 bits."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(self.first.dtype)
        if self.onednn:
            return _onednn_linear(rows, self.first, self.first_bias, "gelu").view(wide.shape)
        if self.split:
            wide.copy_(F.linear(rows, self.first, self.first_bias).view(wide.shape))
        elif self.first_bias is None:
            torch.mm(rows, self.first.t(), out=wide.flatten(0, 1))
        else:
            torch.addmm(self.first_bias, rows, self.first.t(), out=wide.flatten(0, 1))
        return torch.ops.aten.gelu_(wide)

    def project(self, kept: Tensor) -> Tensor:
        """Linear2 of patches [F, N, I]."""
        if self.onednn:
            return _onednn_linear(kept.flatten(0, 1), self.second, self.second_bias).unflatten(0, kept.shape[:2])
        return F.linear(kept, self.second, self.second_bias)

    def project_pooled(self, pooled: Tensor, out: Tensor) -> None:
        """Linear2 of float32 tokens [M, I] into out [M, D], with no rounding but the last."""
        if self.split:
            high = pooled.to(self.pooled)
            pooled = torch.cat([high, (pooled - high.float()).to(self.pooled)], dim=1)
        pooled = pooled.to(self.pooled)
        size = _CHANNELS_AT_ONCE if out.is_cpu else out.shape[1]
        buffer = pooled.new_empty(min(size, out.shape[1]), pooled.shape[1])
        for start in range(0, out.shape[1], size):
            part = slice(start, start + size)
            weight = self.second[part]
            if self.split or weight.dtype is not self.pooled:
                wide = buffer[: len(weight)]
                for half in wide.split(weight.shape[1], dim=1):  # W2, or [W2, W2]
                    half.copy_(weight)
                weight = wide
            bias = None if self.second_bias is None else self.second_bias[part].to(self.pooled)
            out[:, part] = F.linear(pooled, weight, bias)


def _is_fused(hidden: Tensor, backend: str) -> bool:
    """Whether the Triton kernels serve: on a GPU where they work, in 16 bits."""
    if not hidden.is_cuda or backend not in ("auto", "triton") or hidden.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not backends.BACKENDS["triton"].why_unavailable(hidden.device) and _fused_works(hidden.device, hidden.dtype)


@cache
def _fused_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels' tokens on a device are those of torch's operators; logs once if they are not."""
    generator = torch.Generator().manual_seed(0)
    first, second = (_layer(nn.Linear(64, 64, device=device, dtype=dtype).requires_grad_(False)) for _ in range(2))
    hidden = torch.randn(3, 64, 64, generator=generator).to(device, dtype)
    plan = SlowFastLayout(2, fast_grid=(2, 2)).plan(3, (8, 8))
    _, means = _split(plan)
    assert means.plan is not None  # the fast pathway
    try:
        fused, plain = _FusedLayers(first, second), _TorchLayers(first, second, hidden, "torch")
        for got, expected in zip(fused.pool(hidden, plan), plain.pool(hidden, plan)):
            torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.02)
        pooled = plain.pool(hidden, plan)[0]
        ours, theirs = (hidden.new_empty(means.plan.offsets[-1], 64) for _ in range(2))
        fused.project_pooled(pooled, ours)
        plain.project_pooled(pooled, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    except Exception as error:  # compilers and drivers fail in many ways; torch's operators serve then
        log.warning("the fused projector is not used on %s: %s", device, first_line(error))
        return False
    return True


def _parameters(layer: _Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has matrix products of this 16-bit type."""
    if device.type != "cpu":
        return True
    bfloat16 = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    names = bfloat16 if dtype is torch.bfloat16 else ("_is_amx_fp16_supported",)
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's linear layer with an activation for this 16-bit type on this processor."""
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype is torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return getattr(torch.ops.mkldnn, supported, lambda: False)()


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(Linear) of rows [M, K]: the bias and an exact GELU are applied before the only rounding."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, activation, [], "none")

"""Derivatives of higher order, forward mode and vmap, against plain torch operators that autograd knows."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from distributed_modules import make_projector
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

from sfllava_fast import project_and_aggregate, slowfast_aggregate
from sfllava_fast.errors import InputError
from sfllava_fast.ops.rows import attention_received, gather_rows, scatter_rows, top_per_frame

LAYOUT = "slowfast-slow_2frms_{}-fast_1x2"
POOLS = ["spatial_1d_max_pool", "spatial_2d_avg_pool"]
pools = pytest.mark.parametrize("pool", POOLS)
X, WAY = (torch.randn(3, 16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def by_hand(x: torch.Tensor, pool: str) -> torch.Tensor:
    """Of 3 frames of 4 x 4 the slow pathway takes the first two."""
    if pool == "spatial_1d_max_pool":
        slow = F.max_pool1d(x[:2].transpose(1, 2), 2, 2).transpose(1, 2).flatten(0, 1)
    else:
        slow = F.avg_pool2d(x[:2].unflatten(1, (4, 4)).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2).flatten(0, 1)
    fast = x.unflatten(1, (4, 2, 2)).mean((1, 3)).flatten(0, 1)
    return torch.cat([slow, fast])


def both(pool):
    return lambda x: slowfast_aggregate(x, LAYOUT.format(pool)), lambda x: by_hand(x, pool)


def penalty_at(f, x):
    """As WGAN-GP's: a gradient of a gradient."""
    return grad(lambda z: grad(lambda u: f(u * u).pow(3).sum())(z).pow(2).sum())(x)


def penalty(f):
    return penalty_at(f, X)


def create_graph(f):
    z = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(z * z).pow(3).sum(), z, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), z)[0]


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, WAY))).tangent


TWO = torch.stack([X, WAY])
DERIVATIVES = {
    "grad of grad": penalty,
    "create_graph": create_graph,
    "hessian": lambda f: hessian(lambda z: f(z * z).pow(3).sum())(X),
    "autograd's hessian": lambda f: torch.autograd.functional.hessian(lambda z: f(z * z).pow(3).sum(), X),
    "third order": lambda f: grad(lambda z: penalty_at(f, z).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (WAY,))[1],
    "dual numbers": dual,
    "jacfwd": lambda f: jacfwd(f)(X),
    "jacrev": lambda f: jacrev(f)(X),
    "reverse over forward": lambda f: jacrev(lambda z: jvp(lambda u: f(u * u).pow(3), (z,), (WAY,))[1].sum())(X),
    "vmap": lambda f: vmap(f)(TWO),
    "vmap of another dimension": lambda f: vmap(f, in_dims=2, out_dims=1)(TWO.movedim(0, 2)),
    "vmap of vmap": lambda f: vmap(vmap(f))(torch.stack([TWO, TWO.sin()])),
    "vmap of grad": lambda f: vmap(grad(lambda z: f(z * z).pow(2).sum()))(TWO),
    "grad of vmap": lambda f: grad(lambda z: vmap(f)(z * z).pow(2).sum())(TWO),
}  # fmt: skip


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pools
def test_derivatives_are_those_of_torch(derivative, pool):
    ours, expected = map(DERIVATIVES[derivative], both(pool))
    assert expected.any()
    torch.testing.assert_close(ours, expected)


@pools
def test_gradgradcheck_of_features_and_separators(pool):
    layout = {"spatial_1d_max_pool": "max", "spatial_2d_avg_pool": "avg"}[pool]
    x, newline = X[:2, :, :1].clone().requires_grad_(), torch.randn(1, 1, dtype=torch.float64, requires_grad=True)

    def run(x, newline):
        return slowfast_aggregate(x, f"llava_next_video-{layout}-newline_grid", separators=newline)

    assert torch.autograd.gradcheck(run, (x, newline), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, newline), check_fwd_over_rev=True)


def test_gradgradcheck_of_packed_videos_and_of_a_batch():
    layout = "slowfast-slow_2frms_spatial_1d_max_pool-fast_1x1"
    x = X[:, :4, :1].clone().requires_grad_()
    run = lambda x: slowfast_aggregate(x, layout, frame_offsets=[0, 1, 3])[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, x, check_forward_ad=True) and torch.autograd.gradgradcheck(run, x)
    batch = TWO[:, :2, :4, :1].clone().requires_grad_()
    run = lambda x: slowfast_aggregate(x, layout)  # noqa: E731
    assert torch.autograd.gradcheck(run, batch, check_forward_ad=True) and torch.autograd.gradgradcheck(run, batch)


def test_a_transform_leaves_no_mark_on_later_calls():
    """Tables that are made within a transform are cached."""
    layout, newline = "llava_next_video-max-newline_frame", torch.randn(1, 2, dtype=torch.float64)
    x = torch.randn(5, 16, 2, dtype=torch.float64)
    jvp(lambda s: slowfast_aggregate(x, layout, separators=s), (newline,), (newline,))
    with torch.inference_mode():
        slowfast_aggregate(x[:4], layout, separators=newline)
    for part in (x, x[:4]):
        leaf = part.clone().requires_grad_()
        slowfast_aggregate(leaf, layout, separators=newline).sum().backward()
        assert leaf.grad.any()


@pools
def test_derivatives_of_a_compiled_function(pool):
    ours, expected = both(pool)
    for run in (lambda f: jvp(f, (X,), (WAY,))[1], lambda f: vmap(grad(lambda z: f(z * z).pow(2).sum()))(TWO)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda: run(ours), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), run(expected))


def test_the_projector_under_transforms():
    net, hidden = make_projector().double(), torch.randn(3, 16, 24, dtype=torch.float64)
    weights = {name: weight.detach() for name, weight in net.named_parameters()}

    def ours(w, h):
        return project_and_aggregate(h, lambda x: functional_call(net, w, x), LAYOUT.format(POOLS[0]), mode="auto")

    def plain(w, h):
        return by_hand(functional_call(net, w, h), POOLS[0])

    for run in (
        lambda f: jvp(lambda h: f(weights, h), (hidden,), (hidden.sin(),))[1],
        lambda f: grad(lambda w: grad(lambda h: f(w, h).pow(2).sum())(hidden).pow(2).sum())(weights)["0.weight"],
    ):
        torch.testing.assert_close(run(ours), run(plain))
    frozen = net.requires_grad_(False)
    with pytest.raises(InputError, match="transform"):
        vmap(lambda h: project_and_aggregate(h, frozen, LAYOUT.format(POOLS[0]), mode="commuted"))(hidden[None])
    tokens = vmap(lambda h: project_and_aggregate(h, frozen, LAYOUT.format(POOLS[0]), mode="auto"))(hidden[None])
    torch.testing.assert_close(tokens[0], by_hand(frozen(hidden), POOLS[0]))


def test_what_cannot_be_transformed_is_refused():
    x, out = X, torch.empty(22, 2, dtype=torch.float64)
    layout = LAYOUT.format(POOLS[0])
    with pytest.raises(InputError, match="out= is not differentiable"):
        jvp(lambda x: slowfast_aggregate(x, layout, out=out), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(InputError, match="out= is not differentiable"):
        slowfast_aggregate(forward_ad.make_dual(x, x), layout, out=out)
    offsets = torch.tensor([[0, 3], [0, 3]])
    with pytest.raises(InputError, match="vmap cannot batch frame_offsets"):
        vmap(lambda x, ends: slowfast_aggregate(x, layout, frame_offsets=ends)[0])(TWO, offsets)
    with pytest.raises(InputError, match="vmap cannot batch top_per_frame"):
        vmap(lambda x: top_per_frame(x, (0, 3), 0.5))(torch.randn(2, 1, 3))


# --- rows


INDEX = torch.tensor([[0, 2, 5]])


def put(hidden, rows, weights=None):
    """scatter_rows in operators of torch."""
    place = F.one_hot(INDEX, 6).to(hidden)  # [1, 3, 6]
    taken = place @ hidden
    change = rows - taken if weights is None else weights[..., None] * (rows - taken)
    return hidden + place.transpose(1, 2) @ change


ROWS = {
    "gather": (lambda h, r, w: gather_rows(h, INDEX).pow(2), lambda h, r, w: h[:, INDEX[0]].pow(2)),
    "scatter": (lambda h, r, w: scatter_rows(h, INDEX, r), lambda h, r, w: put(h, r)),
    "blend": (lambda h, r, w: scatter_rows(h, INDEX, r, w), put),
}
SHAPES = (1, 6, 2), (1, 3, 2), (1, 3)


@pytest.mark.parametrize("name", ROWS)
def test_derivatives_of_rows(name):
    ours, plain = ROWS[name]
    values = [torch.rand(shape, dtype=torch.float64) for shape in SHAPES]
    ways = [value.sin() for value in values]
    for run in (
        lambda f: jvp(f, (*values,), (*ways,))[1],
        lambda f: vmap(f)(*(torch.stack([a, b]) for a, b in zip(values, ways))),
        lambda f: hessian(lambda h: f(h * h, *values[1:]).pow(2).sum())(values[0]),
        lambda f: vmap(grad(lambda h: f(h * h, *values[1:]).pow(2).sum()))(torch.stack([values[0], ways[0]])),
    ):
        torch.testing.assert_close(run(ours), run(plain))
    leaves = [value.clone().requires_grad_() for value in values]
    used = leaves[:1] if name == "gather" else leaves[: 2 + (name == "blend")]
    found = []
    for f in (ours, plain):
        first = torch.autograd.grad(f(*(leaf * leaf for leaf in leaves)).pow(3).sum(), used, create_graph=True)
        found.append(torch.autograd.grad(sum(part.pow(2).sum() for part in first), used))
    torch.testing.assert_close(*found)


# --- the ops themselves, whose autograd is registered


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_with_gradients(dtype):
    ops, x = torch.ops.sfllava_fast, leaf(3, 16, 2, dtype=dtype)
    layout, tokens = LAYOUT.format(POOLS[0]), leaf(22, 2, dtype=dtype)
    call = layout, 4, 4, None
    opcheck(ops.aggregate.default, (x, *call, "auto"))
    opcheck(ops.aggregate.default, (leaf(2, 3, 16, 2, dtype=dtype), *call, "auto"))
    opcheck(ops.aggregate_tangent.default, (x, x.detach(), *call, "auto"))
    opcheck(ops.aggregate_backward.default, (tokens, x, *call, "auto"))
    newline = leaf(1, 2, dtype=dtype)
    call = "llava_next_video-newline_grid", 4, 4, None
    opcheck(ops.aggregate.default, (x, *call, "auto", newline))
    opcheck(ops.separators_backward.default, (leaf(18, 2, dtype=dtype), x, *call, 1))
    hidden, rows, weights = (leaf(*shape, dtype=dtype) for shape in SHAPES)
    opcheck(ops.gather_rows.default, ([hidden, hidden.detach()], INDEX, "auto"))
    opcheck(ops.scatter_rows.default, (hidden, INDEX, rows, None, "auto"))
    opcheck(ops.scatter_rows.default, (hidden, INDEX, rows, weights, "auto"))
    heads = leaf(1, 2, 3, 4, dtype=dtype)
    opcheck(ops.attention_received.default, (heads, heads, 0.3, "auto"))
    opcheck(ops.top_per_frame.default, (hidden[..., 0], [0, 6], 0.5, None, "auto"))
    assert not ops.attention_received(heads, heads, 0.3, "auto").requires_grad


def test_an_op_alone_is_right_under_transforms():
    run = lambda x: torch.ops.sfllava_fast.aggregate(x, LAYOUT.format(POOLS[0]), 4, 4, None, "auto")  # noqa: E731
    for name in ("grad of grad", "jvp", "vmap of grad"):
        torch.testing.assert_close(DERIVATIVES[name](run), DERIVATIVES[name](both(POOLS[0])[1]))


def test_an_op_alone_that_has_no_gradient_says_so():
    first, _, second = make_projector()
    call = leaf(3, 16, 24), first.weight, first.bias, second.weight, second.bias, LAYOUT.format(POOLS[0]), 4, 4, None
    with pytest.raises(InputError, match="commuted is not differentiable"):
        torch.ops.sfllava_fast.commuted(*call, "auto")
    with pytest.raises(InputError, match="out= is not differentiable"):
        call = LAYOUT.format(POOLS[0]), 4, 4, None, "auto", torch.empty(22, 2)
        torch.ops.sfllava_fast.aggregate_out(leaf(3, 16, 2), *call)


def test_attention_is_not_differentiated():
    heads = torch.randn(1, 2, 3, 4)
    assert vmap(lambda x: attention_received(x, x, 0.5))(torch.stack([heads, -heads])).shape == (2, 1, 3)


def test_attention_received_is_detached_under_transforms():
    queries, keys = torch.randn(3, 1, 2, 2, 4), torch.randn(3, 1, 2, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = vmap(lambda q, k: attention_received(q, k, 0.5))(queries, keys)
        assert not grad(lambda q: attention_received(q, keys[0], 0.5).sum())(queries[0]).any()
    alone = [attention_received(q, k, 0.5) for q, k in zip(queries, keys)]
    torch.testing.assert_close(together, torch.stack(alone))

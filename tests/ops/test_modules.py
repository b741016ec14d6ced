"""The modules as parts of other people's models: compiled, exported, under autocast, wrapped, trained."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from distributed_modules import LAYOUT, SIDE, C, make_hidden, make_net, make_projector, work
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sfllava_fast import (
    FusedProjectorAggregator,
    PathwayProjectors,
    SlowFastAggregator,
    project_and_aggregate,
    slowfast_aggregate,
)
from sfllava_fast.errors import BackendError, InputError
from sfllava_fast.ops.projector import _commuted


def frozen(mode="auto"):
    return FusedProjectorAggregator(make_projector().requires_grad_(False), LAYOUT, mode)


@pytest.fixture
def commuted(monkeypatch):
    """The calls that pooled before the second layer."""
    calls = []
    monkeypatch.setattr("sfllava_fast.ops.projector._commuted", lambda *args: calls.append(args) or _commuted(*args))
    return calls


@pytest.mark.parametrize("mode", ["exact", "commuted", "auto"])
def test_it_is_project_and_aggregate(mode, commuted):
    module, hidden = frozen(mode), make_hidden()
    expected = project_and_aggregate(hidden, module.projector, LAYOUT, mode=mode)
    assert torch.equal(module(hidden), expected) and len(commuted) == (0 if mode == "exact" else 2)
    out = torch.empty_like(expected)
    assert module(hidden, out=out) is out and torch.equal(out, expected)
    tokens, offsets = module(hidden, frame_offsets=[0, 4, 9])
    by_hand = project_and_aggregate(hidden, module.projector, LAYOUT, mode=mode, frame_offsets=[0, 4, 9])
    assert torch.equal(tokens, by_hand[0])
    assert offsets.tolist() == [0, 3 * 18 + 4 * 4, 6 * 18 + 9 * 4]
    assert LAYOUT in repr(module) and f"mode={mode}" in repr(module) and "never" not in repr(module)


def test_its_keys_are_plain():
    module = frozen()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(module.state_dict()) == [f"projector.{name}" for name in names]
    module.load_state_dict(copy.deepcopy(module.state_dict()))


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("mode, traced", [("exact", "exact"), ("commuted", "commuted"), ("auto", "exact")])
def test_compiled_once_for_every_number_of_frames(mode, traced, graphs, commuted):
    module = frozen(mode)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    for frames in (5, 9, 16):
        hidden = make_hidden(frames)
        got, calls = compiled(hidden), len(commuted)
        assert calls == (1 if traced == "commuted" else 0)
        expected = project_and_aggregate(hidden, module.projector, LAYOUT, mode=traced)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        commuted.clear()
    assert graphs.frame_count == 1


def test_compiled_packed_videos_into_a_buffer(graphs):
    module = frozen("commuted")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    for ends in ([0, 4, 9], [0, 5, 12]):
        hidden, ends = make_hidden(ends[-1]), torch.tensor(ends)
        expected, offsets = module(hidden, frame_offsets=ends)
        out = torch.empty_like(expected)
        got, got_offsets = compiled(hidden, frame_offsets=ends, out=out)
        assert torch.equal(out, expected) and torch.equal(got, out) and torch.equal(got_offsets, offsets)


@pytest.mark.parametrize("mode", ["exact", "commuted"])
def test_exported_with_any_number_of_frames(mode):
    module, frames = frozen(mode), torch.export.Dim("frames", min=2, max=512)
    program = torch.export.export(module, (make_hidden(6),), dynamic_shapes={"hidden": {0: frames}})
    names = [str(node.target) for node in program.graph.nodes]
    assert any(("commuted" if mode == "commuted" else "sfllava_fast.aggregate") in name for name in names), names
    for frames in (2, 9, 31):
        torch.testing.assert_close(program.module()(make_hidden(frames)), module(make_hidden(frames)))


def test_opcheck_of_the_commuted_op():
    first, _, second = make_projector().requires_grad_(False)
    weights = first.weight, first.bias, second.weight, None
    call = (make_hidden(5), *weights, LAYOUT, SIDE, SIDE, torch.tensor([0, 2, 5]), "auto")
    torch.library.opcheck(torch.ops.sfllava_fast.commuted.default, call)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_exact_in_autocasts_dtype(hidden_dtype, commuted):
    module, hidden = frozen(), make_hidden(dtype=hidden_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(hidden)
        expected = slowfast_aggregate(module.projector(hidden), LAYOUT)
        with pytest.raises(InputError, match="autocast chooses|features are torch.bfloat16"):
            frozen("commuted")(hidden)
    assert not commuted and got.dtype is torch.bfloat16 and torch.equal(got, expected)


def test_gradients_are_those_of_the_plain_order():
    module, hidden = FusedProjectorAggregator(make_projector(), LAYOUT), make_hidden().requires_grad_()
    slowfast_aggregate(module.projector(hidden), LAYOUT).square().sum().backward()
    expected = [hidden.grad, *(weight.grad for weight in module.parameters())]
    hidden.grad = None
    module.zero_grad()
    module(hidden).square().sum().backward()
    for got, grad in zip([hidden.grad, *(weight.grad for weight in module.parameters())], expected):
        assert torch.equal(got, grad)


class Lora(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[..., :1]


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) * 2


class Quantized(torch.Tensor):
    """As torchao's: a weight that is another class of tensor."""


def lora(projector):
    projector[0] = Lora(C, 64)


def hooked(projector):
    projector[2].register_forward_hook(lambda module, args, output: output * 2)


def offloaded(projector):
    """As accelerate's: forward replaced on the instance."""
    stock = projector[0].forward
    projector[0].forward = lambda x: stock(x) * 2


def quantized(projector):
    projector[0].weight = nn.Parameter(projector[0].weight.as_subclass(Quantized), requires_grad=False)


@pytest.mark.parametrize(
    "wrap, reason",
    [
        (Wrapped, "Wrapped is not Linear, GELU, Linear"),
        (lora, "Lora is not a plain Linear"),
        (hooked, "hooks watch it"),
        (offloaded, "hooks watch it"),
        (quantized, "its weights are Quantized"),
    ],
)
def test_a_wrapped_projector_is_called_whole(wrap, reason, commuted):
    projector = make_projector()
    projector = (wrap(projector) or projector).requires_grad_(False)
    module, hidden = FusedProjectorAggregator(projector, LAYOUT), make_hidden()
    assert torch.equal(module(hidden), slowfast_aggregate(projector(hidden), LAYOUT)) and not commuted
    assert f"never commuted: {reason}" in repr(module)
    with pytest.raises(InputError, match=reason):
        FusedProjectorAggregator(projector, LAYOUT, "commuted")(hidden)


def test_wrapped_by_ddp_and_fsdp(tmp_path):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=10)
    untrained = net(make_hidden(7)).item()
    (net(make_hidden(5)) / 2 + net(make_hidden(6)) / 2).backward()
    optimizer.step()
    with torch.no_grad():
        expected = net(make_hidden(7)).item()
    mp.spawn(work, (2, tmp_path / "store", tmp_path / "found.pt"), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 5 and abs(expected - untrained) > 0.01
    for name, loss in found.items():
        assert loss == pytest.approx(expected, rel=1e-5), name


def two_projectors():
    torch.manual_seed(3)
    return {name: nn.Linear(C, 6) for name in ("temporal", "spatial")}


def test_each_pathway_has_its_projector(graphs):
    """RED-VILLM's: means over patches, zeros up to 100, and means over frames, each projected by its own."""
    projectors, hidden = two_projectors(), make_hidden().requires_grad_()
    module = PathwayProjectors(projectors)
    zeros = torch.zeros(100 - len(hidden), C)
    temporal = projectors["temporal"](torch.cat([hidden.mean(1), zeros]))
    expected = torch.cat([temporal, projectors["spatial"](hidden.mean(0))])
    tokens = module(hidden)
    torch.testing.assert_close(tokens, expected)
    (grad,) = torch.autograd.grad(tokens.square().sum(), hidden, retain_graph=True)
    (by_hand,) = torch.autograd.grad(expected.square().sum(), hidden)
    torch.testing.assert_close(grad, by_hand)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    for frames in (9, 4, 7):
        assert torch.equal(compiled(hidden[:frames]), module(hidden[:frames]))
    assert {key.split(".")[1] for key in module.state_dict()} == {"temporal", "spatial"}


@pytest.mark.parametrize("names", [["temporal"], ["temporal", "spatial", "other"], ["slow", "fast"]])
def test_projectors_of_other_pathways_are_refused(names):
    with pytest.raises(InputError, match="temporal, spatial"):
        PathwayProjectors({name: nn.Identity() for name in names})


@pytest.mark.parametrize(
    "make",
    [
        lambda **settings: SlowFastAggregator(LAYOUT, **settings),
        lambda **settings: FusedProjectorAggregator(make_projector(), LAYOUT, **settings),
        lambda **settings: PathwayProjectors(two_projectors(), **settings),
    ],
)
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"backend": "x"}, BackendError, "unknown backend 'x'"),
        ({"backend": None}, BackendError, "backend must be a name, .* not NoneType"),
        ({"grid": 24}, InputError, "grid must be two integers"),
        ({"grid": (6, "6")}, InputError, "grid must be two integers"),
    ],
)
def test_settings_are_checked_where_they_are_given(make, settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


@pytest.mark.parametrize("mode", ["q", None, ["exact"]])
def test_modes_are_checked_where_they_are_given(mode):
    with pytest.raises(InputError, match="unknown projector mode .* choose one of"):
        FusedProjectorAggregator(make_projector(), LAYOUT, mode)


def test_interleaved_pathways_have_no_parts():
    with pytest.raises(InputError, match="interleaves its pathways"):
        PathwayProjectors({name: nn.Identity() for name in ("class", "pool")}, "videollm_online")

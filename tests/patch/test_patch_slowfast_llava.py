"""The drop-in for the published SF-LLaVA code, against a stand-in with its interface and against float64 loops."""

import copy
import re
import sys
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import VIEWS
from torch import nn

from sfllava_fast.errors import BackendError, PatchError
from sfllava_fast.patch import patch_slowfast_llava, undo
from sfllava_fast.patching import warn_once

NAMES = (
    "concat", "spatial_1d_max_pool", "spatial_1d_avg_pool", "spatial_2d_max_pool", "spatial_2d_avg_pool",
    "spatial_temporal_pool", "temporal_global_pool",
)  # fmt: skip
METHODS = ("prepare_slowfast", "temporal_aggregation")
PAPER = "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Mixin:
    """The methods, names and errors of the published code, in our own words: PyTorch's poolings with channels first."""

    def temporal_aggregation(self, image_features, temporal_aggregation):
        frames, patches, channels = image_features.shape
        side = int(patches**0.5)

        def flat(pool):
            return pool(image_features.transpose(1, 2), 2).transpose(1, 2).view(-1, channels)

        def square(pool):
            pooled = pool(image_features.view(frames, side, side, channels).permute(3, 0, 1, 2))
            return pooled.flatten(1).t()

        pools = {
            "concat": lambda: image_features.view(-1, channels),
            "spatial_1d_max_pool": lambda: flat(F.max_pool1d),
            "spatial_1d_avg_pool": lambda: flat(F.avg_pool1d),
            "spatial_2d_max_pool": lambda: square(lambda x: F.max_pool2d(x, 2)),
            "spatial_2d_avg_pool": lambda: square(lambda x: F.avg_pool2d(x, 2)),
            "spatial_temporal_pool": lambda: square(lambda x: F.adaptive_avg_pool3d(x, (16, 12, 12))),
            "temporal_global_pool": lambda: image_features.mean(0),
        }
        if temporal_aggregation not in pools:
            raise ValueError(f"Unknown temporal aggregation method: {temporal_aggregation}")
        return pools[temporal_aggregation]()[None]

    def prepare_slowfast(self, image_features, temporal_aggregation):
        frames, patches, channels = image_features.shape
        found = re.fullmatch(r"slowfast-slow_(\d+)frms_(\w+)-fast_(\d+)x(\d+)", temporal_aggregation)
        if found is None:
            raise ValueError(f"Failed to parse the temporal aggregation for slowfast: {temporal_aggregation}")
        slow, pool, *fast = found.groups()
        chosen = torch.linspace(0, frames, int(slow) + 1)[:-1].int().tolist()
        side = int(patches**0.5)
        grid = image_features.view(frames, side, side, channels).permute(3, 0, 1, 2)
        pooled = F.adaptive_avg_pool2d(grid, tuple(map(int, fast))).flatten(1).t()[None]
        return torch.cat([self.temporal_aggregation(image_features[chosen], pool), pooled], dim=1)


class Model(nn.Module, Mixin):
    pass


class LlavaNext:
    def get_2dPool(self, image_feature, stride=2): ...
    def add_token_per_grid(self, image_feature): ...
    def add_token_per_frame(self, image_feature): ...


class Older(Mixin):
    def prepare_slowfast(self, image_features): ...


@pytest.fixture
def model():
    return Model()


@pytest.fixture(autouse=True)
def warnings_anew():
    warn_once.cache_clear()


def aggregate(model, features, name):
    method = model.prepare_slowfast if name.startswith("slowfast") else model.temporal_aggregation
    return method(features, name)


def published(features, name):
    """What the stand-in makes; of a contiguous copy and with a gradient where it would fail otherwise."""
    features = features.detach() if name == "temporal_global_pool" else features.detach().contiguous()
    return aggregate(Model(), features.requires_grad_(), name).detach()


def loops(features, name):
    """Tokens [S, D] in float64."""
    x = features.detach().double().numpy()
    side = int(x.shape[1] ** 0.5)
    if found := re.fullmatch(r"slowfast-slow_(\d+)frms_(\w+)-fast_(\d+)x(\d+)", name):
        return oracle.tokens(x, (side, side), int(found[1]), found[2], (int(found[3]), int(found[4])))
    if name == "temporal_global_pool":
        return x.mean(0)
    if name == "spatial_temporal_pool":
        frames = [x[list(oracle.adaptive_bin(i, len(x), 16))].mean(0) for i in range(16)]
        return np.array([token for frame in frames for token in oracle.fast_tokens(frame, (side, side), (12, 12))])
    return np.array([token for frame in x for token in oracle.slow_tokens(frame, (side, side), name)])


def error(tokens, exact):
    return np.abs(tokens[0].double().numpy() - exact).max()


def own(owner):
    return dict(vars(owner))


slowfasts = [f"slowfast-slow_4frms_{name}-fast_3x2" for name in NAMES[:5]]
fits = [(3, 25), (7, 16), (1, 36)]


@pytest.mark.parametrize("frames,patches", fits)
@pytest.mark.parametrize("name", [*NAMES, *slowfasts, PAPER])
def test_tokens_in_float64(model, name, frames, patches):
    features = torch.randn(frames, patches, 3, dtype=torch.float64)
    with patch_slowfast_llava(model):
        got = aggregate(model, features, name)
    exact = loops(features, name)
    assert got.shape == (1, *exact.shape) and got.is_contiguous()
    np.testing.assert_allclose(got[0].numpy(), exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*NAMES, *slowfasts, PAPER])
def test_equal_bits_on_any_strides(model, name, dtype, caplog):
    """But for two means of 16-bit features: those are within the error budget."""
    for view in VIEWS.values():
        features = view(lambda shape: torch.randn(shape).to(dtype), 6, 49, 5)
        with patch_slowfast_llava(model):
            got = aggregate(model, features, name)
        expected = published(features, name)
        assert got.dtype == dtype and got.shape == expected.shape
        if dtype.itemsize == 2 and name in ("spatial_temporal_pool", "temporal_global_pool"):
            exact = loops(features, name)
            assert error(got, exact) <= 2 * error(expected, exact)
        else:
            assert torch.equal(got, expected)
    assert not caplog.records


@pytest.mark.parametrize("name", ["concat", "spatial_1d_max_pool", "spatial_1d_avg_pool", "temporal_global_pool"])
def test_frames_that_are_no_square(model, name, caplog):
    features = torch.randn(4, 15, 3)
    with patch_slowfast_llava(model):
        got = model.temporal_aggregation(features, name)
    torch.testing.assert_close(got, published(features, name))
    assert not caplog.records


def test_sixteen_bit_spatial_temporal_pool_is_nearer_than_published(model):
    features = torch.randn(40, 144, 8).bfloat16()
    exact = loops(features, "spatial_temporal_pool")
    with patch_slowfast_llava(model):
        got = model.temporal_aggregation(features, "spatial_temporal_pool")
    assert error(got, exact) < error(published(features, "spatial_temporal_pool"), exact)


@pytest.mark.parametrize(
    "name,features",
    [
        (PAPER, torch.randn(5, 16, 3)),
        ("spatial_1d_max_pool", torch.randn(5, 16, 3)),
        ("spatial_1d_avg_pool", torch.randn(16, 5, 3).transpose(0, 1)),
        ("concat", torch.randn(5, 17, 3)[:, 1:]),
    ],
)
def test_runs_where_the_published_view_fails(model, name, features):
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="view"):
            aggregate(model, features, name)
        with patch_slowfast_llava(model):
            got = aggregate(model, features, name)
    np.testing.assert_allclose(got[0].numpy(), loops(features, name), rtol=1e-6, atol=1e-7)


def test_channels_need_not_be_the_last_in_memory(model):
    features = torch.randn(5, 3, 16).transpose(1, 2)
    with patch_slowfast_llava(model):
        for name in (*NAMES, PAPER):
            got, expected = (aggregate(model, x, name) for x in (features, features.contiguous()))
            torch.testing.assert_close(got, expected)


def test_concat_copies_nothing(model):
    features = torch.randn(5, 16, 3)
    with patch_slowfast_llava(model):
        assert model.temporal_aggregation(features, "concat").data_ptr() == features.data_ptr()


@pytest.mark.parametrize("pool", ["spatial_temporal_pool", "temporal_global_pool"])
def test_slow_methods_without_a_layout_run_as_published(model, pool, caplog):
    features, name = torch.randn(7, 16, 3), f"slowfast-slow_3frms_{pool}-fast_2x2"
    expected = published(features, name)
    with patch_slowfast_llava(model):
        for _ in range(2):
            torch.testing.assert_close(model.prepare_slowfast(features, name), expected)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"prepare_slowfast of '{name}' runs as published"
    ]


@pytest.mark.parametrize(
    "name",
    ["median", "", "slowfast-fast_4x4", "slowfast-slow_10frms_concat", "slowfast-slow_10frms_median-fast_4x4",
     "slowfast-slow_tenfrms_concat-fast_4x4", "slowfast"],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_bad_names_raise_what_is_published(model, method, name, caplog):
    features = torch.randn(4, 16, 3)
    with pytest.raises(ValueError) as expected:
        getattr(model, method)(features, name)
    with patch_slowfast_llava(model), pytest.raises(ValueError) as got:
        getattr(model, method)(features, name)
    assert type(got.value) is type(expected.value) and str(got.value) == str(expected.value)
    assert not caplog.records and got.value.__context__ is None


@pytest.mark.parametrize(
    "features",
    [torch.ones(4, 16, 3, dtype=torch.int64), torch.randn(4, 15, 3), torch.randn(0, 16, 3), torch.randn(4, 1, 3),
     torch.randn(16, 3)],
    ids=["integers", "not square", "no frames", "one patch", "no frame axis"],
)  # fmt: skip
@pytest.mark.parametrize("name", [*NAMES, PAPER, "slowfast-slow_0frms_concat-fast_2x2"])
def test_what_the_op_refuses_runs_as_published(model, name, features):
    """Where there is something to run: else both raise, alike."""
    try:
        expected = aggregate(model, features.clone().requires_grad_(features.is_floating_point()), name)
    except Exception as error:
        with patch_slowfast_llava(model), pytest.raises(type(error)) as got:
            aggregate(model, features, name)
        assert str(got.value) == str(error)
    else:
        with patch_slowfast_llava(model):
            torch.testing.assert_close(aggregate(model, features, name), expected.detach(), equal_nan=True)


@pytest.mark.parametrize("name", [*NAMES, *slowfasts])
def test_gradients_are_published_ones(model, name):
    features = torch.randn(5, 16, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(aggregate(model, features, name))
    (expected,) = torch.autograd.grad((aggregate(model, features, name) * weights).sum(), features)
    with patch_slowfast_llava(model):
        (got,) = torch.autograd.grad((aggregate(model, features, name) * weights).sum(), features)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [*NAMES, PAPER])
def test_compiles_whole_with_any_number_of_frames(model, name):
    torch._dynamo.reset()
    with patch_slowfast_llava(model):
        compiled = torch.compile(lambda x: aggregate(model, x, name), fullgraph=True, dynamic=True, backend="eager")
        for frames in (5, 8):
            features = torch.randn(frames, 16, 3)
            assert torch.equal(compiled(features), aggregate(model, features, name))


@pytest.mark.parametrize("flag,kept", [("slowfast", METHODS[0]), ("aggregation", METHODS[1])])
def test_a_flag_for_each_method(model, flag, kept):
    with patch_slowfast_llava(model, **{flag: False}):
        assert {*METHODS} - {*vars(model)} == {kept}


def test_the_backend_is_the_op_s(model):
    features = torch.randn(5, 16, 3, dtype=torch.float64)
    with patch_slowfast_llava(model, backend="cpu"):
        for name in ("spatial_1d_max_pool", "spatial_2d_max_pool", PAPER):
            with pytest.raises(BackendError, match="backend cpu"):
                aggregate(model, features, name)


@pytest.mark.parametrize("target", [Mixin, Model, Model()], ids=["mixin", "class", "instance"])
def test_undo_restores_the_exact_attributes(target):
    before = own(target)
    patch = patch_slowfast_llava(target)
    assert all(name in vars(target) for name in METHODS)
    patch.undo()
    assert own(target) == before


def test_a_patched_mixin_serves_its_models_until_undone(model):
    features = torch.randn(5, 16, 3)
    with patch_slowfast_llava(Mixin):
        assert model.prepare_slowfast(features, PAPER).shape == (1, 160, 3)
        with patch_slowfast_llava(model):
            assert model.prepare_slowfast(features, PAPER).shape == (1, 160, 3)
        assert not {*METHODS} & {*vars(model)}
    with pytest.raises(RuntimeError, match="view"):
        model.prepare_slowfast(features, PAPER)


def test_patched_twice_is_patched_once(model):
    patch_slowfast_llava(model, backend="cpu")
    patch_slowfast_llava(model, aggregation=False)
    assert "temporal_aggregation" not in vars(model)
    assert model.prepare_slowfast.__wrapped__ is Mixin.prepare_slowfast
    undo(model)
    assert not {*METHODS} & {*vars(model)}


def test_a_copy_has_its_own_methods(model):
    with patch_slowfast_llava(model):
        assert copy.deepcopy(model).prepare_slowfast.__self__ is not model


def tuner(model):
    """As PEFT holds a model: in a tuner, in a model of its own."""
    inner, outer = nn.Module(), nn.Module()
    inner.model, outer.base_model = model, inner
    return outer


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, tuner, lambda model: nn.DataParallel(tuner(model))])
def test_wrapped_models(model, wrap):
    patch = patch_slowfast_llava(wrap(model))
    assert all(name in vars(model) for name in METHODS)
    patch.undo()
    assert not any(name in vars(model) for name in METHODS)


def install(monkeypatch, mixin):
    for name in ("llava", "llava.model"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "llava.model.llava_arch", SimpleNamespace(LlavaMetaForCausalLM=mixin))


def test_without_a_target_the_installed_code_is_patched(monkeypatch):
    install(monkeypatch, Mixin)
    with patch_slowfast_llava():
        assert all(vars(Mixin)[name].__wrapped__ for name in METHODS)


@pytest.mark.parametrize(
    "target,found",
    [
        (LlavaNext, r"LlavaNext, with get_2dPool\(image_feature, stride\), .*: use patch_llava_next"),
        (nn.DataParallel(nn.Linear(1, 1)), "DataParallel, with none of them"),
        (Older(), r"Older, with prepare_slowfast\(image_features\), temporal_aggregation\("),
        (3, "int, with none of them"),
    ],
)
def test_other_targets_are_refused(target, found):
    before = own(target) if hasattr(target, "__dict__") else None
    with pytest.raises(PatchError) as error:
        patch_slowfast_llava(target)
    message = str(error.value)
    assert re.search(found, message) and "\n" not in message
    assert "the published SF-LLaVA code, with prepare_slowfast(image_features, temporal_aggregation)" in message
    assert before is None or own(target) == before


def test_the_other_llava_is_installed(monkeypatch):
    install(monkeypatch, LlavaNext)
    with pytest.raises(PatchError, match="use patch_llava_next"):
        patch_slowfast_llava()


def test_no_llava_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "llava", None)
    with pytest.raises(PatchError, match="could not import .* install the published SF-LLaVA code") as error:
        patch_slowfast_llava()
    assert "\n" not in str(error.value)

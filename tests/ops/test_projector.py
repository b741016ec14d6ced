"""project_and_aggregate: both orders against float64, what commuting refuses, and what auto takes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfllava_fast import SlowFastLayout, slowfast_aggregate
from sfllava_fast.errors import InputError, LayoutError
from sfllava_fast.layouts.slowfast import SLOW_POOLS
from sfllava_fast.ops import projector as projector_module
from sfllava_fast.ops.backends import registry
from sfllava_fast.ops.projector import project_and_aggregate

C, INNER, D = 24, 64, 40
CONFIGS = [
    *(SlowFastLayout(3, pool, (2, 2)) for pool in SLOW_POOLS),
    SlowFastLayout(3, "spatial_1d_max_pool", None),
    SlowFastLayout(3, "spatial_2d_avg_pool", None),
    SlowFastLayout(0, fast_grid=(4, 4)),
    SlowFastLayout(9, "spatial_1d_avg_pool", (5, 4)),  # repeated frames, overlapping bins
]


def make_projector(dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(C, INNER, bias), nn.GELU(), nn.Linear(INNER, D, bias))
    return layers.to(dtype).requires_grad_(False)


def make_hidden(frames=6, side=6, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, side * side + 1, C, generator=generator).to(dtype)[:, 1:]


def wide_tokens(hidden, projector, layout, lengths=None):
    """Tokens in float64, by operators that share nothing with the package."""
    first, _, second = projector
    z = hidden.double() @ first.weight.double().T + (first.bias.double() if first.bias is not None else 0)
    a = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    y = a @ second.weight.double().T + (second.bias.double() if second.bias is not None else 0)
    out = []
    for video in y.split(lengths or [len(y)]):
        side, channels = math.isqrt(video.shape[1]), video.transpose(1, 2)
        if layout.slow_frames:
            picked = channels[torch.linspace(0, len(video), layout.slow_frames + 1)[:-1].int().tolist()]
            square = picked.unflatten(2, (side, side))
            pooled = {
                "concat": lambda: picked,
                "spatial_1d_max_pool": lambda: F.max_pool1d(picked, 2),
                "spatial_1d_avg_pool": lambda: F.avg_pool1d(picked, 2),
                "spatial_2d_max_pool": lambda: F.max_pool2d(square, 2).flatten(2),
                "spatial_2d_avg_pool": lambda: F.avg_pool2d(square, 2).flatten(2),
            }[layout.slow_pool]()
            out.append(pooled.transpose(1, 2).flatten(0, 1))
        if layout.fast_grid:
            square = channels.unflatten(2, (side, side))
            out.append(F.adaptive_avg_pool2d(square, layout.fast_grid).permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(out)


def rms(error):
    return error.double().pow(2).mean().sqrt().item()


@pytest.fixture(params=["wide", "split", "split without oneDNN"])
def products(request, monkeypatch):
    """With and without the processor's own 16-bit products."""
    monkeypatch.setattr(projector_module, "_multiplies", lambda dtype, device: request.param != "wide")
    if request.param == "split without oneDNN":
        monkeypatch.setattr(projector_module, "_has_onednn", lambda dtype: False)


@pytest.mark.parametrize("layout", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_commuted_equals_float64(layout, dtype):
    hidden, projector = make_hidden(dtype=dtype), make_projector(dtype)
    tokens = project_and_aggregate(hidden, projector, layout, mode="commuted")
    assert tokens.dtype is dtype
    near = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(tokens.double(), wide_tokens(hidden, projector, layout), rtol=near, atol=near)


@pytest.mark.parametrize("layout", CONFIGS, ids=str)
def test_exact_is_the_standard_order_bit_for_bit(layout):
    hidden, projector = make_hidden(dtype=torch.bfloat16), make_projector(torch.bfloat16)
    expected = slowfast_aggregate(projector(hidden), layout)
    assert torch.equal(project_and_aggregate(hidden, projector, layout), expected)


@pytest.mark.parametrize("pool", SLOW_POOLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_commuted_is_no_less_accurate_than_exact(products, pool, dtype):
    """By pathway; the layout is the paper's in small."""
    layout = SlowFastLayout(4, pool, (4, 4))
    hidden, projector = make_hidden(24, 24, dtype), make_projector(dtype)
    wide = wide_tokens(hidden, projector, layout)
    slow = layout.count_tokens(24, (24, 24)) - 24 * 16
    exact, commuted = (project_and_aggregate(hidden, projector, layout, mode=mode) for mode in ("exact", "commuted"))
    for part in (slice(0, slow), slice(slow, None)):
        # A maximum of the same roundings differs by chance alone.
        assert rms(commuted[part] - wide[part]) <= 1.002 * rms(exact[part] - wide[part])
    assert not torch.equal(exact, commuted)


def test_rounding_what_is_pooled_to_16_bits_would_be_seen(monkeypatch):
    """The accuracy test has teeth: one rounding between pooling and Linear2 is more error than the exact order's."""
    monkeypatch.setattr(projector_module, "_multiplies", lambda dtype, device: True)
    layout, dtype = SlowFastLayout(0, fast_grid=(4, 4)), torch.bfloat16
    hidden, projector = 3 * make_hidden(24, 24, dtype), make_projector(dtype)
    wide = wide_tokens(hidden, projector, layout)
    exact = project_and_aggregate(hidden, projector, layout)
    plain = projector_module._TorchLayers.project_pooled
    monkeypatch.setattr(
        projector_module._TorchLayers,
        "project_pooled",
        lambda self, pooled, out: plain(self, pooled.bfloat16().to(pooled.dtype), out),
    )
    rounded = project_and_aggregate(hidden, projector, layout, mode="commuted")
    assert rms(rounded - wide) > 1.05 * rms(exact - wide)


@pytest.mark.parametrize("layout", [*CONFIGS, SlowFastLayout(3, "spatial_1d_avg_pool", None)], ids=str)
@pytest.mark.parametrize("offsets", [None, [0, 4, 5, 12]], ids=["one video", "three videos"])
@pytest.mark.parametrize("frames", [1, 5])
def test_blocks_of_frames_and_channels_change_nothing(monkeypatch, products, layout, offsets, frames):
    hidden, projector = make_hidden(12, dtype=torch.bfloat16), make_projector(torch.bfloat16)

    def tokens():
        got = project_and_aggregate(hidden, projector, layout, mode="commuted", frame_offsets=offsets)
        return got[0] if offsets else got

    expected = tokens()
    monkeypatch.setattr(projector_module, "_ROWS_AT_ONCE", frames * 36)
    monkeypatch.setattr(projector_module, "_CHANNELS_AT_ONCE", 16)  # of 40: 16, 16 and 8
    # The order of a product's sum may differ with its number of rows.
    torch.testing.assert_close(tokens(), expected, rtol=2**-7, atol=2**-7)
    assert rms(tokens() - expected) < 2**-10 * rms(expected)


@pytest.mark.parametrize("layout", CONFIGS, ids=str)
def test_packed_videos(layout):
    lengths = [4, 1, 7]
    hidden, projector = make_hidden(12), make_projector(bias=False)
    tokens, offsets = project_and_aggregate(hidden, projector, layout, mode="commuted", frame_offsets=[0, 4, 5, 12])
    torch.testing.assert_close(tokens.double(), wide_tokens(hidden, projector, layout, lengths), rtol=1e-5, atol=1e-5)
    assert offsets.tolist() == slowfast_aggregate(projector(hidden), layout, frame_offsets=[0, 4, 5, 12])[1].tolist()


def test_out_is_filled_in_place_and_nothing_else():
    layout, hidden, projector = CONFIGS[1], make_hidden(), make_projector()
    expected = project_and_aggregate(hidden, projector, layout, mode="commuted")
    buffer = torch.full((len(expected) + 2, D + 8), math.nan)
    out = buffer[1:-1, :D]
    assert project_and_aggregate(hidden, projector, layout, mode="commuted", out=out) is out
    assert torch.equal(out, expected)
    assert buffer[0].isnan().all() and buffer[-1].isnan().all() and buffer[:, D:].isnan().all()


class Named(nn.Module):
    """A projector as transformers names its parts."""

    def __init__(self, act=None):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(C, INNER), act or nn.GELU(), nn.Linear(INNER, D)
        self.requires_grad_(False)

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class Normed(Named):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D).requires_grad_(False)

    def forward(self, x):
        return self.norm(super().forward(x))


class Adapter(nn.Linear):
    pass


def hooked():
    projector = make_projector()
    projector[2].register_forward_hook(lambda module, args, output: output * 2)
    return projector


UNFIT = {
    "tanh": (lambda: Named(nn.GELU("tanh")), "not the exact GELU"),
    "relu": (lambda: Named(nn.ReLU()), "activation ReLU.* is not the exact GELU"),
    "a norm behind": (Normed, "Normed is not Linear, GELU, Linear"),
    "one layer": (lambda: nn.Linear(C, D).requires_grad_(False), "Linear is not Linear, GELU, Linear"),
    "an adapter": (lambda: nn.Sequential(Adapter(C, INNER), nn.GELU(), nn.Linear(INNER, D)), "Adapter is not a plain"),
    "hooks": (hooked, "hooks"),
    "trained": (lambda: make_projector().requires_grad_(True), "needs gradients"),
    "another dtype": (lambda: make_projector(torch.float64), "features are torch.float32 and its weights"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_commuting_refuses_with_the_reason(name):
    make, reason = UNFIT[name]
    with pytest.raises(InputError, match=rf"cannot be commuted with pooling: .*{reason}[^\n]*; use mode='exact'"):
        project_and_aggregate(make_hidden(), make(), CONFIGS[1], mode="commuted")


@pytest.mark.parametrize("name", [name for name in UNFIT if name != "another dtype"])
def test_auto_takes_exact_then(name):
    hidden, projector = make_hidden(), UNFIT[name][0]()
    expected = slowfast_aggregate(projector(hidden), CONFIGS[1])
    assert torch.equal(project_and_aggregate(hidden, projector, CONFIGS[1], mode="auto"), expected)


class Rows(TorchDispatchMode):
    """Notes how many rows Linear2 runs on, product by product."""

    def __init__(self):
        super().__init__()
        self.of_second = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            *_, rows, weight = args
            if weight.shape == (INNER, D):
                self.of_second.append(len(rows))
        return func(*args, **(kwargs or {}))


def test_auto_commutes_where_that_saves_rows():
    hidden, projector = make_hidden(50, 24), make_projector()
    paper, every_patch = SlowFastLayout(), SlowFastLayout(50, "concat", (4, 4))
    for layout, mode in ((paper, "commuted"), (every_patch, "exact")):
        expected = project_and_aggregate(hidden, projector, layout, mode=mode)
        assert torch.equal(project_and_aggregate(hidden, projector, layout, mode="auto"), expected)
    with Rows() as rows:
        project_and_aggregate(hidden, projector, paper, mode="auto")
    assert sorted(rows.of_second) == [800, 10 * 576]


@pytest.mark.parametrize(
    "dtype, native, grid, mode",
    [
        (torch.bfloat16, True, 15, "commuted"),  # 225 of 576 rows, each twice: 78 %
        (torch.bfloat16, True, 16, "exact"),  # 256: 89 %
        (torch.bfloat16, False, 16, "commuted"),
        (torch.bfloat16, False, 22, "exact"),  # 84 %
        (torch.float32, True, 15, "commuted"),
        (torch.float32, False, 16, "exact"),
    ],
)
def test_auto_counts_the_work_of_means(monkeypatch, dtype, native, grid, mode):
    monkeypatch.setattr(projector_module, "_multiplies", lambda dtype, device: native)
    hidden, projector = make_hidden(4, 24, dtype), make_projector(dtype)
    layout = SlowFastLayout(0, fast_grid=(grid, grid))
    got, expected, other = (
        project_and_aggregate(hidden, projector, layout, mode=m)
        for m in ("auto", mode, "exact" if mode == "commuted" else "commuted")
    )
    assert torch.equal(got, expected) and not torch.equal(got, other)


def test_transformers_projector_is_taken():
    transformers = pytest.importorskip("transformers")
    from tiny_llava import tiny_config
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    projector = LlavaMultiModalProjector(tiny_config()).requires_grad_(False)
    hidden = torch.randn(6, 36, 16)
    commuted, exact = (project_and_aggregate(hidden, projector, CONFIGS[1], mode=m) for m in ("commuted", "exact"))
    torch.testing.assert_close(commuted, exact, rtol=1e-5, atol=1e-5)
    assert transformers


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"mode": "fast"}, InputError, "unknown projector mode 'fast': choose one of exact, commuted, auto"),
        ({"out": torch.empty(3, D)}, InputError, r"out must be \[78, 40\] for this layout, not \[3, 40\]"),
        ({"out": torch.empty(78, D, dtype=torch.float16)}, InputError, "out must be torch.float32 on cpu"),
        ({"grid": (5, 5)}, InputError, "grid 5x5 does not fit 36 patches"),
        ({"layout": "slowfast"}, LayoutError, "unknown layout"),
        ({"hidden": torch.zeros(6, C)}, InputError, "features must be"),
        ({"frame_offsets": [0, 2]}, InputError, "frame_offsets must rise from 0 to 6"),
    ],
)
def test_bad_input(arguments, error, match):
    defaults = {"hidden": make_hidden(), "projector": make_projector(), "layout": CONFIGS[1], "mode": "commuted"}
    with pytest.raises(error, match=match):
        project_and_aggregate(**{**defaults, **arguments})


def test_gradients_flow_through_exact():
    hidden = make_hidden().clone().requires_grad_()
    project_and_aggregate(hidden, make_projector(), CONFIGS[1], mode="auto").sum().backward()
    assert hidden.grad.abs().sum() > 0


class StandIn:
    """The fused kernels, by torch's operators; `off` is added to what they make."""

    def __init__(self, off=0.0):
        self.off = off

    def project_pool(self, hidden, weight, bias, plan):
        first = nn.Linear(weight.shape[1], weight.shape[0], device=hidden.device, dtype=hidden.dtype)
        first.weight.data, first.bias.data = weight, bias
        layers = projector_module._TorchLayers(first, first, hidden, "torch")
        pooled, kept = layers.pool(hidden, plan)
        return pooled + self.off, (kept + self.off).to(hidden.dtype)

    def project_pooled(self, pooled, weight, bias, out):
        out.copy_(F.linear(pooled.to(weight.dtype), weight, bias) + self.off)


@pytest.mark.parametrize("off, works", [(0.0, True), (0.5, False), (math.nan, False), (None, False)])
def test_fused_kernels_must_agree_with_torch_before_they_serve(monkeypatch, caplog, off, works):
    def kernels():
        if off is None:
            raise RuntimeError("no compiler\nand more")
        return StandIn(off)

    monkeypatch.setattr(registry, "triton_kernels", kernels)
    fits = projector_module._fused_works.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert fits is works
    assert ("the fused projector is not used on cpu" in caplog.text) is not works
    assert "more" not in caplog.text


@pytest.mark.parametrize("layout", CONFIGS, ids=str)
@pytest.mark.parametrize("offsets", [None, [0, 4, 5, 12]], ids=["one video", "three videos"])
def test_what_the_fused_kernels_make_is_put_in_its_place(monkeypatch, layout, offsets):
    hidden, projector = make_hidden(12, dtype=torch.bfloat16), make_projector(torch.bfloat16)
    monkeypatch.setattr(projector_module, "_multiplies", lambda dtype, device: True)
    arguments = {"mode": "commuted", "frame_offsets": offsets}
    expected = project_and_aggregate(hidden, projector, layout, **arguments)
    monkeypatch.setattr(projector_module, "_is_fused", lambda *_: True)
    monkeypatch.setattr(registry, "triton_kernels", lambda: StandIn())
    got = project_and_aggregate(hidden, projector, layout, **arguments)
    if offsets:
        assert torch.equal(got[1], expected[1])
        got, expected = got[0], expected[0]
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)

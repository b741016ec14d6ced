"""The drop-in for LLaVA-NeXT / LLaVA-Video code, against a stand-in with its interface and against float64 loops."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType, SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import VIEWS
from torch import nn

from sfllava_fast.errors import BackendError, PatchError
from sfllava_fast.patch import patch_llava_next
from sfllava_fast.patching import warn_once

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = ("average", "max", "bilinear")
POSITIONS = ("grid", "frame", "one_token", "no_token")
PIECES = {
    "pooling": {"get_2dPool"},
    "newline": {"add_token_per_grid", "add_token_per_frame"},
    "faster": {"prepare_inputs_labels_for_multimodal"},
}
METHODS = set.union(*PIECES.values())


class Mixin:
    """The methods and errors of the published code, in our own words: PyTorch's poolings with channels first."""

    def get_2dPool(self, image_feature, stride=2):
        side, mode = self.get_vision_tower().num_patches_per_side, self.config.mm_spatial_pool_mode
        frames, _, channels = image_feature.shape
        grid = image_feature.view(frames, side, side, channels).permute(0, 3, 1, 2).contiguous()
        pools = {
            "average": lambda: F.avg_pool2d(grid, stride),
            "max": lambda: F.max_pool2d(grid, stride),
            "bilinear": lambda: F.interpolate(grid, size=[math.ceil(side / stride)] * 2, mode="bilinear"),
        }
        if mode not in pools:
            raise ValueError(f"Unexpected mm_spatial_pool_mode: {mode}")
        return pools[mode]().flatten(2).transpose(1, 2)

    def add_token_per_grid(self, image_feature):
        rows = [[self.with_newline(row) for row in frame.split(math.isqrt(len(frame)))] for frame in image_feature]
        frames = torch.stack([torch.cat(frame) for frame in rows])
        return frames if self.config.add_faster_video else frames.flatten(0, 1)

    def add_token_per_frame(self, image_feature):
        return torch.stack([self.with_newline(frame) for frame in image_feature])

    def with_newline(self, tokens):
        return torch.cat([tokens, self.model.image_newline[None]])

    def prepare_inputs_labels_for_multimodal(self, images, modalities):
        """Tokens of each image and video, laid out as `config.mm_newline_position` says; the text is left out."""
        features = self.encode_images(torch.cat(images)).split([len(image) for image in images])
        pooled = [self.get_2dPool(x) if kind == "video" else x for x, kind in zip(features, modalities)]
        if self.config.mm_patch_merge_type == "flat":
            return [x.flatten(0, 1) for x in pooled]
        laid_out = []
        for index, (x, kind) in enumerate(zip(pooled, modalities)):
            position = self.config.mm_newline_position if kind == "video" else "no_token"
            if position == "grid":
                x = self.add_token_per_grid(x)
                if self.config.add_faster_video:
                    faster = self.add_token_per_grid(all_faster_video_features[index])  # noqa: F821
                    end = self.model.faster_token[None]
                    chosen = [faster[t] if t % self.config.faster_token_stride else x[t] for t in range(len(x))]
                    x = torch.cat([torch.cat([frame, end]) for frame in chosen])
            elif position == "frame":
                x = self.add_token_per_frame(x).flatten(0, 1)
            elif position == "one_token":
                x = self.with_newline(x.flatten(0, 1))
            else:
                x = x.flatten(0, 1)
            laid_out.append(x)
        return laid_out


class Model(nn.Module, Mixin):
    """`encode_images` takes patches [T, N, D] for images, and passes them on."""

    def __init__(self, side=6, channels=3, **config):
        super().__init__()
        self.model = nn.Module()
        self.model.image_newline = nn.Parameter(torch.randn(channels))
        self.model.faster_token = nn.Parameter(torch.randn(channels))
        self.tower = SimpleNamespace(num_patches_per_side=side)
        defaults = dict(
            mm_spatial_pool_mode="average", mm_newline_position="grid", mm_patch_merge_type="spatial_unpad",
            add_faster_video=False, faster_token_stride=3,
        )  # fmt: skip
        self.config = SimpleNamespace(**(defaults | config))

    def get_vision_tower(self):
        return self.tower

    def encode_images(self, images):
        if images.isnan().any():
            raise FloatingPointError
        return images


class SlowFast:
    def prepare_slowfast(self, image_features, temporal_aggregation): ...
    def temporal_aggregation(self, image_features, temporal_aggregation): ...


class Older(Mixin):
    def get_2dPool(self, image_feature): ...


@pytest.fixture(autouse=True)
def warnings_anew():
    warn_once.cache_clear()


def pool_loops(features, side, mode, stride):
    """[T, n, D] in float64."""
    frames = features.detach().double().numpy().reshape(len(features), side, side, -1)
    if mode == "bilinear":
        size = math.ceil(side / stride)
        return np.array([[between(frame, i, j, size) for i in range(size) for j in range(size)] for frame in frames])
    reduce, size = oracle.largest if mode == "max" else oracle.mean, side // stride
    box = [(i, j) for i in range(stride) for j in range(stride)]
    return np.array([
        [reduce([frame[r * stride + i, c * stride + j] for i, j in box]) for r in range(size) for c in range(size)]
        for frame in frames
    ])  # fmt: skip


def between(frame, row, col, size):
    """The value at the middle of one of size x size cells, from the four patches around it."""
    corners = []
    for index in (row, col):
        at = max((index + 0.5) * len(frame) / size - 0.5, 0)
        first = int(at)
        corners.append([(first, 1 - at + first), (min(first + 1, len(frame) - 1), at - first)])
    return sum(frame[r, c] * by_row * by_col for r, by_row in corners[0] for c, by_col in corners[1])


def row_newlines(tokens, newline):
    """[n, D] of one frame with a newline behind each row."""
    side = math.isqrt(len(tokens))
    return [token for row in range(side) for token in (*tokens[row * side : (row + 1) * side], newline)]


def video_loops(model, features, mode, stride=2):
    """All tokens of a video with add_faster_video, in float64."""
    side, every = model.tower.num_patches_per_side, model.config.faster_token_stride
    slow, faster = (pool_loops(features, side, mode, by) for by in (stride, 2 * stride))
    newline, end = (p.detach().double().numpy() for p in (model.model.image_newline, model.model.faster_token))
    tokens = []
    for t in range(len(features)):
        tokens += [*row_newlines(faster[t] if t % every else slow[t], newline), end]
    return np.array(tokens)


def call(model, *videos, modalities=None):
    return model.prepare_inputs_labels_for_multimodal([*videos], modalities or ["video"] * len(videos))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side,stride", [(6, 2), (7, 2), (7, 3), (9, 4), (5, 1), (4, 4), (3, 2)])
def test_pooling_in_float64(mode, side, stride):
    model, features = Model(side, mm_spatial_pool_mode=mode), torch.randn(3, side * side, 2, dtype=torch.float64)
    with patch_llava_next(model):
        got = model.get_2dPool(features, stride)
    size = math.ceil(side / stride) if mode == "bilinear" else side // stride
    assert got.shape == (3, size * size, 2)
    np.testing.assert_allclose(got.numpy(), pool_loops(features, side, mode, stride), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_pooling_has_the_published_bits(mode, stride, dtype, caplog):
    """But for averages over a stride that is no power of two, which are divided twice."""
    model, eps = Model(9, mm_spatial_pool_mode=mode), torch.finfo(dtype).eps
    for view in VIEWS.values():
        features = view(lambda shape: torch.randn(shape).to(dtype), 4, 81, 5)
        expected = model.get_2dPool(features, stride)
        with patch_llava_next(model):
            got = model.get_2dPool(features, stride)
        assert got.dtype == dtype and got.shape == expected.shape
        tolerance = 1.5 * eps if (mode, stride) == ("average", 3) else 0
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    assert not caplog.records


@pytest.mark.parametrize("mode", MODES)
def test_pooling_of_channels_that_are_not_the_last_in_memory(mode):
    model, features = Model(mm_spatial_pool_mode=mode), torch.randn(4, 3, 36).transpose(1, 2)
    expected = model.get_2dPool(features)
    with patch_llava_next(model):
        assert torch.equal(model.get_2dPool(features), expected)


@pytest.mark.parametrize("mode", MODES)
def test_pooling_gradients_are_published_ones(mode):
    model = Model(7, mm_spatial_pool_mode=mode)
    features = torch.randn(3, 49, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(model.get_2dPool(features))
    (expected,) = torch.autograd.grad((model.get_2dPool(features) * weights).sum(), features)
    with patch_llava_next(model):
        (got,) = torch.autograd.grad((model.get_2dPool(features) * weights).sum(), features)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("faster", [False, True])
def test_compiles_whole_with_any_number_of_frames(mode, faster):
    torch._dynamo.reset()
    model = Model(mm_spatial_pool_mode=mode, add_faster_video=faster)
    with patch_llava_next(model), torch.no_grad():
        tokens = torch.compile(
            lambda x: model.add_token_per_grid(model.get_2dPool(x)), fullgraph=True, dynamic=True, backend="eager"
        )
        for frames in (4, 7):
            features = torch.randn(frames, 36, 3)
            assert torch.equal(tokens(features), model.add_token_per_grid(model.get_2dPool(features)))


@pytest.mark.parametrize(
    "mode,stride,features",
    [
        ("median", 2, torch.randn(3, 36, 2)),
        ("average", 7, torch.randn(3, 36, 2)),
        ("average", 0, torch.randn(3, 36, 2)),
        ("max", 2, torch.randn(3, 35, 2)),
        ("max", "two", torch.randn(3, 36, 2)),
        ("bilinear", 2, torch.randn(3, 35, 2)),
        ("bilinear", 2, torch.ones(3, 36, 2, dtype=torch.int64)),
    ],
)
def test_bad_pooling_raises_what_is_published(mode, stride, features, caplog):
    model = Model(mm_spatial_pool_mode=mode)
    with pytest.raises(Exception) as expected:
        model.get_2dPool(features, stride)
    with patch_llava_next(model), pytest.raises(type(expected.value)) as got:
        model.get_2dPool(features, stride)
    if mode == "median":
        assert str(got.value) == str(expected.value)
    assert not caplog.records


@pytest.mark.parametrize(
    "stride,features", [((2, 3), torch.randn(3, 36, 2)), (2, torch.ones(3, 36, 2, dtype=torch.int64))]
)
def test_what_the_op_refuses_runs_as_published(stride, features, caplog):
    model = Model(mm_spatial_pool_mode="max")
    expected = model.get_2dPool(features, stride)
    with patch_llava_next(model):
        for _ in range(2):
            assert torch.equal(model.get_2dPool(features, stride), expected)
    assert len(caplog.records) == 1 and "get_2dPool runs as published: " in caplog.text


@pytest.mark.parametrize("faster", [False, True])
def test_newlines(faster):
    model, features = Model(add_faster_video=faster), torch.randn(4, 9, 3)
    newline = model.model.image_newline.detach()
    with patch_llava_next(model):
        by_row, by_frame = model.add_token_per_grid(features), model.add_token_per_frame(features)
    rows = torch.stack([torch.stack(row_newlines(frame, newline)) for frame in features])
    assert torch.equal(by_row, rows if faster else rows.flatten(0, 1))
    assert torch.equal(by_frame, torch.stack([torch.stack([*frame, newline]) for frame in features]))


@pytest.mark.parametrize("method", sorted(PIECES["newline"]))
def test_newlines_promote_and_have_gradients(method):
    model, features = Model(), torch.randn(4, 9, 3).bfloat16().requires_grad_()
    expected = getattr(model, method)(features)
    weights = torch.randn_like(expected)
    inputs = features, model.model.image_newline
    gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    with patch_llava_next(model):
        got = getattr(model, method)(features)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    for ours, theirs in zip(torch.autograd.grad((got * weights).sum(), inputs), gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("merge", ["spatial_unpad", "flat"])
@pytest.mark.parametrize("flags", [{}, {"pooling": False}, {"newline": False}])
def test_newline_positions_stay(mode, position, merge, flags):
    for faster in (False, True) if position != "grid" or merge == "flat" else (False,):
        model = Model(mm_spatial_pool_mode=mode, mm_newline_position=position, mm_patch_merge_type=merge,
                      add_faster_video=faster)  # fmt: skip
        videos = [torch.randn(frames, 36, 3) for frames in (5, 1, 3)]
        kinds = ["video", "image", "video"]
        expected = call(model, *videos, modalities=kinds)
        with patch_llava_next(model, **flags):
            got = call(model, *videos, modalities=kinds)
        assert [*map(len, got)] == [*map(len, expected)] and torch.equal(torch.cat(got), torch.cat(expected))


def faster_model(side=6, **config):
    return Model(side, add_faster_video=True, **config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flags", [{}, {"pooling": False}, {"newline": False}, {"pooling": False, "newline": False}])
def test_slow_and_faster_frames(mode, flags):
    """Several videos and an image in a batch: the published code raises, we give what its flag promises."""
    model = faster_model(7, mm_spatial_pool_mode=mode)
    videos = [torch.randn(frames, 49, 3) for frames in (7, 1, 3)]
    with pytest.raises(NameError):
        call(model, *videos)
    with patch_llava_next(model, **flags):
        got = call(model, *videos, modalities=["video", "image", "video"])
    assert torch.equal(got[1], videos[1][0])
    for tokens, video in zip(got[::2], videos[::2]):
        expected = video_loops(model, video, mode)
        assert tokens.shape == expected.shape
        np.testing.assert_allclose(tokens.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("every,frames", [(1, 4), (2, 5), (10, 4), (4, 9)])
def test_slow_frames_are_those_that_the_stride_divides(every, frames):
    model, video = faster_model(faster_token_stride=every), torch.randn(frames, 36, 3)
    with patch_llava_next(model):
        (got,) = call(model, video)
    slow = -(-frames // every)
    assert len(got) == slow * (3 * 4 + 1) + (frames - slow) * (1 * 2 + 1)
    np.testing.assert_allclose(got.detach().numpy(), video_loops(model, video, "average"), rtol=1e-5, atol=1e-6)


def test_slow_and_faster_tokens_have_gradients():
    model, video = faster_model(), torch.randn(5, 36, 3, requires_grad=True)
    with patch_llava_next(model):
        (tokens,) = call(model, video)
    tokens.sum().backward()
    torch.testing.assert_close(video.grad.sum(), torch.tensor(2.0 * 9 * 3 + 3.0 * 1 * 3))
    assert torch.equal(model.model.faster_token.grad, torch.full((3,), 5.0))
    assert torch.equal(model.model.image_newline.grad, torch.full((3,), 2.0 * 3 + 3.0))


def test_a_failed_call_leaves_nothing_behind():
    model, video = faster_model(), torch.randn(5, 36, 3)
    with patch_llava_next(model):
        (expected,) = call(model, video)
        with pytest.raises(FloatingPointError):
            call(model, video, torch.full((2, 36, 3), torch.nan))
        with pytest.raises(RuntimeError):
            call(model, video, video[:, 1:])
        assert model.config.add_faster_video
        assert torch.equal(call(model, video)[0], expected)


def test_threads_do_not_meet():
    model, videos = faster_model(), [torch.randn(frames, 36, 3) for frames in range(2, 10)]
    with patch_llava_next(model), ThreadPoolExecutor(4) as pool:
        for tokens, video in zip(pool.map(lambda video: call(model, video, video)[1], videos * 4), videos * 4):
            np.testing.assert_allclose(
                tokens.detach().numpy(), video_loops(model, video, "average"), rtol=1e-5, atol=1e-6
            )


class Defined(Mixin):
    """Code in which somebody defined the name."""

    prepare_inputs_labels_for_multimodal = FunctionType(
        Mixin.prepare_inputs_labels_for_multimodal.__code__, globals() | {"all_faster_video_features": []}
    )


class AnAttribute(Mixin):
    def prepare_inputs_labels_for_multimodal(self, images, modalities):
        return self.all_faster_video_features


@pytest.mark.parametrize("target", [Defined, AnAttribute])
def test_a_mode_that_works_is_left_alone(target):
    with patch_llava_next(target):
        assert not hasattr(target.prepare_inputs_labels_for_multimodal, "__wrapped__")
        assert target.get_2dPool.__wrapped__


@pytest.mark.parametrize("piece", PIECES)
def test_a_flag_for_each_piece(piece):
    model = Model()
    with patch_llava_next(model, **{piece: False}):
        assert METHODS - {*vars(model)} == PIECES[piece]


@pytest.mark.parametrize("target", [Mixin, Model, Model()], ids=["mixin", "class", "instance"])
def test_undo_restores_the_exact_attributes(target):
    before = dict(vars(target))
    patch = patch_llava_next(target)
    assert {*vars(target)} >= METHODS
    patch.undo()
    assert dict(vars(target)) == before


def test_models_are_undone_one_by_one():
    first, second, video = faster_model(), faster_model(), torch.randn(5, 36, 3)
    patch = patch_llava_next(first)
    with patch_llava_next(Mixin), patch_llava_next(second):
        patch.undo()
        for model in (first, second):
            assert call(model, video)[0].shape == (2 * 13 + 3 * 3, 3)
    for model in (first, second):
        with pytest.raises(NameError):
            call(model, video)


def test_wrapped_models():
    model = Model()
    with patch_llava_next(nn.DataParallel(model)):
        assert {*vars(model)} >= METHODS


def test_the_backend_is_the_op_s():
    model = Model()
    with patch_llava_next(model, backend="cpu"), pytest.raises(BackendError, match="backend cpu"):
        model.get_2dPool(torch.randn(3, 36, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    "target,found",
    [
        (SlowFast(), r"SlowFast, with prepare_slowfast\(.*\): use patch_slowfast_llava"),
        (Older, r"Older, with get_2dPool\(image_feature\), add_token_per_grid\(image_feature\)"),
        (nn.Linear(1, 1), "Linear, with none of them"),
    ],
)
def test_other_targets_are_refused(target, found):
    before = dict(vars(target))
    with pytest.raises(PatchError, match=found) as error:
        patch_llava_next(target)
    assert r"LLaVA-NeXT / LLaVA-Video code, with get_2dPool(image_feature, stride)," in str(error.value)
    assert "\n" not in str(error.value) and dict(vars(target)) == before


def test_without_a_target_the_installed_code_is_patched(monkeypatch):
    for name in ("llava", "llava.model"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "llava.model.llava_arch", SimpleNamespace(LlavaMetaForCausalLM=Mixin))
    with patch_llava_next():
        assert {*vars(Mixin)} >= METHODS
        assert Mixin.get_2dPool.__wrapped__

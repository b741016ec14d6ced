"""The batch on tensors against Pillow, and against transformers' own CLIP image processor."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional as F

from sfllava_fast.errors import InputError
from sfllava_fast.video import preprocess as module
from sfllava_fast.video.preprocess import CLIP_MEAN, CLIP_STD, PreprocessSpec, _scale_and_shift, preprocess

Image = pytest.importorskip("PIL.Image")

SIZES = [(120, 213), (213, 120), (97, 131), (336, 336), (36, 31), (360, 640), (500, 337)]
PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), rescale=1.0)  # bytes stay bytes


def draw(height: int, width: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    """Frames with edges, ramps and noise: what makes two resizes differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        frames[i, ..., 0] = 255 * ((x // 7 + y // 5 + i) % 2)
        frames[i, ..., 1] = np.clip(x * 255 / width + 20 * i, 0, 255)
        frames[i, ..., 2] = rng.integers(0, 256, (height, width))
    return torch.from_numpy(frames)


def shade(height: int, width: int) -> torch.Tensor:
    """One frame of smooth waves of all lengths and a little grain, as a camera gives."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    frame = 128 + 3 * rng.normal(size=(height, width, 3))
    for wave in range(24):
        across, down = rng.normal(size=2) * 2 ** rng.uniform(1, 6)
        height_of_wave = 40 / np.sqrt(np.hypot(across, down))
        frame[..., wave % 3] += height_of_wave * np.sin(6.3 * (across * x / width + down * y / height))
    return torch.from_numpy(frame.clip(0, 255).astype(np.uint8))[None]


def pillow_resize(frames: torch.Tensor, height: int, width: int, resample=Image.Resampling.BICUBIC) -> torch.Tensor:
    """Pillow's resize in the order it always had until version 13: rows, then columns."""
    resized = []
    for frame in frames:
        image = Image.fromarray(frame.numpy())
        resized.append(np.array(image.resize((width, image.height), resample).resize((width, height), resample)))
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()


def assert_near_pillow(got: torch.Tensor, want: torch.Tensor, most: int = 1, share: float = 0.005) -> None:
    distance = (got - want).abs()
    assert got.shape == want.shape
    assert distance.max() <= most
    assert (distance > 0).float().mean() <= share


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU, for the code that runs there."""

    device = torch.device("cuda")


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_stretch_is_pillows_resize(size, resample):
    frames = draw(*size)
    got = preprocess(frames, PreprocessSpec(size=168, crop=None, resample=resample, **PLAIN))
    want = pillow_resize(frames, 168, 168, Image.Resampling[resample.upper()])
    assert_near_pillow(got, want, most=1 if min(size) >= 168 else 2, share=0.01)


@pytest.mark.parametrize("size", [(720, 1280), (480, 854), (1280, 720), (1080, 1920)])
def test_stretch_of_ordinary_video_frames(size):
    frames = shade(*size)
    got = preprocess(frames, PreprocessSpec(crop=None, **PLAIN))
    assert_near_pillow(got, pillow_resize(frames, 336, 336), most=1, share=0.004)


@pytest.mark.parametrize("size", SIZES)
def test_resize_in_float_for_other_devices_is_pillows_too(size):
    frames = draw(*size)
    pixels = frames.permute(0, 3, 1, 2).as_subclass(Elsewhere)
    got = module._resize(pixels, (168, 168), "bicubic").as_subclass(torch.Tensor)
    assert got.dtype == torch.float32
    assert_near_pillow(got, pillow_resize(frames, 168, 168))


# Not tall ones: transformers calls Pillow, whose version 13 resizes those columns first.
@pytest.mark.parametrize("size", [(120, 213), (336, 336), (360, 640), (121, 122), (113, 400)])
def test_crop_is_transformers_clip_image_processor(size):
    module_path = "transformers.models.clip.image_processing_pil_clip"
    processor = pytest.importorskip(module_path).CLIPImageProcessorPil(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
    )
    frames = draw(*size)
    want = processor(images=[Image.fromarray(f.numpy()) for f in frames], return_tensors="pt")["pixel_values"]
    got = preprocess(frames, PreprocessSpec.from_processor(processor, mode="crop"))
    to_bytes = 255 * torch.tensor(CLIP_STD).view(3, 1, 1)
    assert_near_pillow((got * to_bytes).round(), (want * to_bytes).round())
    # Where the resize agrees, only rounding in the last bits of the normalisation is left.
    same = ((got - want) * to_bytes).abs() < 0.5
    torch.testing.assert_close(got[same], want[same], atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(120, 213), (213, 120), (97, 132), (64, 64)])
def test_pad_adds_the_mean_colour_around(size):
    frames = draw(*size)
    side = max(size)
    colour = tuple(int(v * 255) for v in CLIP_MEAN)
    square = []
    for frame in frames:
        canvas = Image.new("RGB", (side, side), colour)
        canvas.paste(Image.fromarray(frame.numpy()), ((side - size[1]) // 2, (side - size[0]) // 2))
        square.append(np.array(canvas))
    want = pillow_resize(torch.from_numpy(np.stack(square)), 84, 84)
    got = preprocess(frames, PreprocessSpec(size=84, crop=(84, 84), mode="pad"))
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_STD, CLIP_MEAN))
    assert_near_pillow((255 * (got * std + mean)).round(), want)


def test_frames_of_the_right_size_are_only_normalised(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("resized")

    monkeypatch.setattr(module.F, "interpolate", fail)
    frames = draw(48, 48)
    want = frames.permute(0, 3, 1, 2).double() / 255 - torch.tensor(CLIP_MEAN).double().view(3, 1, 1)
    want = want / torch.tensor(CLIP_STD).double().view(3, 1, 1)
    for mode in ("stretch", "crop", "pad"):
        got = preprocess(frames, PreprocessSpec(size=48, crop=(48, 48), mode=mode))
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


def test_crop_keeps_the_middle():
    frames = torch.arange(10 * 7, dtype=torch.uint8).view(1, 10, 7, 1).expand(1, 10, 7, 3)
    got = preprocess(frames, PreprocessSpec(size=None, crop=(4, 5), **PLAIN))
    assert got[0, 0].tolist() == frames[0, 3:7, 1:6, 0].float().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_memory_of_the_result(dtype):
    got = preprocess(draw(50, 60), PreprocessSpec(size=32, crop=(32, 32)), dtype=dtype)
    assert got.dtype == dtype and got.is_contiguous()
    full = preprocess(draw(50, 60), PreprocessSpec(size=32, crop=(32, 32)))
    assert torch.equal(got, full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_values_are_those_of_the_formula_bit_for_bit(threads, count, dtype):
    spec, frames = PreprocessSpec(size=120, crop=(120, 118)), draw(90, 140, count)
    scale = (spec.rescale / torch.tensor(spec.std)).view(3, 1, 1)
    shift = (torch.tensor(spec.mean) / torch.tensor(spec.std)).view(3, 1, 1)
    resized = F.interpolate(frames.permute(0, 3, 1, 2), (120, 120), mode="bicubic", antialias=True)
    want = (resized[..., 1:119].float() * scale - shift).to(dtype)
    allowed = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(preprocess(frames, spec, dtype), want)
    finally:
        torch.set_num_threads(allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalisation_for_other_devices_is_the_same(dtype, monkeypatch):
    frames, spec = draw(40, 44), PreprocessSpec(size=None, crop=(40, 40))
    tables = module._scale_and_shift(spec, torch.device("cpu"))
    monkeypatch.setattr(module, "_scale_and_shift", lambda *args: tables)
    monkeypatch.setattr(module, "_move", lambda frame, device: frame.as_subclass(Elsewhere))
    out = torch.empty(2, 3, 40, 40, dtype=dtype)
    for frame, pixels in zip(frames, out):
        module.write_pixels(frame, spec, pixels.as_subclass(Elsewhere))
    assert torch.equal(out, preprocess(frames, spec, dtype))


def test_frames_go_to_a_gpu_through_pinned_memory_without_waiting():
    calls = []

    class Frame:
        device = torch.device("cpu")

        def pin_memory(self):
            calls.append("pin")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device, non_blocking))
            return self

    gpu = torch.device("cuda", 0)
    module._move(Frame(), gpu)
    assert calls == ["pin", (gpu, True)]
    calls.clear()
    module._move(Frame(), torch.device("cpu"))
    assert calls == [(torch.device("cpu"), False)]


def test_the_default_dtype_of_the_process_does_not_matter():
    """Training code sets it, to bfloat16 for one."""
    frames, spec = draw(90, 120), PreprocessSpec(size=56, crop=None, resample="bicubic")
    expected = preprocess(frames, spec)
    for dtype in (torch.bfloat16, torch.float64):
        _scale_and_shift.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(preprocess(frames, spec), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_input_is_left_as_it_was():
    frames = draw(32, 32)
    before = frames.clone()
    preprocess(frames, PreprocessSpec(size=32, crop=None, **PLAIN)).zero_()
    assert torch.equal(frames, before)


def test_no_frames():
    assert preprocess(torch.empty(0, 20, 30, 3, dtype=torch.uint8)).shape == (0, 3, 336, 336)


def test_spec_of_a_processor_config():
    config = {
        "size": {"shortest_edge": 96},
        "crop_size": {"height": 96, "width": 96},
        "resample": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.1, 0.2, 0.3],
        "rescale_factor": 0.5,
    }
    spec = PreprocessSpec.from_processor(config)
    assert spec == PreprocessSpec(96, (96, 96), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "stretch", 0.5, "bilinear")
    assert spec.resized(100, 300) == (96, 96)
    assert PreprocessSpec.from_processor(config, mode="crop").resized(100, 301) == (96, 288)
    assert hash(spec) == hash(PreprocessSpec.from_processor(config))


def test_spec_of_a_processor_that_skips_steps():
    off = {f"do_{step}": False for step in ("resize", "center_crop", "rescale", "normalize")}
    spec = PreprocessSpec.from_processor(off)
    frames = draw(9, 13)
    assert torch.equal(preprocess(frames, spec), frames.permute(0, 3, 1, 2).float())


def test_a_height_and_a_width_are_stretched_to():
    config = {"size": {"height": 20, "width": 30}, "do_center_crop": False}
    assert preprocess(draw(9, 13), PreprocessSpec.from_processor(config, mode="crop")).shape == (2, 3, 20, 30)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "fit"}, "unknown preprocess mode"),
        ({"size": 0}, "size must be"),
        ({"size": 3.5}, "size must be"),
        ({"crop": (0, 4)}, "crop must be"),
        ({"crop": (400, 400)}, "cannot crop"),
        ({"mean": (0.5,)}, "mean must be"),
        ({"std": (1.0, 1.0, 0.0)}, "above 0"),
        ({"std": "abc"}, "std must be"),
        ({"resample": "lanczos"}, "resampling"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(InputError, match=message):
        PreprocessSpec(**fields)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"size": {"longest_edge": 3}}, "cannot read.*size"),
        ({}, "cannot read.*size"),
        (object(), "expected a transformers"),
        ({"size": 8, "crop_size": 8, "resample": 0}, "resample=0"),
    ],
)
def test_bad_processors(processor, message):
    with pytest.raises(InputError, match=message):
        PreprocessSpec.from_processor(processor)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 4, 4, 3),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 0, 4, 3).byte(),
    ],
)
def test_bad_frames(frames):
    with pytest.raises(InputError, match="frames must be uint8"):
        preprocess(frames)


def test_frames_smaller_than_the_crop():
    with pytest.raises(InputError, match="cannot crop 8x8 out of frames of 6x4"):
        preprocess(draw(4, 6), PreprocessSpec(size=None, crop=(8, 8)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    frames = draw(120, 213)
    got = preprocess(frames, PreprocessSpec(size=168, crop=None, **PLAIN), device="cuda")
    assert got.is_cuda
    assert_near_pillow(got.cpu(), pillow_resize(frames, 168, 168))

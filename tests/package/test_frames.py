"""One rule for the number of frames, at every entry point: argument, checkpoint, layout, 50."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_llava import PATCH, PREPROCESSOR, byte_tokenizer, write_checkpoint

from sfllava_fast import SlowFastLlava
from sfllava_fast.cli.loading import checkpoint_defaults
from sfllava_fast.layouts.presets import choose_layout, parse_layout
from sfllava_fast.patch import patch_transformers
from sfllava_fast.serving.settings import VideoSettings

LONG = {"text": {"max_position_embeddings": 1 << 16}}
CASES = [  # the caller's layout, the checkpoint's entry, frames
    (None, None, 50),
    (None, {"frames": 8}, 8),
    (None, {"layout": "pllava"}, 16),
    (None, {"layout": "pllava", "frames": 24}, 24),
    (None, {"layout": "pool:each,stride2,stride2,mean"}, 50),
    ("pllava", None, 16),
    ("pllava", {"layout": "uniform", "frames": 24}, 16),
    ("pool:each,stride2,stride2,mean", {"layout": "uniform", "frames": 24}, 24),
    ("pool:each,stride2,stride2,mean", {"layout": "uniform"}, 50),
]


@pytest.fixture(params=CASES, ids=str)
def case(request, tmp_path):
    layout, entry, frames = request.param
    path = write_checkpoint(tmp_path / "model", extra={"sfllava_fast": entry} if entry else None, **LONG)
    return SimpleNamespace(path=path, layout=layout, entry=entry, frames=frames)


def test_the_engine(case):
    model = SlowFastLlava.from_pretrained(case.path, case.layout)
    assert model.frames == case.frames
    if case.layout:
        assert SlowFastLlava.from_pretrained(case.path).with_layout("pllava").frames == 16


def test_inspect(case):
    assert checkpoint_defaults(str(case.path), case.layout)[1] == case.frames


def test_a_served_model(case):
    if case.layout is None:
        vision = SimpleNamespace(model_type="clip_vision_model", image_size=336, patch_size=14)
        config = SimpleNamespace(vision_config=vision, vision_feature_select_strategy="default")
        assert VideoSettings.from_config(SimpleNamespace(**vars(config), sfllava_fast=case.entry)).frames == case.frames


def test_a_patched_processor(case):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.ProcessorMixin, "_process_videos"):
        pytest.skip("this release's processors are not patched")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(case.path, dtype=torch.float32)
    tokenizer = byte_tokenizer("vicuna")
    tokenizer.pad_token = "</s>"
    image = transformers.CLIPImageProcessorPil(**PREPROCESSOR)
    processor = transformers.LlavaProcessor(
        image, tokenizer, PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    with patch_transformers(model, processor, layout=case.layout):
        video = torch.zeros(60, 30, 40, 3, dtype=torch.uint8)
        pixels = processor(text="<video>", videos=[video], return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape[1] == case.frames


def test_a_name_comes_with_its_frames_and_grid_and_is_no_other_layout():
    named = parse_layout("pllava")
    assert (named.name, named.frames, named.grid) == ("pllava", 16, (24, 24))
    same = parse_layout(str(named))
    assert same == named and same.name is same.frames is same.grid is None
    assert json.dumps(str(named)) == json.dumps(str(same))
    assert choose_layout(named, {"frames": 7})[1] == 16 and choose_layout(same, {"frames": 7})[1] == 7

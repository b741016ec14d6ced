"""The engine obeys a layout: where it pools, the class token, separators, canvases, frames; against stock modules."""

import json
import logging

import pytest
import torch
from test_engine import stock_model
from tiny_engine import QUESTION, Clip
from tiny_llava import GRID

from bench.paired.published import LAYOUTS
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import InputError, LayoutError
from sfllava_fast.layouts.presets import PRESETS, find_preset
from sfllava_fast.layouts.sampling import sample_frames
from sfllava_fast.video.preprocess import PreprocessSpec, preprocess

LONG = {"text": {"max_position_embeddings": 4096}}
EVERY = [*PRESETS, "llava_next_video-bilinear-newline_grid", "videollm_online-interval"]


class Stock:
    """The parts of a checkpoint as transformers runs them, in float64."""

    def __init__(self, path, pictures):
        self.model = stock_model(path).double()
        processor = PreprocessSpec.from_processor(json.loads((path / "preprocessor_config.json").read_text()))
        layer = self.model.config.vision_feature_layer
        with torch.no_grad():
            pixels = preprocess(pictures, processor).double()
            states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        self.hidden = states[layer]  # [T, 1 + N, C]

    def project(self, features):
        with torch.no_grad():
            return self.model.model.multi_modal_projector(features)

    @property
    def newline(self):
        return self.model.model.image_newline.detach()


def by_hand(name, stock):
    """The tokens of a preset, from what was published; the first two were pooled before the projector."""
    layout, grid = LAYOUTS[name], (GRID, GRID)
    if name == "videollm_online":
        return stock.project(layout(stock.hidden, grid, None))
    if name in ("video_chatgpt", "red_villm"):
        return stock.project(layout(stock.hidden[:, 1:], grid, None))
    return layout(stock.project(stock.hidden[:, 1:]), grid, stock.newline[None])


@pytest.mark.parametrize(
    "name",
    [
        "video_chatgpt", "red_villm", "videollm_online", "llava_next_image", "pllava", "uniform", "ig_vlm",
        "llava_next_video-bilinear-newline_grid",
    ],
)  # fmt: skip
def test_video_tokens_are_those_of_stock_modules(checkpoints, name):
    path = checkpoints(next_=True, **LONG)
    clip, preset = Clip(20), find_preset(name)
    model = SlowFastLlava.from_pretrained(path, name)
    session = model.open(clip)
    session.ask(QUESTION, max_new_tokens=2)
    assert session.frames == sample_frames(20, preset.frames)
    pictures = clip.frames(session.frames)
    if name == "ig_vlm":
        lines = [torch.cat([pictures[i], pictures[i + 1]], 1) for i in (0, 2, 4)]
        pictures = torch.cat(lines)[None]
    expected = by_hand(name, Stock(path, pictures))
    tokens = session.video_tokens().double()
    assert tokens.shape == expected.shape == (preset.count_tokens(len(session.frames), (GRID, GRID)), tokens.shape[1])
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).min() > 1e-3, "tokens that are all alike show nothing"


@pytest.mark.parametrize("name", EVERY)
def test_every_preset_answers(checkpoints, name):
    model = SlowFastLlava.from_pretrained(checkpoints(next_=True, **LONG), name)
    answer = model.answer(Clip(8), QUESTION, max_new_tokens=3)
    assert answer.tokens["total"] == sum(count for part, count in answer.tokens.items() if part != "total")
    assert answer.layout == str(model.layout) and len(answer.token_ids) == 3


def test_frames_are_the_presets_unless_given(checkpoints):
    path = checkpoints(**LONG)
    assert SlowFastLlava.from_pretrained(path, "pllava").frames == 16
    assert SlowFastLlava.from_pretrained(path).frames == 50
    assert len(SlowFastLlava.from_pretrained(path, "uniform").open(Clip(20), frames=4).frames) == 4


def test_separators_as_given_and_as_found(checkpoints, caplog):
    path = checkpoints(**LONG)  # LLaVA-1.5 has no newline
    width = SlowFastLlava.from_pretrained(path).checkpoint.model.config.text_config.hidden_size
    vector = torch.arange(float(width))
    layout = "llava_next_video-newline_one"
    session = SlowFastLlava.from_pretrained(path, layout, separators={"newline": vector}).open(Clip(4))
    session.ask(QUESTION, max_new_tokens=1)
    assert torch.equal(session.video_tokens()[-1], vector)
    with caplog.at_level(logging.WARNING, "sfllava_fast"):
        model = SlowFastLlava.from_pretrained(path, layout)
    assert "newline" in caplog.text and "has no vector" in caplog.text
    assert model.pipeline.encoder.separators.shape == (1, width)
    with pytest.raises(InputError, match="must be"):
        SlowFastLlava.from_pretrained(path, layout, separators={"newline": torch.zeros(width + 1)})
    with pytest.raises(InputError, match="no separator comma"):
        SlowFastLlava.from_pretrained(path, layout, separators={"newline": vector, "comma": vector})


def test_what_cannot_be_served_is_said_in_a_line(checkpoints):
    with pytest.raises(LayoutError, match="unknown layout 'plava'"):
        SlowFastLlava.from_pretrained(checkpoints(), "plava")
    with pytest.raises(InputError, match="cannot be commuted"):
        SlowFastLlava.from_pretrained(checkpoints(), "pllava", projector="commuted")


def test_a_layout_that_pools_first_has_nothing_to_commute(checkpoints):
    path, tokens = checkpoints(**LONG), []
    for mode in ("exact", "commuted", "auto"):
        session = SlowFastLlava.from_pretrained(path, "video_chatgpt", projector=mode).open(Clip(8))
        session.ask(QUESTION, max_new_tokens=1)
        tokens.append(session.video_tokens())
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])

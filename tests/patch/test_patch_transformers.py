"""Stock transformers models with videos patched in: against embeddings put together by hand, the engine, themselves."""

import copy
import functools
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import LAYOUT, QUESTION, Clip
from tiny_llava import (
    GRID,
    IMAGE_SIZE,
    PATCH,
    PREPROCESSOR,
    VIDEO_ID,
    byte_tokenizer,
    tiny_config,
    tiny_model,
    tiny_video_config,
)

from sfllava_fast.embedded import sample_answers, sample_questions, sample_video
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import InputError, LayoutError, PatchError, SfllavaError
from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.layouts.sampling import sample_frames
from sfllava_fast.model.shipped import model_dir
from sfllava_fast.model.transformers_release import cache_argument, cache_in
from sfllava_fast.ops.backends import reference
from sfllava_fast.patch import patch_transformers, undo
from sfllava_fast.video.preprocess import PreprocessSpec, preprocess

IMAGE_MODELS = ["Llava", "LlavaNext"]
VIDEO_MODELS = ["LlavaNextVideo", "LlavaOnevision"]
SPEC = PreprocessSpec.from_processor(PREPROCESSOR)
TEXT = "USER: <video>\nWhat is it? ASSISTANT:"
LAYOUTS = [LAYOUT, "slowfast-slow_2frms_concat", "slowfast-fast_3x3", "pool:each,stride2,stride2,mean"]


def make(family, **overrides):
    if family in VIDEO_MODELS:
        return tiny_model(tiny_video_config(family, **overrides))
    return tiny_model(tiny_config(next_=family == "LlavaNext", **overrides))


def processor_of(family, tokenizer="vicuna"):
    """The family's processor; tests have no torchvision, which transformers' own video processors need."""
    need_hooks()
    tokenizer = byte_tokenizer(tokenizer)
    tokenizer.pad_token = "</s>"
    image = transformers.CLIPImageProcessorPil(**PREPROCESSOR)
    stock = getattr(transformers, f"{family}Processor")
    common = {"image_processor": image, "tokenizer": tokenizer, "vision_feature_select_strategy": "default"}
    if family in IMAGE_MODELS:
        return stock(patch_size=PATCH, num_additional_image_tokens=1, **common)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    lenient = type(stock.__name__, (stock,), {"check_argument_for_proper_class": lambda *_: None})
    size = {"num_image_tokens": GRID**2} if family == "LlavaOnevision" else {"patch_size": PATCH}
    return lenient(video_processor=own_video_processor, **size, **common)


def need_hooks():
    if not hasattr(transformers.ProcessorMixin, "_process_videos"):
        pytest.skip("this release's processors are not patched")


def own_video_processor(videos, **_):
    return {"pixel_values_videos": torch.stack([preprocess(video, SPEC) for video in videos])}


def pixels_of(total, frames=9):
    clip = Clip(total)
    return preprocess(clip.frames(sample_frames(clip.total, frames)), SPEC)


def expected_tokens(model, pixels, layout=LAYOUT):
    """The stock tower and projector, and the reference."""
    base, config = model.model, model.config
    states = base.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    patches = states[:, 1:] if config.vision_feature_select_strategy == "default" else states
    features = base.multi_modal_projector(patches.contiguous())  # in 16 bits the bias of a view is rounded apart
    side = math.isqrt(features.shape[1])
    return reference.aggregate(features, parse_layout(layout).plan(len(pixels), (side, side)))


def expected_embeds(model, ids, token, *tokens):
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == token] = torch.cat(tokens)
    return embeds


def ids_with(*counts, token=3, length=None):
    """Prompts with so many placeholders each, padded on the left."""
    rows = [[1, 40, 41, *[token] * count, 50 + row, 60] for row, count in enumerate(counts)]
    length = max(map(len, rows))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return torch.tensor([[0] * (length - len(row)) + row for row in rows]), mask


def count(frames, layout=LAYOUT, side=GRID):
    return parse_layout(layout).count_tokens(frames, (side, side))


def answer(model, **inputs):
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **options)


@pytest.mark.parametrize("family", IMAGE_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_embeddings_made_by_hand(family, layout):
    model, pixels = make(family), pixels_of(20)
    ids, mask = ids_with(count(9, layout))
    with torch.no_grad():
        embeds = expected_embeds(model, ids, 3, expected_tokens(model, pixels, layout))
        expected = model(inputs_embeds=embeds, attention_mask=mask).logits
        patch_transformers(model, layout=layout)
        assert torch.equal(model(ids, attention_mask=mask, pixel_values_videos=pixels[None]).logits, expected)
    by_hand = answer(model, inputs_embeds=embeds, attention_mask=mask)
    ours = answer(model, input_ids=ids, attention_mask=mask, pixel_values_videos=pixels[None])
    assert ours.sequences[0, ids.shape[1] :].tolist() == by_hand.sequences[0].tolist()
    assert all(map(torch.equal, ours.logits, by_hand.logits))
    other = answer(model, input_ids=ids, attention_mask=mask, pixel_values_videos=pixels.flip(0)[None])
    assert not torch.equal(other.logits[0], ours.logits[0]), "a model that does not look at the video shows nothing"


@pytest.mark.parametrize("next_", [False, True], ids=["1.5", "next"])
def test_answers_are_the_engines(load, checkpoints, next_):
    engine, clip = load("vicuna", next_), Clip()
    expected = engine.answer(clip, QUESTION, frames=9, max_new_tokens=24)
    family = IMAGE_MODELS[next_]
    model = getattr(transformers, f"{family}ForConditionalGeneration").from_pretrained(checkpoints("vicuna", next_))
    processor = processor_of(family)
    patch_transformers(model.eval(), processor, layout=LAYOUT, frames=9)
    text = engine.pipeline.prompts.prompt(QUESTION).text.removeprefix("<s>").replace("<image>", "<video>")
    inputs = processor(text=text, videos=clip.pictures.numpy(), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ids.tolist() == expected.token_ids and len(set(expected.token_ids)) > 3


def test_the_embedded_model_answers_rightly():
    need_hooks()
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(model_dir(), dtype=torch.float32).eval()
    processor, engine = transformers.AutoProcessor.from_pretrained(model_dir()), SlowFastLlava.from_pretrained()
    patch_transformers(stock, processor)
    asked = list(zip(sample_questions(), sample_answers()))[:3]
    for question, right in asked:
        text = engine.pipeline.prompts.prompt(question).text.removeprefix("<s>").replace("<image>", "<video>")
        inputs = processor(text=text, videos=str(sample_video()), return_tensors="pt")
        ids = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        assert ids == engine.answer(sample_video(), question, max_new_tokens=8).token_ids
        assert processor.decode(ids, skip_special_tokens=True).strip() == right


def test_videos_of_several_lengths_are_one_launch(monkeypatch):
    model, videos = make("Llava"), [pixels_of(20, 9), pixels_of(7, 5), pixels_of(12, 5)]
    ids, mask = ids_with(count(9) + count(5), count(5))
    calls = spy(monkeypatch, "project_and_aggregate")
    with torch.no_grad():
        tokens = [expected_tokens(model, video) for video in videos]
        expected = model(inputs_embeds=expected_embeds(model, ids, 3, *tokens), attention_mask=mask).logits
        wrong = model(inputs_embeds=expected_embeds(model, ids, 3, *tokens[::-1]), attention_mask=mask).logits
        patch_transformers(model, layout=LAYOUT)
        got = model(ids, attention_mask=mask, pixel_values_videos=videos).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, wrong, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def spy(monkeypatch, name):
    from sfllava_fast.patch import transformers as home

    calls, stock = [], getattr(home, name)
    monkeypatch.setattr(home, name, lambda *args, **kwargs: calls.append(kwargs) or stock(*args, **kwargs))
    return calls


def test_tokens_are_written_where_they_are_read(monkeypatch):
    model, calls = make("Llava"), spy(monkeypatch, "project_and_aggregate")
    patch_transformers(model, layout=LAYOUT)
    ids, _ = ids_with(count(5))
    with torch.no_grad():
        inside = model(ids, pixel_values_videos=pixels_of(9, 5)[None]).logits
    outside = model(ids, pixel_values_videos=pixels_of(9, 5)[None]).logits  # differentiable: not in place
    assert calls[0]["out"] is not None and calls[1]["out"] is None
    assert torch.equal(inside, outside)


def test_parts_of_two_dtypes():
    model, pixels = make("Llava"), pixels_of(9, 5)
    model.model.multi_modal_projector.bfloat16()
    model.model.vision_tower.bfloat16()
    patch_transformers(model, layout=LAYOUT)
    ids, _ = ids_with(count(5))
    with torch.no_grad():
        expected = expected_embeds(model, ids, 3, expected_tokens(model, pixels.bfloat16()).float())
        assert torch.equal(model(ids, pixel_values_videos=pixels[None]).logits, model(inputs_embeds=expected).logits)


def test_it_can_be_trained():
    model, pixels = make("Llava"), pixels_of(9, 5)
    ids, _ = ids_with(count(5))
    embeds = expected_embeds(model, ids, 3, expected_tokens(model, pixels))
    model(inputs_embeds=embeds).logits.square().mean().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    patch_transformers(model, layout=LAYOUT)
    model(ids, pixel_values_videos=pixels[None]).logits.square().mean().backward()
    got = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert got.keys() == expected.keys() and any("vision_tower" in name for name in got)
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_text_and_images_stay_as_they_were(family):
    sizes = {"image_grid_pinpoints": [[24, 48], [48, 24]]} if family == "LlavaNext" else {}
    model = make(family, **sizes)
    images = {"pixel_values": pixels_of(3, 3)}
    if sizes:
        images = {"pixel_values": pixels_of(3, 3)[None], "image_sizes": torch.tensor([[24, 48]])}
    with torch.no_grad():
        features = model.model.get_image_features(**images, return_dict=True).pooler_output
    ids, mask = ids_with(*[len(feature) for feature in features])
    text = {"input_ids": torch.tensor([[1, 40, 41, 50]])}
    before = answer(model, **text), answer(model, input_ids=ids, attention_mask=mask, **images)
    patch_transformers(model, layout=LAYOUT)
    after = answer(model, **text), answer(model, input_ids=ids, attention_mask=mask, **images)
    for stock, ours in zip(before, after):
        assert torch.equal(stock.sequences, ours.sequences) and all(map(torch.equal, stock.logits, ours.logits))


@pytest.mark.parametrize("family", ["Llava", "LlavaNextVideo"])
@pytest.mark.parametrize("search", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}])
def test_beams_and_several_answers(family, search):
    token = VIDEO_ID if family in VIDEO_MODELS else 3
    model, videos = make(family), [pixels_of(20, 4), pixels_of(7, 4), pixels_of(12, 4)]
    ids, mask = ids_with(2 * count(4), count(4), token=token)
    frames = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args, kwargs: frames.append(args), with_kwargs=True)
    search = search | ({} if "num_beams" in search else {"do_sample": True})
    options = search | {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        embeds = expected_embeds(model, ids, token, *[expected_tokens(model, video) for video in videos])
    patch_transformers(model, layout=LAYOUT)
    by_hand = seeded(model, inputs_embeds=embeds, attention_mask=mask, **options)
    frames.clear()
    got = seeded(model, input_ids=ids, attention_mask=mask, pixel_values_videos=torch.stack(videos), **options)
    assert torch.equal(got.sequences[:, ids.shape[1] :], by_hand.sequences)
    for ours, expected in zip(got.scores, by_hand.scores):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert len(frames) == 1, "a prompt that is repeated is encoded once"


def seeded(model, **options):
    torch.manual_seed(0)
    return model.generate(**options)


def test_prompt_lookup_and_no_cache_answer_alike():
    model, pixels = make("Llava"), pixels_of(9, 5)
    patch_transformers(model, layout=LAYOUT)
    ids, mask = ids_with(count(5))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels[None], "max_new_tokens": 8}
    expected = model.generate(**inputs, do_sample=False)
    assert torch.equal(model.generate(**inputs, do_sample=False, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(**inputs, do_sample=False, use_cache=False), expected)


def test_a_cache_goes_on_with_another_video():
    model, videos = make("Llava"), [pixels_of(9, 5), pixels_of(20, 4)]
    patch_transformers(model, layout=LAYOUT)
    ids, _ = ids_with(count(5))
    first = answer(model, input_ids=ids, pixel_values_videos=videos[0][None])
    more = torch.cat([first.sequences, ids_with(count(4))[0]], dim=1)
    together = answer(model, input_ids=more, pixel_values_videos=videos)
    cache = cache_argument(model, cache_in(first))
    second = answer(model, input_ids=more, **cache, pixel_values_videos=videos[1][None])
    assert torch.equal(second.sequences, together.sequences)
    for ours, expected in zip(second.logits, together.logits):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    model, pixels = make("Llava").to(dtype), pixels_of(9, 5)
    ids, _ = ids_with(count(5))
    with torch.no_grad():
        embeds = expected_embeds(model, ids, 3, expected_tokens(model, pixels.to(dtype)))
        expected = model(inputs_embeds=embeds).logits
        patch_transformers(model, layout=LAYOUT)
        got = model(ids, pixel_values_videos=pixels[None]).logits
    assert got.dtype is dtype and torch.equal(got, expected)


def test_autocast():
    model, pixels = make("Llava"), pixels_of(9, 5)
    ids, _ = ids_with(count(5))
    patch_transformers(model, layout=LAYOUT)
    with torch.no_grad():
        exact = model(ids, pixel_values_videos=pixels[None]).logits
        with torch.autocast("cpu", torch.bfloat16):
            embeds = expected_embeds(model, ids, 3, expected_tokens(model, pixels).float())
            expected = model(inputs_embeds=embeds).logits
            got = model(ids, pixel_values_videos=pixels[None]).logits
    assert torch.equal(got, expected) and not torch.equal(got.float(), exact)


def test_compiled():
    model, pixels = make("Llava"), pixels_of(9, 5)
    ids, _ = ids_with(count(5))
    patch_transformers(model, layout=LAYOUT)
    with torch.no_grad():
        expected = model(ids, pixel_values_videos=pixels[None]).logits
        got = torch.compile(model, backend="aot_eager")(ids, pixel_values_videos=pixels[None]).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"ids": [count(5) - 1]}, f"prompt 0 has {count(5) - 1} placeholders and its 1 videos make {count(5)} tokens"),
        ({"ids": [0]}, "1 of 1 videos have no placeholders"),
        ({"ids": [count(5)], "pixel_values": torch.zeros(1, 3, 24, 24)}, "images or videos, not both"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "need input_ids, not inputs_embeds"),
    ],
)
def test_wrong_inputs_are_one_line(inputs, message):
    model = make("Llava")
    patch_transformers(model, layout=LAYOUT)
    if "ids" in inputs:
        inputs = inputs | {"input_ids": ids_with(*inputs.pop("ids"))[0]}
    with pytest.raises(InputError, match=message) as error:
        model(**inputs, pixel_values_videos=pixels_of(9, 5)[None])
    assert "\n" not in str(error.value)


@functools.cache
def patched_pair(family, side, layout):
    vision = {"image_size": side * PATCH}
    model, processor = make(family, vision=vision), processor_of(family)
    if family == "LlavaOnevision":
        processor.num_image_tokens = side**2
    edge, image = side * PATCH, processor.image_processor
    image.size, image.crop_size = {"shortest_edge": edge}, {"height": edge, "width": edge}
    patch_transformers(model, processor, layout=layout, frames=7)
    if family in VIDEO_MODELS:
        spec = PreprocessSpec.from_processor(image)
        processor.video_processor = lambda videos, **_: {
            "pixel_values_videos": torch.stack([preprocess(video, spec) for video in videos])
        }
    return model, processor


@settings(max_examples=40)
@given(
    st.sampled_from(IMAGE_MODELS + VIDEO_MODELS),
    st.integers(1, 12),
    st.sampled_from([4, 6, 7]),
    st.sampled_from(LAYOUTS),
    st.integers(1, 2),
)
def test_placeholders_are_as_many_as_tokens(family, total, side, layout, videos):
    model, processor = patched_pair(family, side, layout)
    clip = Clip(total).pictures
    inputs = processor(text=["<video>" * videos + " What?"], videos=[clip] * videos, return_tensors="pt")
    token = VIDEO_ID if family in VIDEO_MODELS else 3
    frames = min(total, 7) if family in IMAGE_MODELS else total
    assert (inputs["input_ids"] == token).sum() == videos * count(frames, layout, side)
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)  # raises where they differ


def test_the_processor_takes_what_transformers_takes():
    model, processor = make("Llava"), processor_of("Llava")
    patch_transformers(model, processor, layout=LAYOUT, frames=6)
    long, short = Clip(20), Clip(4)
    one = processor(text=TEXT, videos=long.pictures, return_tensors="pt")
    assert torch.equal(one["pixel_values_videos"], pixels_of(20, 6)[None])
    files = processor(text=TEXT, videos=[str(sample_video())], return_tensors="pt")
    assert files["pixel_values_videos"].shape == (1, 6, 3, IMAGE_SIZE, IMAGE_SIZE)
    two = processor(text=[TEXT, TEXT], videos=[long.pictures, short.pictures], padding=True, return_tensors="pt")
    assert [len(video) for video in two["pixel_values_videos"]] == [6, 4]
    assert (two["input_ids"] == 3).sum(1).tolist() == [count(6), count(4)]
    fewer = processor(text=TEXT, videos=long.pictures, num_frames=3, return_tensors="pt")
    assert fewer["pixel_values_videos"].shape[1] == 3
    image = processor(text="<image> What?", images=short.pictures[0].permute(2, 0, 1), return_tensors="pt")
    assert (image["input_ids"] == 3).sum() == GRID**2 and "pixel_values_videos" not in image
    with torch.no_grad():
        model(**two)


def test_chat_templates():
    model, processor = make("Llava"), processor_of("Llava")
    processor.chat_template = (
        "{% for m in messages %}USER: {% for p in m['content'] %}"
        "{{ '<video>\n' if p['type'] == 'video' else p['text'] }}{% endfor %} ASSISTANT:{% endfor %}"
    )
    patch_transformers(model, processor, layout=LAYOUT, frames=6)
    content = [{"type": "video", "path": str(sample_video())}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = processor(text=TEXT, videos=str(sample_video()), return_tensors="pt")
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert torch.equal(inputs["pixel_values_videos"], plain["pixel_values_videos"])


def test_what_is_saved_is_as_before(tmp_path):
    for family in IMAGE_MODELS + VIDEO_MODELS:
        model, processor = make(family), processor_of(family)
        if family in VIDEO_MODELS:
            processor = None  # its video processor is the tests'
        before, after = tmp_path / family / "before", tmp_path / family / "after"
        save(model, processor, before)
        patch_transformers(model, processor, layout=LAYOUT)
        save(model, processor, after)
        names = sorted(path.name for path in before.iterdir())
        assert sorted(path.name for path in after.iterdir()) == names and "config.json" in names
        for name in names:
            assert (after / name).read_bytes() == (before / name).read_bytes(), name
        assert json.loads((after / "config.json").read_text())["architectures"] == [f"{family}ForConditionalGeneration"]
        again = type(model).from_pretrained(after)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def save(model, processor, path):
    model.save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)


@pytest.mark.parametrize("family", IMAGE_MODELS + VIDEO_MODELS)
def test_undo_restores_everything(family):
    model, processor = make(family), processor_of(family)
    owners = [model, *model.modules(), processor]
    before = [dict(vars(owner)) for owner in owners]
    patch = patch_transformers(model, processor, layout=LAYOUT)
    assert [dict(vars(owner)) for owner in owners] != before
    patch.undo()
    assert [dict(vars(owner)) for owner in owners] == before
    patch_transformers(model, processor, layout=LAYOUT)
    patch_transformers(model, processor, layout="slowfast-fast_2x2")  # again: the first is undone
    undo(model)
    assert [dict(vars(owner)) for owner in owners] == before


@pytest.mark.parametrize("family", IMAGE_MODELS + VIDEO_MODELS)
def test_a_class_gives_its_patch_to_every_instance(family):
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    owners = [kind, getattr(transformers, f"{family}Model")]
    if family == "LlavaNextVideo":
        owners.append(type(make(family).model.vision_resampler))
    before = [dict(vars(owner)) for owner in owners]
    token = VIDEO_ID if family in VIDEO_MODELS else 3
    ids, mask = ids_with(count(5), token=token)
    instance, pixels = make(family), pixels_of(9, 5)
    patch_transformers(instance, layout=LAYOUT)
    expected = answer(instance, input_ids=ids, attention_mask=mask, pixel_values_videos=pixels[None])
    with patch_transformers(kind, layout=LAYOUT):
        got = answer(make(family), input_ids=ids, attention_mask=mask, pixel_values_videos=pixels[None])
        assert all(map(torch.equal, got.logits, expected.logits))
    assert [dict(vars(owner)) for owner in owners] == before


def test_patched_again_is_patched_once(monkeypatch):
    model, processor, pixels = make("Llava"), processor_of("Llava"), pixels_of(20, 4)
    patch_transformers(model, processor, layout="slowfast-slow_2frms_concat", frames=9)
    patch_transformers(model, processor, layout=LAYOUT, frames=4)
    inputs, calls = processor(text=TEXT, videos=Clip(20).pictures, return_tensors="pt"), spy(monkeypatch, "_embed")
    assert torch.equal(inputs["pixel_values_videos"], pixels[None])
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 1
    with pytest.raises(PatchError, match="already patched with another model"):
        patch_transformers(make("Llava"), processor, layout=LAYOUT)


def test_a_copy_is_a_model_of_its_own():
    model, pixels = make("Llava"), pixels_of(9, 5)
    patch_transformers(model, layout=LAYOUT)
    ids, _ = ids_with(count(5))
    with torch.no_grad():
        expected = model(ids, pixel_values_videos=pixels[None]).logits
        twin = copy.deepcopy(model)
        for weight in model.parameters():
            weight.zero_()
        assert torch.equal(twin(ids, pixel_values_videos=pixels[None]).logits, expected)
    undo(twin)
    assert "forward" not in vars(twin) and "forward" in vars(model)


def test_hooks_that_replace_forward():
    """As accelerate's do for device_map: before the patch they are kept, after it they have to go first."""
    model, pixels, seen = make("Llava"), pixels_of(9, 5), []
    ids, _ = ids_with(count(5))

    def hook():
        stock = model.forward

        def hooked(*args, **kwargs):
            seen.append(kwargs)
            return stock(*args, **kwargs)

        model.forward = functools.update_wrapper(functools.partial(hooked), stock)

    hook()
    hooked = model.forward
    patch = patch_transformers(model, layout=LAYOUT)
    with torch.no_grad():
        answer(model, input_ids=ids, pixel_values_videos=pixels[None])
    assert seen
    patch.undo()
    assert model.forward is hooked
    patch = patch_transformers(model, layout=LAYOUT)
    inner = model.forward
    hook()
    with torch.no_grad():
        assert answer(model, input_ids=ids, pixel_values_videos=pixels[None]).logits
    with pytest.raises(PatchError, match="forward was replaced again since: undo that first"):
        patch.undo()
    model.forward = inner
    patch.undo()
    assert model.forward is hooked


@pytest.mark.parametrize("family", VIDEO_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_video_variants_take_a_layout(family, layout):
    model, pixels = make(family), pixels_of(9, 5)
    ids, mask = ids_with(count(5, layout), token=VIDEO_ID)
    with torch.no_grad():
        embeds = expected_embeds(model, ids, VIDEO_ID, expected_tokens(model, pixels, layout))
    by_hand = answer(model, inputs_embeds=embeds, attention_mask=mask)
    patch_transformers(model, layout=layout)
    ours = answer(model, input_ids=ids, attention_mask=mask, pixel_values_videos=pixels[None])
    assert all(map(torch.equal, ours.logits, by_hand.logits))


@pytest.mark.parametrize("side", [4, 6, 7])
@pytest.mark.parametrize(
    "family, settings",
    [("LlavaOnevision", {})]
    + [
        ("LlavaNextVideo", {"spatial_pool_mode": mode, "spatial_pool_stride": stride})
        for mode, stride in [("average", 2), ("average", 4), ("max", 2), ("max", 3)]
    ],
)
def test_own_pooling_keeps_its_bits(family, settings, side, monkeypatch):
    model = make(family, vision={"image_size": side * PATCH}, **settings)
    clip = Clip(5)
    spec = PreprocessSpec(side * PATCH, (side * PATCH,) * 2)
    pixels = preprocess(clip.pictures, spec)[None]
    with torch.no_grad():
        expected = model.model.get_video_features(pixels, return_dict=True).pooler_output
        stock, pooled = F.interpolate, []
        monkeypatch.setattr(F, "interpolate", lambda x, **k: pooled.append(x.is_contiguous()) or stock(x, **k))
        calls = spy(monkeypatch, "slowfast_aggregate")
        with patch_transformers(model):
            got = model.model.get_video_features(pixels, return_dict=True).pooler_output
    assert len(calls) == 1 if family == "LlavaNextVideo" else pooled == [False], "the stock pooling ran"
    assert all(map(torch.equal, got, expected)) and len(got) == len(expected)


@pytest.mark.parametrize("settings", [{"spatial_pool_mode": "conv"}, {"spatial_pool_stride": 3}])
def test_pooling_of_other_bits_is_left_alone(settings, caplog):
    model, pixels = make("LlavaNextVideo", **settings), pixels_of(9, 5)[None]
    with torch.no_grad(), caplog.at_level(logging.WARNING, "sfllava_fast"):
        expected = model.model.get_video_features(pixels, return_dict=True).pooler_output
        patch_transformers(model)
        for _ in range(2):
            got = model.model.get_video_features(pixels, return_dict=True).pooler_output
    assert all(map(torch.equal, got, expected))
    assert sum("is not replaced" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    "target, message",
    [
        (torch.nn.Linear(2, 2), "Linear is not supported: give LlavaForConditionalGeneration, "),
        (transformers.LlamaForCausalLM, "LlamaForCausalLM is not supported"),
        (None, f"NoneType is not supported: .*transformers {transformers.__version__} is loaded"),
    ],
)
def test_other_targets_are_refused(target, message):
    with pytest.raises(PatchError, match=message):
        patch_transformers(target)


def test_what_cannot_be_patched_is_left_whole(monkeypatch):
    model, processor = make("Llava"), processor_of("Llava")
    owners = [model, *model.modules(), processor]
    before = [dict(vars(owner)) for owner in owners]

    def refuse(message, *args, **kwargs):
        with pytest.raises(SfllavaError, match=message) as error:
            patch_transformers(*args, **kwargs)
        assert [dict(vars(owner)) for owner in owners] == before and "\n" not in str(error.value)

    refuse("LlavaNextProcessor is not the processor of LlavaFor", model, processor_of("LlavaNext"))
    refuse("nothing of LlavaForConditionalGeneration would be", model, generate=False)
    refuse("unknown projector mode 'fast'", model, projector="fast")
    refuse("frames must be an integer of at least 1", model, frames=0)
    refuse("unknown layout 'none'", model, layout="none")
    with monkeypatch.context() as patched:
        patched.setattr(model.config.vision_config, "patch_size", 8)
        refuse("patch_size is 4 and the model's 8", model, processor)
    with monkeypatch.context() as patched:
        patched.setattr(model.config.vision_config, "model_type", "pixtral")
        refuse("the vision tower pixtral has no fixed grid", model)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.__version__", "4.57.1")
        refuse("LlavaForConditionalGeneration of transformers 4.57.1 is not supported", model)
    with monkeypatch.context() as patched:
        patched.delattr(transformers.ProcessorMixin, "_process_videos")
        refuse(f"transformers {transformers.__version__} has no LlavaProcessor._process_videos", model, processor)
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "prepare_inputs_for_generation", lambda self, input_ids: None)
        refuse("prepare_inputs_for_generation without is_first_iteration", model)


@pytest.mark.parametrize("layout", ["pllava", "video_chatgpt"])
def test_layouts_of_the_field(layout):
    """A name brings its number of frames; where it pools is obeyed."""
    model, processor = make("Llava"), processor_of("Llava")
    patch_transformers(model, processor, layout=layout)
    frames = {"pllava": 16, "video_chatgpt": 20}[layout]
    inputs = processor(text=TEXT, videos=Clip(20).pictures, return_tensors="pt")
    (pixels,) = inputs["pixel_values_videos"]
    assert len(pixels) == frames
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    hidden = states[model.config.vision_feature_layer][:, 1:]
    project = model.model.multi_modal_projector
    if layout == "pllava":
        side = math.isqrt(hidden.shape[1])
        grid = project(hidden).unflatten(1, (side, side)).permute(3, 0, 1, 2)
        expected = F.adaptive_avg_pool3d(grid, (16, 12, 12)).flatten(1).T
    else:
        expected = project(torch.cat([F.pad(hidden.mean(1), (0, 0, 0, 80)), hidden.mean(0)]))
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    places = inputs["input_ids"][0] == model.config.image_token_id
    torch.testing.assert_close(seen[0][0][places], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "layout", "frames", "sampled"),
    [
        (None, None, None, 50),
        ({"layout": "llava_next_image"}, None, None, 32),
        ({"layout": "llava_next_image", "frames": 5}, None, None, 5),
        ({"layout": "llava_next_image", "frames": 5}, "uniform", None, 6),
        ({"layout": "llava_next_image", "frames": 5}, "slowfast-fast_2x2", None, 5),
        ({"layout": "llava_next_image", "frames": 5}, "uniform", 4, 4),
    ],
)
def test_frames_of_the_caller_of_its_layout_then_of_the_config(entry, layout, frames, sampled):
    model, processor = make("Llava"), processor_of("Llava")
    if entry:
        model.config.sfllava_fast = entry
    patch_transformers(model, processor, layout=layout, frames=frames)
    inputs = processor(text=TEXT, videos=Clip(60).pictures, return_tensors="pt")
    assert len(inputs["pixel_values_videos"][0]) == sampled


def test_layouts_that_need_more_than_patches_are_refused():
    with pytest.raises(LayoutError, match="needs separators: use SlowFastLlava"):
        patch_transformers(make("Llava"), layout="llava_video_slowfast")

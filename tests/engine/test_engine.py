"""The engine against the stock transformers model fed by hand, and every wrong question and setting."""

import json
import logging
import math
import subprocess
import sys

import av
import clips
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_engine import LAYOUT, QUESTION, Clip, Unreadable
from tiny_llava import (
    GRID,
    IMAGE_SIZE,
    LAYOUTS,
    SPECIALS,
    word_tokenizer,
    write_checkpoint,
)

from sfllava_fast.batch.answerers import ModelAnswerer
from sfllava_fast.batch.questions import Question
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.engine.stages import STAGES, Stopwatch
from sfllava_fast.errors import (
    BackendError,
    CheckpointError,
    ContextError,
    InputError,
    LayoutError,
    VideoError,
)
from sfllava_fast.layouts.sampling import sample_frames
from sfllava_fast.model.prompts import pick_option
from sfllava_fast.model.shipped import model_dir
from sfllava_fast.video.preprocess import PreprocessSpec, preprocess

LONG = {"text": {"max_position_embeddings": 4096}}


def core(model):
    tower = model.checkpoint.model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def stock_model(path, **options):
    import transformers

    kind = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    if info["missing_keys"]:
        pytest.skip("this release of transformers cannot read the keys of a later one by itself")
    return model.eval()


def stock_features(model, pixels):
    """Patch features as transformers itself selects them, all hidden states kept."""
    layers = model.config.vision_feature_layer
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return torch.cat([states[i][:, 1:] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)


def stock_answer(path, prompt, pictures, slow, new_tokens, fast=2, pool=True, **options):
    """Token ids of stock `generate` on embeddings put together by hand, with the published operators."""
    model = stock_model(path, **options)
    processor = json.loads((path / "preprocessor_config.json").read_text())
    pixels = preprocess(pictures, PreprocessSpec.from_processor(processor), model.dtype, model.device)
    with torch.no_grad():
        features = model.model.multi_modal_projector(stock_features(model, pixels))
        channels = features.transpose(1, 2)
        picked = channels[slow]
        picked = F.max_pool1d(picked, 2) if pool else picked
        grid = F.adaptive_avg_pool2d(channels.unflatten(2, 2 * (math.isqrt(channels.shape[2]),)), fast)
        tokens = [picked.transpose(1, 2).flatten(0, 1), grid.permute(0, 2, 3, 1).flatten(0, 2)]
        sides = [model.get_input_embeddings()(torch.tensor(ids)) for ids in (prompt.before, prompt.after)]
        embeds = torch.cat([sides[0], *tokens, sides[1]])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)[
            0
        ].tolist()


@pytest.mark.parametrize("family", ["vicuna", "mistral", "chatml"])
@pytest.mark.parametrize("next_", [False, True], ids=["1.5", "next"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_the_stock_model(load, checkpoints, family, next_, layout):
    model, clip = load(family, next_, layout), Clip()
    answer = model.answer(clip, QUESTION, frames=9, max_new_tokens=24)
    # linspace(0, 9, 4): every third of nine frames.
    expected = stock_answer(
        checkpoints(family, next_),
        model.pipeline.prompts.prompt(QUESTION),
        clip.frames(sample_frames(20, 9)),
        [0, 3, 6],
        24,
    )
    assert answer.token_ids == expected
    assert len(set(expected)) > 3, "a model that repeats itself shows nothing"
    assert answer.text == model.pipeline.prompts.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_the_papers_layout_on_the_grid_of_real_checkpoints(tmp_path):
    path = write_checkpoint(tmp_path / "real", vision={"image_size": 336, "patch_size": 14}, **LONG)
    settings = json.loads((path / "preprocessor_config.json").read_text()) | {"size": 336, "crop_size": 336}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    model, clip = SlowFastLlava.from_pretrained(path), Clip(50)
    answer = model.answer(clip, QUESTION, max_new_tokens=12)
    assert answer.tokens == {"slow": 2880, "fast": 800, "total": 3680}
    slow = list(range(0, 50, 5))
    assert answer.slow_frames == [answer.frames[i] for i in slow]
    pictures = clip.frames(answer.frames)
    assert answer.token_ids == stock_answer(path, model.pipeline.prompts.prompt(QUESTION), pictures, slow, 12, fast=4)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"attention": "eager"}, {"backend": "torch"}], ids=str)
def test_answers_by_dtype_attention_and_backend(load, checkpoints, options):
    model, clip = load(options=options), Clip()
    answer = model.answer(clip, QUESTION, frames=9, max_new_tokens=12)
    stock = {
        "dtype": torch.bfloat16 if "dtype" in options else torch.float32,
        "attn_implementation": options.get("attention", "sdpa"),
    }
    expected = stock_answer(
        checkpoints(),
        model.pipeline.prompts.prompt(QUESTION),
        clip.frames(sample_frames(20, 9)),
        [0, 3, 6],
        12,
        **stock,
    )
    assert answer.token_ids == expected
    assert answer.dtype == ("bfloat16" if "dtype" in options else "float32")
    assert answer.attention == ("eager (cpu)" if "attention" in options else "sdpa (cpu)")


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3, [-2], [-2, 1], [0, 3, -3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vision_cut_is_bit_equal_to_the_hidden_states(checkpoints, layer, dtype):
    path = checkpoints(vision_feature_layer=layer)
    model = SlowFastLlava.from_pretrained(path, LAYOUT, dtype=dtype)
    pixels = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = stock_features(stock_model(path, dtype=dtype), pixels)
        patches = model.pipeline.encoder.encode(pixels)
    assert torch.equal(patches, expected)
    depth = max(model.checkpoint.depths)
    assert len(core(model).encoder.layers) == depth


def test_unread_layers_and_norm_never_run(load):
    """What the tower keeps is what it runs: the layers up to the one that is read, and no post-norm."""
    tower = core(load())
    assert len(tower.encoder.layers) == 2
    assert not [name for name, _ in tower.named_parameters() if "post_layernorm" in name]


def test_patches_are_a_view_behind_the_cls_token(load):
    model = load()
    patches = model.pipeline.encoder.encode(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert not patches.requires_grad
    assert patches.shape == (2, GRID * GRID, 16)
    assert patches.stride() == ((GRID * GRID + 1) * 16, 16, 1)


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 40])
def test_frames_go_through_the_tower_in_passes(load, frames):
    model = load()
    pixels = torch.randn(frames, 3, IMAGE_SIZE, IMAGE_SIZE)
    seen = []
    handle = model.checkpoint.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    patches = model.pipeline.encoder.encode(pixels)
    handle.remove()
    assert sum(seen) == frames and max(seen) <= model.pipeline.encoder.tower.frames_per_pass
    model.pipeline.encoder.tower.frames_per_pass = frames
    torch.testing.assert_close(patches, model.pipeline.encoder.encode(pixels))


def test_video_tokens_go_straight_into_the_embeddings(load):
    model, clip = load(), Clip(9)
    prompt = model.pipeline.prompts.prompt(QUESTION)
    before = len(prompt.before)
    embeds, rows = model.pipeline.allocate(before, 3 * 18 + 9 * 4)
    embeds.fill_(float("nan"))
    with torch.inference_mode():
        model.pipeline.encoder.write_video(clip, range(9), rows, Stopwatch(model.device))
    assert rows.isfinite().all() and embeds[0, :before].isnan().all()
    assert rows.data_ptr() == embeds[0, before].data_ptr()


def test_an_answer_about_a_damaged_video_tells_what_is_missing(load, tmp_path, caplog):
    model, path = load(), clips.make(tmp_path, "plain.mp4")
    assert model.answer(path, QUESTION, frames=9, max_new_tokens=2).damage is None
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size][40]
    data = bytearray(path.read_bytes())
    data[at : at + 4] = b"\x7f\xff\xff\xff"
    path.write_bytes(data)
    with model.open(path, frames=9) as session:
        answers = [session.ask(QUESTION, max_new_tokens=2) for _ in range(2)]
    told = "59 of its 60 frames can be decoded; where one is missing, the next is taken"
    assert [answer.damage for answer in answers] == [told, told] and answers[0].to_json()["damage"] == told
    assert caplog.messages == [f"{path} is damaged: {told}"]
    said = ModelAnswerer(model, tmp_path, 2)(Question(1, "plain.mp4", QUESTION))
    assert said["damage"] == told


def test_the_answer_tells_how_it_came_about(load, checkpoints):
    answer = load().answer(Clip(), QUESTION, frames=9, max_new_tokens=5)
    record = json.loads(json.dumps(answer.to_json()))
    assert record["answer"] == answer.text and record["video"] == "clip" and record["question"] == QUESTION
    assert record["model"] == str(checkpoints()) and record["layout"] == LAYOUT
    assert record["frames"] == sample_frames(20, 9)
    assert record["slow_frames"] == [record["frames"][i] for i in (0, 3, 6)]
    assert record["tokens"] == {"slow": 54, "fast": 36, "total": 90}
    assert record["attention"] == "sdpa (cpu)" and record["device"] == "cpu" and record["dtype"] == "float32"
    assert record["backend"] not in ("", "auto")
    assert tuple(record["seconds"]) == STAGES and all(seconds > 0 for seconds in record["seconds"].values())
    assert record["ttft"] > record["seconds"]["vision"] + record["seconds"]["prefill"]
    assert record["projector"] == "exact"
    assert record["tokens_per_second"] == pytest.approx((len(record["token_ids"]) - 1) / record["seconds"]["generate"])
    assert record["option"] is None and record["choices"] is None


def test_multiple_choice(load, monkeypatch):
    model = load()
    choices = ["left", "right"]
    answer = model.answer(Clip(), QUESTION, frames=4, max_new_tokens=2, choices=choices)
    assert answer.choices == choices and answer.option == pick_option(answer.text, choices)
    monkeypatch.setattr(model.pipeline.prompts, "text", lambda ids, strip=True: "B) right")
    answer = model.answer(Clip(), QUESTION, frames=4, max_new_tokens=2, choices=choices)
    assert (answer.option, answer.choice) == (1, "right") and answer.to_json()["choice"] == "right"


def test_streamed_pieces_make_up_the_text(load):
    model, pieces = load("chatml"), []
    answer = model.answer(Clip(), QUESTION, frames=9, max_new_tokens=24, on_token=pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == answer.text


def test_generation_stops_at_each_stop(load):
    model = load()
    ids = model.answer(Clip(), QUESTION, frames=9, max_new_tokens=24).token_ids
    stop = ids[6]
    first = ids.index(stop)
    model.pipeline.prompts.stop_ids = frozenset({stop})
    assert model.answer(Clip(), QUESTION, frames=9, max_new_tokens=24).token_ids == ids[: first + 1]
    model.pipeline.prompts.stop_ids, model.pipeline.prompts.stop_text = (
        frozenset(),
        model.pipeline.prompts.tokenizer.decode(ids[2:3]),
    )
    answer = model.answer(Clip(), QUESTION, frames=9, max_new_tokens=24)
    assert model.pipeline.prompts.stop_text in model.pipeline.prompts.tokenizer.decode(answer.token_ids)
    assert model.pipeline.prompts.stop_text not in answer.text and len(answer.token_ids) <= 3


def test_stops_come_from_the_checkpoint_and_the_family(load):
    assert load().pipeline.prompts.stop_ids == {SPECIALS.index("</s>")}
    assert load("chatml").pipeline.prompts.stop_ids == {SPECIALS.index("</s>"), SPECIALS.index("<|im_end|>")}
    assert load(text={"eos_token_id": [2, 9]}).pipeline.prompts.stop_ids == {2, 9}


def test_two_models_answer_in_turn_as_alone(load):
    """No state is shared: answers do not depend on what another model, or the same one, was asked before."""
    first, second = load(), load("mistral", True)
    ask = dict(frames=9, max_new_tokens=8)
    alone = [model.answer(Clip(), QUESTION, **ask).token_ids for model in (first, second)]
    first.answer(Clip(7), "Something else, and longer?", frames=5, max_new_tokens=3)
    assert [model.answer(Clip(), QUESTION, **ask).token_ids for model in (first, second)] == alone


def test_defaults_come_from_the_config(tmp_path):
    path = write_checkpoint(tmp_path / "own", extra={"sfllava_fast": {"layout": LAYOUT, "frames": 6}})
    model = SlowFastLlava.from_pretrained(path)
    assert str(model.layout) == LAYOUT and model.pipeline.prompts.family == "chat_template"
    answer = model.answer(Clip(), QUESTION, max_new_tokens=2)
    assert answer.frames == sample_frames(20, 6)
    assert SlowFastLlava.from_pretrained(path, prompt="vicuna").pipeline.prompts.family == "vicuna"


def test_defaults_of_an_ordinary_checkpoint(checkpoints):
    model = SlowFastLlava.from_pretrained(checkpoints())
    assert model.frames == 50 and str(model.layout) == "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"


@pytest.mark.parametrize("total, frames", [(1, 9), (4, 9), (9, 9)])
def test_short_clips_use_the_frames_they_have(load, total, frames):
    answer = load().answer(Clip(total), QUESTION, frames=frames, max_new_tokens=2)
    assert len(answer.frames) == min(total, frames)
    assert len(answer.slow_frames) == 3 and set(answer.slow_frames) <= set(answer.frames)


def test_context_error_comes_first_and_says_what_to_do(load):
    model = load()
    with pytest.raises(
        ContextError,
        match=r"\A90 video tokens \+ \d+ of prompt \+ 1990 new = \d+ exceed the context of 2048:"
        r" lower frames \(now 9\), max_new_tokens, or take a smaller layout than slowfast-[^\n]*\Z",
    ):
        model.answer(Unreadable(), QUESTION, frames=9, max_new_tokens=1990)
    room = 2048 - 90 - len(model.pipeline.prompts.prompt(QUESTION))
    model.pipeline.check_context(model.pipeline.prompts.prompt(QUESTION), 90, 9, room)
    with pytest.raises(ContextError):
        model.pipeline.check_context(model.pipeline.prompts.prompt(QUESTION), 90, 9, room + 1)


ALL_PATCHES = f"slowfast-slow_64frms_concat-fast_{GRID}x{GRID}"


def test_rope_is_stretched_as_published_beyond_4096(checkpoints):
    path, clip = checkpoints(**LONG), Clip(64)
    model = SlowFastLlava.from_pretrained(path, ALL_PATCHES)
    assert model.checkpoint.context == 8192
    answer = model.answer(clip, QUESTION, frames=64, max_new_tokens=6)
    assert answer.tokens["total"] == 2 * 64 * GRID**2 > 4096
    config = stock_model(path).config
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    expected = stock_answer(
        path,
        model.pipeline.prompts.prompt(QUESTION),
        clip.frames(range(64)),
        list(range(64)),
        6,
        fast=GRID,
        pool=False,
        config=config,
    )
    assert answer.token_ids == expected
    # A longer question leaves no trace in the scale of the next one.
    model.answer(clip, QUESTION * 90, frames=64, max_new_tokens=2)
    assert model.answer(clip, QUESTION, frames=64, max_new_tokens=6).token_ids == expected


def test_rope_scaling_changes_nothing_within_4096(checkpoints):
    path, clip = checkpoints(**LONG), Clip()
    model = SlowFastLlava.from_pretrained(path, LAYOUT)
    answer = model.answer(clip, QUESTION, frames=9, max_new_tokens=12)
    expected = stock_answer(
        path, model.pipeline.prompts.prompt(QUESTION), clip.frames(sample_frames(20, 9)), [0, 3, 6], 12
    )
    assert answer.token_ids == expected


@pytest.mark.parametrize(
    "family, text, context",
    [
        ("vicuna", {"max_position_embeddings": 4096}, 8192),
        ("chatml", {"max_position_embeddings": 4096}, 8192),
        ("mistral", {"max_position_embeddings": 4096}, 4096),
        ("vicuna", {"max_position_embeddings": 1024}, 1024),
        (
            "vicuna",
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            16384,
        ),
    ],
)
def test_context_by_family(checkpoints, family, text, context):
    assert SlowFastLlava.from_pretrained(checkpoints(family, text=text)).checkpoint.context == context


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"question": ""}, InputError, "question is empty"),
        ({"question": "   "}, InputError, "question is empty"),
        ({"question": "is <image> it?"}, InputError, "marks the place of the video"),
        ({"frames": 0}, InputError, "frames must be an integer of at least 1, not 0"),
        ({"frames": 2.5}, InputError, "frames must be an integer"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens must be"),
        ({"choices": ["one"]}, InputError, "choices must be"),
    ],
)
def test_bad_questions_are_refused_before_any_frame_is_decoded(load, arguments, error, match):
    with pytest.raises(error, match=match):
        load().answer(**{"video": Unreadable(), "question": QUESTION, **arguments})


def test_a_folder_of_frames(load, tmp_path):
    clip = Clip(12)
    for i, picture in enumerate(clip.pictures):
        Image.fromarray(picture.numpy()).save(tmp_path / f"frame{i}.png")
    model = load()
    answer = model.answer(tmp_path, QUESTION, frames=9, max_new_tokens=12)
    assert answer.token_ids == model.answer(clip, QUESTION, frames=9, max_new_tokens=12).token_ids
    assert answer.video == str(tmp_path) and answer.frames == sample_frames(12, 9)


def test_an_encoded_video(load, checkpoints, tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=40, height=30, pix_fmt="yuv420p")
        for picture in Clip(30).pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy())))
        container.mux(stream.encode())
    model = load()
    answer = model.answer(str(path), QUESTION, frames=9, max_new_tokens=12)
    with av.open(str(path)) as container:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    pictures = torch.stack([decoded[i] for i in sample_frames(len(decoded), 9)])
    assert answer.token_ids == stock_answer(
        checkpoints(), model.pipeline.prompts.prompt(QUESTION), pictures, [0, 3, 6], 12
    )
    assert answer.video == str(path)


def test_the_embedded_model_answers_as_the_stock_model_does():
    model, clip, question = SlowFastLlava.from_pretrained(), Clip(16), "How many red circles are there?"
    answer = model.answer(clip, question)
    expected = stock_answer(
        model_dir(), model.pipeline.prompts.prompt(question), clip.pictures, [0, 4, 8, 12], 12, dtype=torch.float32
    )
    assert answer.token_ids == expected
    assert answer.tokens["slow"] == 4 * 32 and answer.tokens["fast"] == 16 * 4


def test_bad_videos(load, tmp_path):
    with pytest.raises(VideoError):
        load().answer(tmp_path / "missing.mp4", QUESTION)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError):
        load().answer(str(tmp_path / "empty.mp4"), QUESTION)


def test_bad_choices_of_layout_backend_and_device(checkpoints, monkeypatch):
    path = checkpoints()
    with pytest.raises(LayoutError):
        SlowFastLlava.from_pretrained(path, "slowfast-nonsense")
    with pytest.raises(BackendError):
        SlowFastLlava.from_pretrained(path, backend="abacus")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BackendError, match="device cuda does not exist"):
        SlowFastLlava.from_pretrained(path, device="cuda")
    with pytest.raises(BackendError, match="float16 matrix products are unusably slow on a CPU"):
        SlowFastLlava.from_pretrained(path, dtype=torch.float16)
    with pytest.raises(InputError, match="unknown prompt 'sonnet'"):
        SlowFastLlava.from_pretrained(path, prompt="sonnet")
    with pytest.raises(CheckpointError):
        SlowFastLlava.from_pretrained(path / "nowhere")


def test_an_image_processor_of_another_size(tmp_path):
    path = write_checkpoint(tmp_path / "odd")
    settings = json.loads((path / "preprocessor_config.json").read_text()) | {"size": 32, "crop_size": 28}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="makes 28x28 pictures and the vision tower takes 24x24"):
        SlowFastLlava.from_pretrained(path)


def test_a_layout_that_does_not_fit_the_grid(tmp_path):
    path = write_checkpoint(tmp_path / "one", vision={"image_size": 4})
    settings = json.loads((path / "preprocessor_config.json").read_text()) | {"size": 4, "crop_size": 4}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = SlowFastLlava.from_pretrained(path, "slowfast-slow_3frms_spatial_2d_max_pool-fast_2x2")
    with pytest.raises(LayoutError, match="1x1 grid"):
        model.answer(Unreadable(), QUESTION)


def test_a_tokenizer_of_another_model(tmp_path):
    words = word_tokenizer([f"w{i}" for i in range(300)])
    path = write_checkpoint(tmp_path / "words", tokenizer=words, extra={"sfllava_fast": {"layout": LAYOUT}})
    model = SlowFastLlava.from_pretrained(path)
    with pytest.raises(CheckpointError, match="tokens beyond the model's 262"):
        model.answer(Unreadable(), "w3 w290")


def test_unknown_words_are_named(tmp_path, caplog):
    words = word_tokenizer(["What", "is", "it", "?", "answer", *(f"w{i}" for i in range(250))])
    path = write_checkpoint(tmp_path / "words", tokenizer=words, extra={"sfllava_fast": {"layout": LAYOUT}})
    model = SlowFastLlava.from_pretrained(path)
    with caplog.at_level(logging.WARNING, "sfllava_fast"):
        model.answer(Clip(), "What is it ?", frames=3, max_new_tokens=2)
        assert not caplog.records
        model.answer(Clip(), "What is zebra ?", frames=3, max_new_tokens=2)
    assert [record.getMessage() for record in caplog.records] == [
        "the model does not know these words and cannot use them: zebra"
    ]


def test_importing_the_engine_is_light():
    """transformers is only imported when a checkpoint is loaded."""
    heavy = "('transformers', 'av', 'decord', 'matplotlib')"
    code = f"import sys, sfllava_fast.engine.slowfast_llava; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

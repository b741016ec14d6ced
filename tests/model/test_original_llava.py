"""The original format: the same model, bit for bit, as from Hugging Face's, and one line for what cannot be read."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_config, edit_weights, one_line
from tiny_engine import LAYOUT, QUESTION, Clip
from tiny_llava import GRID, VISION_LAYERS, tiny_config, tiny_model, write_original

from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import CheckpointError
from sfllava_fast.model import original_llava
from sfllava_fast.model.checkpoint import config_grid, load_checkpoint, read_config

TOWERS = (None, "CLIPModel", "CLIPVisionModel", "bare")
FAMILIES = [("vicuna", False), ("vicuna", True), ("mistral", True), ("chatml", True)]


@pytest.fixture
def inside(tmp_path):
    """A checkpoint that brings its vision tower."""
    return write_original(tmp_path / "inside", next_=True)


@pytest.fixture
def outside(tmp_path):
    """A checkpoint whose vision tower is in the directory clip."""
    return write_original(tmp_path / "outside", tower="CLIPModel")


def read_weights(family, next_, **settings):
    """What must be in the model: the written weights but for the vision layers that nothing reads."""
    written = tiny_model(tiny_config(family, next_, **settings)).state_dict()
    cut = (f"encoder.layers.{VISION_LAYERS - 1}.", "post_layernorm")
    return {key: value for key, value in written.items() if "vision" not in key or not any(part in key for part in cut)}


def stages(model):
    """Vision features, video tokens and logits of one picture and some ids."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(1, 3, 24, 24, generator=generator)
    ids = torch.randint(0, 262, (1, 40), generator=generator)
    with torch.inference_mode():
        seen = model.model.vision_tower(pixels).last_hidden_state
        tokens = model.model.multi_modal_projector(seen)
        embeds = torch.cat([tokens, model.get_input_embeddings()(ids)], dim=1)
        return seen, tokens, model(inputs_embeds=embeds).logits


FILES = [(False, 1), (False, 3), (True, 1), (True, 2)]


@pytest.mark.parametrize(
    "family, next_, pickled, shards, tower",
    [
        *(("vicuna", True, *files, tower) for files in FILES for tower in TOWERS),
        *((*family, *files, tower) for family, files, tower in zip(FAMILIES, FILES, TOWERS)),
    ],
)
def test_every_weight_is_the_written_one(tmp_path, family, next_, pickled, shards, tower):
    path = write_original(tmp_path / "model", family, next_, tower, pickled=pickled, shards=shards)
    drawn = torch.random.get_rng_state()
    model = load_checkpoint(path).model
    assert torch.equal(torch.random.get_rng_state(), drawn)
    expected, loaded = read_weights(family, next_), model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert type(model) is type(tiny_model(tiny_config(family, next_)))


@pytest.mark.parametrize("family, next_", FAMILIES)
def test_logits_and_answers_are_those_of_the_other_layouts(checkpoints, tmp_path, family, next_):
    paths = [checkpoints(family, next_, "v4"), checkpoints(family, next_, "v5")]
    for number, tower in enumerate(TOWERS):
        written = write_original(tmp_path / str(number), family, next_, tower, pickled=number % 2, shards=1 + number)
        paths.append(written)
    models = [SlowFastLlava.from_pretrained(path, LAYOUT) for path in paths]
    logits = [stages(model.model) for model in models]
    assert all(torch.equal(a, b) for other in logits[1:] for a, b in zip(logits[0], other))
    answers = [model.answer(Clip(), QUESTION, frames=9, max_new_tokens=24).token_ids for model in models]
    assert answers == answers[:1] * len(answers)
    assert len(set(answers[0])) > 5


def test_sessions_and_fingerprints(tmp_path, inside):
    model = SlowFastLlava.from_pretrained(inside, LAYOUT)
    session = model.open(Clip())
    said = session.ask(QUESTION).text
    again = SlowFastLlava.from_pretrained(inside, LAYOUT)
    assert again.load_session(session.save(tmp_path / "kept")).ask(QUESTION).text == said
    other = SlowFastLlava.from_pretrained(write_original(tmp_path / "other", next_=True, seed=1), LAYOUT)
    assert other.fingerprint() != model.fingerprint() == again.fingerprint()


def test_the_stored_tower_wins_over_the_one_that_the_config_names(tmp_path, inside):
    other = write_original(tmp_path / "other", tower="CLIPModel", seed=1)
    shutil.copy(other / "clip" / "model.safetensors", inside / "clip")
    tower, expected = load_checkpoint(inside).model.model.vision_tower, read_weights("vicuna", True)
    assert all(torch.equal(value, expected[f"model.vision_tower.{key}"]) for key, value in tower.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_are_converted_tensor_by_tensor(tmp_path, outside, dtype):
    edit_weights(outside, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    model = load_checkpoint(outside, dtype="bfloat16").model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    written = load_file(outside / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, written.to(torch.bfloat16))
    # Those that the model computes itself stay exact.
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_context_is_stretched_as_published(tmp_path):
    long = {"text": {"max_position_embeddings": 4096}}
    llama = load_checkpoint(write_original(tmp_path / "llama", **long))
    assert llama.context == 8192
    assert llama.model.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert load_checkpoint(write_original(tmp_path / "mistral", "mistral", **long)).context == 4096


def test_entries_of_the_language_model_are_kept(tmp_path):
    text = {"rope_theta": 5e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 4}
    path = write_original(tmp_path / "model", text=text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_checkpoint(path).model.config.text_config
    assert config.rope_parameters["rope_theta"] == 5e6
    assert (config.rms_norm_eps, config.num_key_value_heads, config.head_dim) == (1e-5, 2, 4)
    edit_config(path, rope_scaling={"type": "linear", "factor": 2.0})
    checkpoint = load_checkpoint(path)
    assert checkpoint.context == 4096
    # Every position counts half.
    frequencies = checkpoint.model.model.language_model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.5 * 5e6**-0.5]))


def test_tied_embeddings(tmp_path):
    tied = {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True}
    path = write_original(tmp_path / "model", tower="bare", **tied)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load_checkpoint(path).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_what_the_vision_tower_brings(inside):
    checkpoint = load_checkpoint(inside)
    assert checkpoint.grid == config_grid(inside, read_config(inside)) == (GRID, GRID)
    assert checkpoint.preprocessor["size"] == checkpoint.preprocessor["crop_size"] == 24
    assert SlowFastLlava(checkpoint).preprocess_spec.size == 24


def test_the_published_tower_needs_no_other_file(inside, monkeypatch):
    """LLaVA-1.6 brings the tower's weights, and its config is known."""
    config, preprocessor = original_llava._PUBLISHED_TOWER_CONFIG, original_llava._PUBLISHED_PREPROCESSOR
    edit_config(inside, mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert config_grid(inside, read_config(inside)) == (24, 24)
    tiny = json.loads((inside / "clip" / "config.json").read_text())["vision_config"]
    monkeypatch.setattr(original_llava, "_PUBLISHED_TOWER_CONFIG", {key: tiny[key] for key in config})
    monkeypatch.setattr(original_llava, "_PUBLISHED_PREPROCESSOR", preprocessor | {"size": 24, "crop_size": 24})
    expected = stages(load_checkpoint(inside).model)
    edit_config(inside, mm_vision_tower="clip")
    assert all(torch.equal(a, b) for a, b in zip(stages(load_checkpoint(inside).model), expected))


def test_the_known_tower_is_clip_vit_large_at_336():
    """As the stock LLaVA-1.5 config has it."""
    from transformers import CLIPVisionConfig, LlavaConfig

    ours = CLIPVisionConfig.from_dict(original_llava._PUBLISHED_TOWER_CONFIG).to_dict()
    stock = LlavaConfig().vision_config.to_dict()
    assert {key: stock[key] for key in ours if key in stock and key != "vocab_size"} == ours


def test_the_published_index_counts_the_same_bytes(tmp_path):
    """liuhaotian/llava-v1.5-7b: 16-bit weights, no vision tower, and every layer's rotary frequencies in 32 bits."""
    import transformers

    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
    }
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(original_llava.stock_config(tmp_path, config))
    stored = sum(weight.numel() * 2 for name, weight in model.named_parameters() if "vision_tower" not in name)
    assert stored + 32 * 64 * 4 == 13_518_798_848


@pytest.mark.parametrize("relative", [False, True])
def test_a_vision_tower_in_another_place(tmp_path, outside, monkeypatch, relative):
    shutil.move(outside / "clip", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    edit_config(outside, mm_vision_tower="elsewhere" if relative else str(tmp_path / "elsewhere"))
    assert load_checkpoint(outside).grid == (GRID, GRID)


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "nobody/clip", "no such place"])
def test_a_vision_tower_that_cannot_be_had(outside, tmp_path, monkeypatch, name):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    edit_config(outside, mm_vision_tower=name)
    with one_line(
        CheckpointError, f"needs the vision tower {name}, which cannot be found: download it and set mm_vision"
    ):
        load_checkpoint(outside)


def test_a_vision_tower_from_the_hub(outside, tmp_path, monkeypatch):
    import huggingface_hub

    shutil.move(outside / "clip", tmp_path / "hub")
    edit_config(outside, mm_vision_tower="somebody/clip")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return tmp_path / "hub"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_checkpoint(outside).grid == (GRID, GRID)
    assert {name for name, _ in asked} == {"somebody/clip"}
    assert not any(pattern.endswith(".bin") for _, patterns in asked for pattern in patterns)
    (tmp_path / "hub" / "model.safetensors").unlink()
    with one_line(CheckpointError, "has no model.safetensors"):
        load_checkpoint(outside)
    assert asked[-1][1] == ["pytorch_model*.bin"]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"mm_projector_type": "linear"}, "has mm_projector_type 'linear', and only 'mlp2x_gelu' can be read"),
        ({"mm_projector_type": None}, "has mm_projector_type None"),
        ({"mm_vision_select_feature": "cls_patch"}, "has mm_vision_select_feature 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "has mm_use_im_start_end True"),
        ({"mm_resampler_type": "perceiver"}, "has mm_resampler_type 'perceiver'"),
        ({"s2": True}, "has s2 True"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
        ({"mm_vision_select_layer": 9}, "vision_feature_layer 9 is outside"),
        ({"mm_vision_select_layer": None}, "config.json is not usable|vision_feature_layer None"),
        ({"hidden_size": "wide"}, "config.json is not usable"),
        ({"architectures": ["LlavaQwenForCausalLM"]}, "holds LlavaQwenForCausalLM: only Llava"),
        ({"mm_patch_merge_type": "flat"}, "holds unknown weights .1: model.image_newline"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized"),
    ],
)
def test_configs_that_cannot_serve(inside, changes, match):
    edit_config(inside, **changes)
    with one_line(CheckpointError, match):
        load_checkpoint(inside)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop("model.mm_projector.2.bias"), "lacks weights .1: model.multi_modal_projector.linear_2.bias"),
        (lambda t: t.pop("model.image_newline"), "lacks weights .1: model.image_newline"),
        (lambda t: t.pop("lm_head.weight"), "lacks weights .1: lm_head.weight"),
        (
            lambda t: t.pop("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
            "lacks weights .1: model.vision_tower.*fc1.weight",
        ),
        (lambda t: t.update({"model.mm_projector.4.weight": torch.zeros(2)}), "holds unknown .*mm_projector.4.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), r"misshapen .*model.norm.weight \[5\], not \[32\]"),
        (lambda t: t.update({"language_model.lm_head.weight": torch.zeros(2)}), "holds unknown .*model.lm_head"),
    ],
)
def test_damaged_weights(inside, change, match):
    edit_weights(inside, change)
    with one_line(CheckpointError, match):
        load_checkpoint(inside)


def test_stored_buffers_are_no_unknown_weights(inside):
    """LLaVA-1.5's index names them."""
    edit_weights(inside, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    frequencies = load_checkpoint(inside).model.model.language_model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, 10000.0 ** (-torch.arange(4) / 4))


@pytest.mark.parametrize("kind", ["CLIPModel", "bare"])
def test_damaged_vision_towers(tmp_path, kind):
    path = write_original(tmp_path / "model", tower=kind)
    file = path / "clip" / "model.safetensors"
    whole = load_file(file)
    lost = next(key for key in whole if "layers.1.mlp.fc1.weight" in key)
    save_file({key: value for key, value in whole.items() if key != lost}, file)
    with one_line(CheckpointError, "lacks weights .1: .*layers.1.mlp.fc1.weight"):
        load_checkpoint(path)
    save_file(whole | {"audio_model.weight": torch.zeros(1)}, file)
    with one_line(CheckpointError, "holds unknown weights .1: audio_model.weight"):
        load_checkpoint(path)
    file.write_bytes(file.read_bytes()[:-9])
    with one_line(CheckpointError, "clip/model.safetensors is corrupt or truncated"):
        load_checkpoint(path)
    file.unlink()
    with one_line(CheckpointError, "clip has no model.safetensors"):
        load_checkpoint(path)


def test_vision_towers_of_another_kind(outside):
    edit_config(outside / "clip", model_type="siglip")
    with one_line(CheckpointError, "holds siglip: use a LLaVA whose mm_vision_tower is a CLIP"):
        load_checkpoint(outside)
    edit_config(outside / "clip", model_type="clip")
    (outside / "clip" / "preprocessor_config.json").unlink()
    with one_line(CheckpointError, "has no preprocessor_config.json: download the vision tower"):
        load_checkpoint(outside)

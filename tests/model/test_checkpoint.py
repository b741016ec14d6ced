"""Loading: every key layout gives the same weights, and everything that is wrong is one clear line."""

import json
import logging
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import (
    GRID,
    LAYOUTS,
    VISION_LAYERS,
    byte_tokenizer,
    tiny_config,
    tiny_model,
    write_checkpoint,
)

from sfllava_fast import SlowFastLlava
from sfllava_fast.errors import BackendError, CheckpointError, InputError, LayoutError, SfllavaError
from sfllava_fast.model import checkpoint as loading
from sfllava_fast.model import files as checkpoint_files
from sfllava_fast.model.checkpoint import choose_device, choose_dtype, feature_depths, load_checkpoint


def one_line(error: type[SfllavaError], match: str):
    return pytest.raises(error, match=rf"\A(?=[^\n]*\Z).*{match}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def edit_weights(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", ["vicuna", "mistral", "chatml"])
@pytest.mark.parametrize("next_", [False, True], ids=["1.5", "next"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_loads_every_weight(tmp_path, family, next_, layout):
    path = write_checkpoint(tmp_path / "model", family, next_, layout)
    loaded = load_checkpoint(path).model
    made = tiny_model(tiny_config(family, next_))
    assert type(loaded) is type(made)
    weights, expected = loaded.state_dict(), made.state_dict()
    read = {k for k in expected if f"layers.{VISION_LAYERS - 1}." not in k or "vision" not in k}
    read -= {k for k in expected if "post_layernorm" in k}
    assert set(weights) == read
    assert all(torch.equal(weights[key], expected[key]) for key in read)


def test_saved_by_the_installed_transformers(tmp_path, whole):
    model = tiny_model(tiny_config())
    model.save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, tmp_path)
    loaded = load_checkpoint(tmp_path).model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_tied_lm_head_is_not_missing(tmp_path):
    path = write_checkpoint(tmp_path / "tied", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    assert not any("lm_head" in key for key in load_file(path / "model.safetensors"))
    model = load_checkpoint(path).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_config_in_the_words_of_transformers_4(copy):
    edit_config(copy, torch_dtype="float16", transformers_version="4.39.0")
    config = json.loads((copy / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k not in ("rope_parameters", "dtype")}
    edit_config(
        copy,
        dtype=None,
        text_config=text | {"rope_theta": 5000.0, "torch_dtype": "float16", "rope_scaling": None},
    )
    loaded = load_checkpoint(copy)
    assert loaded.model.config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert loaded.model.dtype == torch.float32


def test_shards(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {key: f"model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors" for i, key in enumerate(names)}
    for shard in set(index.values()):
        save_file({k: tensors[k] for k in names if index[k] == shard}, copy / shard, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(load_checkpoint(copy).model.lm_head.weight, tensors["language_model.lm_head.weight"])
    (copy / "model-00002-of-00002.safetensors").unlink()
    with one_line(CheckpointError, "has no model-00002-of-00002.safetensors"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    "key",
    [
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_missing_weights_are_loud(copy, key, caplog, capfd):
    edit_weights(copy, lambda tensors: tensors.pop(key))
    with one_line(CheckpointError, f"lacks weights .1: .*{'.'.join(key.split('.')[-2:])}"):
        load_checkpoint(copy)
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err


def test_weights_that_nothing_reads_may_be_absent(copy):
    gone = (f"encoder.layers.{VISION_LAYERS - 1}.", "post_layernorm")

    def drop(tensors):
        for key in [key for key in tensors if "vision_tower" in key and any(part in key for part in gone)]:
            del tensors[key]

    edit_weights(copy, drop)
    assert load_checkpoint(copy).depths == (VISION_LAYERS - 1,)
    edit_config(copy, vision_feature_layer=-1)
    with one_line(CheckpointError, "lacks weights"):
        load_checkpoint(copy)


def test_unknown_weights_are_loud(copy):
    edit_weights(copy, lambda tensors: tensors.update({"language_model.model.adapter.weight": torch.zeros(2)}))
    with one_line(CheckpointError, "holds unknown weights .1: .*adapter.weight"):
        load_checkpoint(copy)


def test_stored_buffers_are_no_unknown_weights(copy):
    edit_weights(
        copy,
        lambda tensors: tensors.update(
            {
                "vision_tower.vision_model.embeddings.position_ids": torch.arange(GRID * GRID + 1)[None],
                "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    assert load_checkpoint(copy).grid == (GRID, GRID)


def test_misshapen_weights_are_loud(copy):
    edit_weights(copy, lambda tensors: tensors.update({"language_model.lm_head.weight": torch.zeros(7, 32)}))
    with one_line(CheckpointError, r"holds misshapen weights .1: .*lm_head.weight \[7, 32\], not \[262, 32\]"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/such/dir", "a b", "", "x/y/z"])
def test_no_such_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cwd").mkdir()
    if name:
        with one_line(CheckpointError, "no checkpoint directory"):
            load_checkpoint(name)
    else:
        with one_line(CheckpointError, "no config.json"):
            load_checkpoint(name)


def test_hub_id_while_offline(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with one_line(CheckpointError, "nobody/nothing is neither a directory nor"):
        load_checkpoint("nobody/nothing")


def test_files_instead_of_directories(copy):
    with one_line(CheckpointError, "is a file"):
        load_checkpoint(copy / "config.json")


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "name, what",
    [
        ("adapter_config.json", "an adapter"),
        ("adapter_model.safetensors", "an adapter"),
        ("mm_projector.bin", "a projector alone"),
        ("non_lora_trainables.bin", "a projector alone"),
    ],
)
def test_a_part_of_a_checkpoint_is_named(copy, name, what, config):
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    if name != "adapter_model.safetensors":
        (copy / "adapter_model.safetensors").unlink()
    (copy / name).touch()
    if not config:
        (copy / "config.json").unlink()
    with one_line(CheckpointError, rf"holds {what} .{name}. and no whole model: merge it into its base model"):
        load_checkpoint(copy)


def test_what_is_in_the_folders_of_a_folder_is_named(copy, tmp_path):
    (tmp_path / "run" / "runs").mkdir(parents=True)
    with one_line(CheckpointError, r"run has no config.json: give the directory"):
        load_checkpoint(tmp_path / "run")
    shutil.copytree(copy, tmp_path / "run" / "checkpoint-20")
    with one_line(CheckpointError, r"run has no config.json, and its folder checkpoint-20 has one: give that folder"):
        load_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-10").mkdir()
    (tmp_path / "run" / "checkpoint-10" / "adapter_model.safetensors").touch()
    with one_line(
        CheckpointError, r"run/checkpoint-10 holds an adapter .adapter_model.safetensors. and no whole model"
    ):
        load_checkpoint(tmp_path / "run")


def test_a_whole_checkpoint_may_keep_the_adapter_that_was_merged(copy):
    (copy / "adapter_config.json").write_text("{}")
    load_checkpoint(copy)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    "name, count", [("num_hidden_layers", 10**6), ("num_hidden_layers", -1), ("num_attention_heads", 0)]
)
def test_a_config_of_shapes_that_no_model_has(copy, part, name, count, monkeypatch):
    monkeypatch.setattr(loading, "stock_config", lambda *_: pytest.fail("it was built"))
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, **{part: config[part] | {name: count}})
    with one_line(CheckpointError, f"{name} {count}, and"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"text_config": {"model_type": "gpt2", "n_layer": 10**6}}, "n_layer 1000000, and"),
        ({"text_config": {"model_type": "bart", "decoder_layers": 10**6}}, "decoder_layers 1000000, and"),
        ({"text_config": {"parts": [[{"layers": 1e9}]]}}, "layers 1000000000.0, and"),
        ({"vision_feature_layer": [-2] * 10**6}, "vision_feature_layer of 1000000 entries, and 1000 are read"),
        ({"vision_feature_layer": [10**6]}, "vision_feature_layer 1000000, and"),
        ({"image_grid_pinpoints": [[0] * 1001]}, "image_grid_pinpoints of 1001 entries"),
    ],
)
def test_layers_by_any_name_and_lists_are_bounded(copy, changes, match, monkeypatch):
    monkeypatch.setattr(loading, "stock_config", lambda *_: pytest.fail("it was made a config"))
    edit_config(copy, **changes)
    with one_line(CheckpointError, match):
        load_checkpoint(copy)


def test_as_many_layers_and_entries_as_any_model_has_are_let_through(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 1000, "vision_feature_layer": [-2] * 1000}))
    checkpoint_files.read_config(tmp_path)


@pytest.mark.parametrize(
    "part, model_type, match",
    [
        ("vision_config", "swin", "the vision tower swin, not clip_vision_model or siglip_vision_model"),
        ("vision_config", "pixtral", "the vision tower pixtral, not"),
        ("text_config", "swin", "the language model swin, which is not a decoder"),
        ("text_config", "resnet", "the language model resnet, which is not a decoder"),
        ("text_config", "llava", "the language model llava, which is not a decoder"),
    ],
)
def test_towers_and_language_models_that_are_not_served_are_not_built(copy, part, model_type, match, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("it was built"))
    edit_config(copy, **{part: {"model_type": model_type, "depths": [10**6], "tie_word_embeddings": False}})
    with one_line(CheckpointError, match):
        load_checkpoint(copy)


def test_layers_are_bounded_by_what_transformers_calls_them(copy, monkeypatch):
    """Under a name that nothing in config.json shows: a default, or an attribute_map's."""
    from transformers import LlamaConfig

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("it was built"))
    monkeypatch.setattr(LlamaConfig, "attribute_map", {"num_hidden_layers": "height"})
    edit_config(copy, text_config={"model_type": "llama", "height": 10**6})
    with one_line(CheckpointError, "num_hidden_layers 1000000, and 0 to 1000 are read"):
        load_checkpoint(copy)


@pytest.mark.parametrize("options", [3, {"frames": 0}, {"frames": "8"}, {"layout": 5}, {"caveat": ["x"]}])
def test_odd_options_of_ours(copy, options):
    edit_config(copy, sfllava_fast=options)
    with one_line(CheckpointError, "its entry sfllava_fast"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    "changes", [{"image_mean": 3}, {"rescale_factor": "x"}, {"resample": []}, {"size": {"shortest_edge": 10**12}}]
)
def test_odd_preprocessing(copy, changes):
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with one_line(CheckpointError, "the image processor's settings cannot be used"):
        SlowFastLlava.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize("vision", [{"patch_size": 0}, {"image_size": 10**9, "patch_size": 1}, {"image_size": "336"}])
def test_a_grid_that_cannot_be(vision, copy):
    with one_line(CheckpointError, "config.json is not usable"):
        loading.config_grid(copy, {"vision_config": vision})


@pytest.mark.parametrize(
    "options, error",
    [
        ({"backend": "gpu"}, BackendError),
        ({"backend": "cuda", "device": "cpu"}, BackendError),
        ({"attention": "fast"}, BackendError),
        ({"attention": "flash_attention_2", "device": "cpu"}, BackendError),
        ({"projector": "fused"}, InputError),
        ({"prompt": "alpaca"}, InputError),
        ({"layout": "slowest"}, LayoutError),
        ({"reduction": "less"}, InputError),
        ({"projector": "commuted", "layout": "pllava"}, InputError),
    ],
)
def test_what_can_be_refused_without_weights_is(options, error, copy, monkeypatch):
    monkeypatch.setattr("sfllava_fast.engine.slowfast_llava.load_checkpoint", lambda *_: pytest.fail("it was loaded"))
    with one_line(error, ""):
        SlowFastLlava.from_pretrained(copy, **options)


@pytest.mark.parametrize(
    "name, match",
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no model.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
    ],
)
def test_missing_files(copy, name, match):
    (copy / name).unlink()
    with one_line(CheckpointError, match):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0\xff" * 20])
def test_damaged_files(copy, name, damage):
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    with one_line(CheckpointError, ""):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"architectures": ["LlavaQwenForCausalLM"]}, "holds LlavaQwenForCausalLM: only LlavaFor"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "names no mm_vision_tower|has mm_projector_type None"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "holds BertModel"),
        ({"architectures": None, "model_type": "llama"}, "holds llama"),
        ({"architectures": None, "model_type": None}, "holds None"),
        ({"vision_feature_layer": 9}, "vision_feature_layer 9 is outside"),
        ({"vision_feature_layer": [-2, -7]}, "outside of a vision tower of 3 layers"),
        ({"vision_feature_select_strategy": "full"}, "leaves 37 vision tokens, not the 6x6 grid"),
        ({"text_config": 5}, "config.json is not usable"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers 1000000, and 0 to 1000 are read"),
        ({"vision_config": {"num_hidden_layers": 2**40}}, "num_hidden_layers 1099511627776, and 0 to 1000 are read"),
        ({"text_config": {"hidden_size": 2**40}}, "config.json"),
        ({"vision_config": {"image_size": 2**40}}, "config.json"),
    ],
)
def test_configs_that_cannot_serve(copy, changes, match):
    edit_config(copy, **changes)
    with one_line(CheckpointError, match):
        load_checkpoint(copy)


def test_processor_config_of_transformers_5(copy):
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": settings, "patch_size": 4}))
    assert load_checkpoint(copy).preprocessor == settings


def test_chat_template_of_the_processor_wins(copy):
    tokenizer = byte_tokenizer()
    assert loading.read_chat_template(copy, tokenizer) == tokenizer.chat_template
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "mine"}))
    assert loading.read_chat_template(copy, tokenizer) == "mine"


@pytest.mark.parametrize(
    "layers, depths", [(-2, (2,)), (-1, (3,)), (3, (3,)), (0, (0,)), (-4, (0,)), ([-2, 1], (2, 1))]
)
def test_feature_depths(layers, depths):
    assert feature_depths(layers, 3) == depths


@pytest.mark.parametrize("layers", [4, -5, [], [0, 4], None, ["-2"]])
def test_feature_depths_out_of_range(layers):
    with one_line(CheckpointError, "outside of a vision tower of 3 layers"):
        feature_depths(layers, 3)


def test_transformers_absent_or_old(whole, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with one_line(BackendError, "transformers 4.57.1 is too old"):
        load_checkpoint(whole)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with one_line(BackendError, "no usable transformers .*transformers>=5.17"):
        load_checkpoint(whole)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "dtype, device, config, expected",
    [
        (None, CPU, {"torch_dtype": "float16"}, torch.float32),
        (None, CUDA, {"torch_dtype": "float16"}, torch.float16),
        (None, CUDA, {"dtype": "bfloat16"}, torch.bfloat16),
        (None, CUDA, {"dtype": "float32"}, torch.bfloat16),
        (None, CUDA, {}, torch.bfloat16),
        ("bf16", CPU, {}, torch.bfloat16),
        (torch.float16, CUDA, {}, torch.float16),
        ("float32", CUDA, {"dtype": "bfloat16"}, torch.float32),
    ],
)
def test_dtypes(dtype, device, config, expected):
    assert choose_dtype(dtype, device, config) is expected


def test_dtypes_that_cannot_serve():
    with one_line(BackendError, "float16 .* on a CPU: use bfloat16 or float32"):
        choose_dtype("fp16", CPU, {})
    with one_line(InputError, "unknown dtype 'int4'"):
        choose_dtype("int4", CPU, {})
    with one_line(InputError, "float64 is not supported"):
        choose_dtype(torch.float64, CPU, {})


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device(None) == choose_device("cpu") == CPU
    with one_line(BackendError, "device cuda does not exist .0 CUDA"):
        choose_device("cuda")
    with one_line(BackendError, "unknown device 'gpu'"):
        choose_device("gpu")
    with one_line(BackendError, "device meta is not supported"):
        choose_device("meta")


def test_loading_leaves_the_loggers_as_they_were(whole):
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers.modeling_utils")
    before = list(logger.filters), hf_logging.is_progress_bar_enabled()
    load_checkpoint(whole)
    assert (list(logger.filters), hf_logging.is_progress_bar_enabled()) == before

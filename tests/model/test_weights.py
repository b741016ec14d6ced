"""Weight files: read in every form that checkpoints have, each tensor once, and one line for what is damaged."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import edit_weights, one_line
from tiny_llava import stored_keys, tiny_config, tiny_model, write_checkpoint, write_tensors

from sfllava_fast.errors import CheckpointError
from sfllava_fast.model import weights
from sfllava_fast.model.checkpoint import load_checkpoint

HEAD = "language_model.lm_head.weight"


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "model")


def rewrite(path, pickled=False, shards=1):
    """Write the checkpoint's weights anew; what they are."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    write_tensors(path, tensors, pickled, shards)
    return tensors


def written_and_loaded(path):
    model = load_checkpoint(path).model.state_dict()
    return {key: value for key, value in tiny_model(tiny_config()).state_dict().items() if key in model}, model


@pytest.mark.parametrize("pickled, shards", [(False, 3), (True, 1), (True, 3)])
def test_every_form_gives_every_weight(path, pickled, shards):
    rewrite(path, pickled, shards)
    written, loaded = written_and_loaded(path)
    assert set(written) == set(loaded)
    assert all(torch.equal(loaded[key], written[key]) for key in written)


def test_pickles_from_before_archives(path):
    tensors = rewrite(path)
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path / "pytorch_model.bin")
    written, loaded = written_and_loaded(path)
    assert all(torch.equal(loaded[key], written[key]) for key in written)


def test_safetensors_are_preferred_to_pickles(path):
    write_tensors(path, {key: torch.zeros(1) for key in load_file(path / "model.safetensors")}, pickled=True)
    written, loaded = written_and_loaded(path)
    assert all(torch.equal(loaded[key], written[key]) for key in written)


def test_the_model_keeps_its_weights_when_the_files_change(path):
    """They are copies, not views of the files."""
    loaded = load_checkpoint(path).model.state_dict()
    before = {key: value.clone() for key, value in loaded.items()}
    file = path / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.seek(8 + int.from_bytes(file.read_bytes()[:8], "little"))
        opened.write(b"\xff" * (file.stat().st_size - opened.tell()))
    assert all(torch.equal(loaded[key], before[key]) for key in before)


def test_code_in_a_pickle_is_not_run(path, tmp_path):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    rewrite(path, pickled=True)
    torch.save({"weight": Code()}, path / "pytorch_model.bin")
    with one_line(CheckpointError, "pytorch_model.bin is corrupt or truncated"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"state": {"a": torch.zeros(1)}}, torch.zeros(2), [torch.zeros(2)]])
def test_pickles_of_something_else(path, content):
    rewrite(path, pickled=True)
    torch.save(content, path / "pytorch_model.bin")
    with one_line(CheckpointError, "pytorch_model.bin is corrupt or truncated"):
        load_checkpoint(path)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_truncated_and_missing_files(path, pickled, shards):
    rewrite(path, pickled, shards)
    file = sorted(path.glob("*.bin" if pickled else "*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1000])
    with one_line(CheckpointError, f"{file.name} is corrupt or truncated"):
        load_checkpoint(path)
    file.unlink()
    with one_line(CheckpointError, f"has no {file.name if shards > 1 else 'model.safetensors'}: download"):
        load_checkpoint(path)


def edit_index(path, change):
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_an_index_only_names_the_files(path):
    """What is in a file counts, whatever the index says of it."""
    rewrite(path, shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    edit_index(path, lambda index: index.update(weight_map={"a": first, "b": second, "c": second}))
    written, loaded = written_and_loaded(path)
    assert all(torch.equal(loaded[key], written[key]) for key in written)
    edit_index(path, lambda index: index.update(weight_map={HEAD: first}))
    with one_line(CheckpointError, "lacks weights"):
        load_checkpoint(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"a": 5}}, {"weight_map": ["a"]}])
def test_indices_of_nothing(path, index):
    rewrite(path, shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with one_line(CheckpointError, "index.json is not an index of weights"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["../{}/model-00001-of-00002.safetensors", "a/../b", "{path}/x.safetensors"])
def test_an_index_that_names_files_elsewhere(name, path):
    rewrite(path, shards=2)
    name = name.format(path.name, path=path)
    edit_index(path, lambda index: index["weight_map"].update({HEAD: name}))
    with one_line(CheckpointError, "which is outside its folder: correct it"):
        load_checkpoint(path)


def test_an_index_of_no_files(path):
    rewrite(path, shards=2)
    edit_index(path, lambda index: index.update(weight_map={}))
    with one_line(CheckpointError, "lacks weights"):
        load_checkpoint(path)


def test_a_weight_in_two_files(path):
    tensors = rewrite(path, shards=2)
    write_tensors(path, tensors)
    (path / "model.safetensors").rename(path / "model-00002-of-00002.safetensors")
    with one_line(CheckpointError, "holds a weight twice .*model-00001.*model-00002"):
        load_checkpoint(path)


@pytest.mark.parametrize("other", ["v5", "v5.0"])
def test_a_weight_under_the_keys_of_two_releases(path, other):
    model = tiny_model(tiny_config())
    key = next(key for key in stored_keys(model, other) if key.endswith("layers.0.mlp.fc1.weight"))
    edit_weights(path, lambda tensors: tensors.update({key: stored_keys(model, other)[key]}))
    with one_line(CheckpointError, "holds a weight twice .model.vision_tower.* vision_tower.vision_model"):
        load_checkpoint(path)


TIED = {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True}


@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_tied_weights_that_are_stored_twice(tmp_path, layout):
    path = write_checkpoint(tmp_path / "tied", layout=layout, **TIED)
    v4 = ("language_model.model.embed_tokens.weight", HEAD)
    names = v4 if layout == "v4" else ("model.language_model.embed_tokens.weight", "lm_head.weight")
    edit_weights(path, lambda tensors: tensors.update({names[1]: tensors[names[0]].clone()}))
    model = load_checkpoint(path).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    edit_weights(path, lambda tensors: tensors[names[1]].add_(1))
    with one_line(CheckpointError, "ties .* to a weight that differs"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 1])
def test_either_of_two_tied_weights_is_enough(tmp_path, kept):
    path = write_checkpoint(tmp_path / "tied", **TIED)
    names = "language_model.model.embed_tokens.weight", HEAD
    embeddings = load_file(path / "model.safetensors")[names[0]]
    edit_weights(path, lambda tensors: tensors.update({names[kept]: tensors.pop(names[0])}))
    model = load_checkpoint(path).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embeddings)


def test_qwen2(tmp_path):
    from transformers import Qwen2Config

    config = tiny_config()
    text = {key: getattr(config.text_config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config.text_config = Qwen2Config(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **text
    )
    path, model = write_checkpoint(tmp_path / "model"), tiny_model(config)
    write_tensors(path, stored_keys(model, "v4"))
    (path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [type(model).__name__]}))
    loaded, written = load_checkpoint(path).model.state_dict(), model.state_dict()
    assert "model.language_model.layers.0.self_attn.q_proj.bias" in loaded
    assert all(torch.equal(loaded[key], written[key]) for key in loaded)


def test_layers_that_the_vision_tower_has_not_are_unknown(path):
    key = "vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight"
    edit_weights(path, lambda tensors: tensors.update({key.format(3): tensors[key.format(2)].clone()}))
    with one_line(CheckpointError, "holds unknown weights .1: .*layers.3.mlp.fc1.weight"):
        load_checkpoint(path)


def test_nothing_is_read_before_everything_fits(path, monkeypatch):
    def read():
        raise AssertionError("one was read")

    tensors = rewrite(path, pickled=True)
    monkeypatch.setattr(weights, "partial", lambda *_: read)
    with one_line(CheckpointError, "cannot be read .one was read"):
        load_checkpoint(path)
    del tensors[HEAD]
    write_tensors(path, tensors, pickled=True)
    with one_line(CheckpointError, "lacks weights"):
        load_checkpoint(path)


def test_what_is_given_no_value_is_loud(path, monkeypatch):
    """A weight starts without memory: one that nobody assigns cannot be right by chance."""
    matched = weights._match

    def forgetful(*args):
        return {name: tensor for name, tensor in matched(*args).items() if name != "lm_head.weight"}

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_match", forgetful)
        with one_line(CheckpointError, "lm_head.weight has no value in transformers [0-9.]+: use another release"):
            load_checkpoint(path)
    monkeypatch.setattr(weights, "_compute_buffers", lambda *_: None)
    with one_line(CheckpointError, "position_ids.*inv_freq.* has no value"):
        load_checkpoint(path)


def test_buffers_are_those_of_a_model_made_on_the_cpu(path):
    loaded, made = load_checkpoint(path).model, tiny_model(tiny_config())
    buffers = dict(made.named_buffers())
    assert buffers and set(buffers) == {name for name, _ in loaded.named_buffers()}
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype


def test_loading_draws_no_random_number(path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.random.get_rng_state(), before)

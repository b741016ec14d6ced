"""Files that were saved, damaged in every way: a line each, and the model as it was. All damage is drawn from seeds."""

import json
import os
import random
import struct
from copy import copy

import numpy as np
import pytest
import torch
from damaged_bytes import damaged
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_engine import LAYOUT, QUESTION, Clip
from tiny_llava import write_checkpoint

from sfllava_fast.batch.journal import Journal
from sfllava_fast.engine.session import Session
from sfllava_fast.engine.slowfast_llava import SlowFastLlava
from sfllava_fast.errors import CheckpointError, InputError, NumberError, SfllavaError
from sfllava_fast.inspect import render
from sfllava_fast.model.shipped import model_dir
from sfllava_fast.reduction.compression import Compression
from sfllava_fast.reduction.mixture.wrapper import MixtureOfDepths
from sfllava_fast.tensor_file import save_tensors
from sfllava_fast.video.preprocess import PreprocessSpec

ASK = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return SlowFastLlava.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("saved") / "model"), LAYOUT)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A session's file."""
    session = model.open(Clip(), frames=9)
    session.ask(QUESTION, **ASK)
    return session.save(tmp_path_factory.mktemp("saved") / "clip.session")


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def refused(use, error=SfllavaError):
    with pytest.raises(error) as raised:
        use()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600, raised.value
    return str(raised.value)


def test_every_kind_of_damage_to_a_session_is_a_line(model, saved, tmp_path):
    data, random_ = saved.read_bytes(), random.Random(0)
    for number in range(150):
        wrong = damaged(data, random_)
        if wrong != data:
            (tmp_path / "damaged").write_bytes(wrong)
            refused(lambda: model.load_session(tmp_path / "damaged"), InputError)


def test_each_bit_of_some_bytes_is_noticed(model, saved, tmp_path):
    data, random_ = saved.read_bytes(), random.Random(1)
    head = struct.unpack("<Q", data[:8])[0] + 8
    for at in [random_.randrange(head) for _ in range(60)] + [random_.randrange(head, len(data)) for _ in range(40)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << random_.randrange(8)
        (tmp_path / "flipped").write_bytes(flipped)
        refused(lambda: model.load_session(tmp_path / "flipped"), InputError)


# What someone may have written with a right checksum: tensors, and what the metadata tells.
def _tensor(change):
    return lambda tensors, facts: tensors.update(change(tensors))


WRONG = {
    "dtype": _tensor(lambda tensors: {"tokens": tensors["tokens"].double()}),
    "half": _tensor(lambda tensors: {"cache.1": tensors["cache.1"].half()}),
    "integers": _tensor(lambda tensors: {"cache.0": tensors["cache.0"].int()}),
    "float8": _tensor(lambda tensors: {"cache.0": tensors["cache.0"].to(torch.float8_e4m3fn)}),
    "shape": _tensor(lambda tensors: {"tokens": tensors["tokens"][1:]}),
    "flat": _tensor(lambda tensors: {"cache.0": tensors["cache.0"].flatten()}),
    "scalar": _tensor(lambda tensors: {"tokens": torch.zeros(())}),
    "nothing": _tensor(lambda tensors: {"tokens": torch.zeros(0, 32)}),
    "more": _tensor(lambda tensors: {"cache.2": tensors["cache.1"]}),
    "other": _tensor(lambda tensors: {"weights": torch.zeros(3)}),
    "lacking": lambda tensors, facts: tensors.pop("cache.1"),
    "no tokens": lambda tensors, facts: tensors.pop("tokens"),
}
FACTS = {
    "frames": [[], None, "0", 3, [0.5], [-1], [True], [2**31], ["0"], [[0]], list(range(4)), list(range(50))],
    "before": [None, "x", [-1], [10**6], [0.5], [None], {}, [2**63], [0]],
    "skipped": [[], [0], [-1, -1], [0, 10**9], [2**40, 0], "00", 3, {"0": 0}, [None, None], [1, 1]],
    "turns": [None, [[]], [["a"]], [["a", "b"]], [["a", 1, None]], [["a", "b", "c", "d"]], ["abc", 3], [["a", "b", 7]]],
    "damage": [None, 5, ["a"]],
    "video": [None, 3, []],
    "model": [None, "", 3],
    "layout": [None, "flat", []],
}


@pytest.mark.parametrize("change", WRONG)
def test_tensors_of_another_kind(model, saved, tmp_path, change):
    tensors, metadata = read(saved)
    WRONG[change](tensors, None)
    path = save_tensors("the session", tmp_path / "wrong", tensors, metadata)
    refused(lambda: model.load_session(path), InputError)


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_another_kind(model, saved, tmp_path, name):
    tensors, metadata = read(saved)
    facts = json.loads(metadata["session"])
    texts = [json.dumps(facts | {name: value}) for value in FACTS[name]]
    texts += [json.dumps({key: value for key, value in facts.items() if key != name})] if name != "skipped" else []
    texts += ["", "null", "[]", "{", "[" * 100_000, "\ud7ff", "NaN"]
    for text in texts:
        path = save_tensors("the session", tmp_path / "wrong", tensors, metadata | {"session": text})
        refused(lambda: model.load_session(path), InputError)
    path = save_tensors("the session", tmp_path / "wrong", tensors, metadata)
    assert model.load_session(path).ask(QUESTION, **ASK).text is not None


def test_a_name_that_is_no_text_and_a_huge_header(model, saved, tmp_path):
    data = saved.read_bytes()
    head = struct.unpack("<Q", data[:8])[0]
    for wrong in (
        data.replace(b'"tokens"', b'"tok\xffns"'),
        data[:8] + b" " * head + data[8 + head :],
        struct.pack("<Q", 1 << 27) + b" " * (1 << 27),
        struct.pack("<Q", 2) + b"{}",
    ):
        (tmp_path / "wrong").write_bytes(wrong)
        refused(lambda: model.load_session(tmp_path / "wrong"), InputError)


@pytest.mark.parametrize(
    "part",
    [
        "vision_tower.encoder.layers.0.mlp.fc1",
        "multi_modal_projector.linear_1",
        "language_model.layers.1.self_attn.o_proj",
    ],
)
def test_a_session_of_a_model_with_one_other_weight_is_refused(model, saved, part):
    weight = model.checkpoint.model.get_submodule(f"model.{part}").weight
    before = weight.clone()
    try:
        with torch.no_grad():
            weight.add_(torch.randn_like(weight) * 1e-3)
        assert "another model" in refused(lambda: model.load_session(saved), InputError)
    finally:
        weight.data.copy_(before)
    model.load_session(saved)


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("encoder", "separators", torch.ones(1, 32)),
        ("encoder", "preprocess_spec", PreprocessSpec(24, (24, 24), mode="crop")),
        ("prompts", "family", "chatml"),
        ("prompts", "asks_openly", True),
    ],
)
def test_a_session_of_other_settings_is_refused(model, saved, part, name, value):
    other = model.with_layout(LAYOUT).pipeline
    other.prompts = copy(other.prompts)
    assert other.fingerprint() == model.pipeline.fingerprint()
    setattr(getattr(other, part), name, value)
    assert "another model" in refused(lambda: Session.load(other, saved), InputError)


def test_a_session_of_another_image_processor_or_prompt_is_refused(tmp_path):
    path, file = write_checkpoint(tmp_path / "model"), tmp_path / "model" / "preprocessor_config.json"
    session = SlowFastLlava.from_pretrained(path, LAYOUT).open(Clip(), frames=9)
    session.ask(QUESTION, **ASK)
    saved = session.save(tmp_path / "clip.session")
    other = SlowFastLlava.from_pretrained(path, LAYOUT, prompt="chatml")
    assert "another model" in refused(lambda: other.load_session(saved), InputError)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    other = SlowFastLlava.from_pretrained(path, LAYOUT)
    assert "another model" in refused(lambda: other.load_session(saved), InputError)


def test_a_session_saved_to_a_link_is_written_to_the_file_it_leads_to(model, saved, tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "session", tmp_path / "link"
    link.symlink_to("folder/session")
    for _ in range(2):  # a link to nothing, and to a file
        assert model.load_session(saved).save(link) == link
        assert link.is_symlink() and model.load_session(target).frames
        target.write_bytes(b"before")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["session"]


def test_a_session_replaces_no_pipe_and_no_folder(model, saved, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    for name in ("pipe", "folder"):
        assert "not a regular file" in refused(lambda: model.load_session(saved).save(tmp_path / name), InputError)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "pipe").is_fifo()


# --- what reductions learned


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    generator = torch.Generator().manual_seed(0)
    weights = {"layers.1.mlp.up_proj.weight": torch.randn(48, 32, generator=generator)}
    scorers = {"scorers.1.linear.weight": torch.ones(1, 32), "scorers.1.linear.bias": torch.zeros(1)}
    settings = {"ratios": {"1": 0.5}, "weighted": False, "per_frame": True, "select_at": None}
    told = {"sfllava_fast.mixture_of_depths": json.dumps(settings)}
    return {
        "mixture": save_tensors("", folder / "mixture.safetensors", weights | scorers, told),
        "compress": Compression(torch.randn(2, 32, generator=generator), weights).save(folder / "tokens.safetensors"),
    }


LOAD = {
    "mixture": lambda model, path: MixtureOfDepths.load(model.checkpoint.model, path).undo(),
    "compress": lambda model, path: Compression.load(path).install(model.checkpoint.model).undo(),
}


@pytest.mark.parametrize("kind", LOAD)
def test_damage_to_what_a_reduction_learned_is_a_line(model, learned, tmp_path, kind):
    LOAD[kind](model, learned[kind])
    data, random_ = learned[kind].read_bytes(), random.Random(2)
    for number in range(100):
        wrong = damaged(data, random_)
        if wrong != data and b"checksum" in wrong:
            (tmp_path / "damaged").write_bytes(wrong)
            refused(lambda: LOAD[kind](model, tmp_path / "damaged"))
    tensors, metadata = read(learned[kind])
    first = "scorers.1.linear.weight" if kind == "mixture" else "tokens"
    for name, value in [
        (first, tensors[first].int()),
        (first, tensors[first] * float("nan")),
        (first, tensors[first][:, 1:]),
        (first, tensors[first].to(torch.complex64)),
        ("layers.1.mlp.up_proj.weight", torch.ones(48, 32, dtype=torch.int8)),
        ("layers.1.mlp.up_proj.weight", torch.ones(48, 31)),
        ("layers.9.mlp.up_proj.weight", torch.ones(48, 32)),
        ("lm_head", torch.ones(())),
    ]:
        wrong = save_tensors("", tmp_path / "wrong", tensors | {name: value}, metadata)
        refused(lambda: LOAD[kind](model, wrong))
    LOAD[kind](model, learned[kind])


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratios": []}, {"ratios": {"x": 0.5}}, {"ratios": {"1": "much"}}, {"ratios": {"1": None}}, {"ratios": {}},
        {"ratios": {"1": 7}}, {"weighted": "yes"}, {"per_frame": None}, {"select_at": "1"}, {"select_at": True},
        {"select_at": [1]}, {"more": 1}, {"ratios": {"99": 0.5}}, {"ratios": {"1": [0.5]}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_mixture_that_cannot_be(model, learned, tmp_path, wrong):
    tensors, metadata = read(learned["mixture"])
    name = "sfllava_fast.mixture_of_depths"
    for text in (json.dumps(json.loads(metadata[name]) | wrong), json.dumps([wrong]), "[" * 100_000):
        path = save_tensors("", tmp_path / "wrong", tensors, {name: text})
        refused(lambda: MixtureOfDepths.load(model.checkpoint.model, path))


def test_files_without_a_checksum_are_read(model, learned, tmp_path):
    """Those of earlier releases, and the embedded model's."""
    for kind, path in learned.items():
        tensors, metadata = read(path)
        del metadata["checksum"]
        save_file(tensors, tmp_path / kind, metadata)
        LOAD[kind](model, tmp_path / kind)
    assert len(Compression.load(model_dir() / "reduction" / "compression.safetensors").tokens)


# --- the output of a batch and its state


def test_damage_to_a_batchs_files_is_a_line_or_passed_over(tmp_path):
    out = tmp_path / "answers.jsonl"
    state = tmp_path / "answers.jsonl.state"
    with Journal(out, {"model": "m"}) as journal:
        journal.begin()
        for number in range(4):
            journal.start(f"q{number}")
            journal.finish({"id": f"q{number}", "video": "v", "ok": number != 2})
    whole, random_ = {path: path.read_bytes() for path in (out, state)}, random.Random(4)
    cases = [(path, damaged(data, random_)) for path, data in whole.items() for _ in range(100)]
    lines = [{"settings": 3}, {"settings": None}, {"id": [1], "attempts": 1}, {"id": 1, "attempts": "x"}, {"id": 1.5}]
    lines += [{"id": {}, "video": "v", "ok": True}, {"id": "q0", "attempts": None}, {"id": "q0", "attempts": -5}, [], 3]
    cases += [(path, json.dumps(line).encode() + b"\n" + whole[path]) for path in whole for line in lines]
    opened = 0
    for path, data in cases:
        for name in whole:
            name.write_bytes(data if name == path else whole[name])
        try:
            with Journal(out, {"model": "m"}) as journal:
                journal.begin()
                journal.start("q0")
                opened += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert opened > 60


# --- NaN


@pytest.mark.parametrize(
    "part",
    [
        "model.vision_tower.embeddings.patch_embedding",
        "model.multi_modal_projector.linear_2",
        "model.language_model.layers.1.mlp.down_proj",
        "lm_head",
    ],
)
def test_weights_that_are_nan_are_an_error(tmp_path, part):
    model = SlowFastLlava.from_pretrained(write_checkpoint(tmp_path / "model"), LAYOUT)
    with torch.no_grad():
        model.checkpoint.model.get_submodule(part).weight.view(-1)[0] = float("nan")
    uses = [lambda: model.answer(Clip(), QUESTION, frames=9), lambda: model.answer_batch([(Clip(), QUESTION)] * 2, 9)]
    for use in uses:
        assert "computed NaN" in refused(use, NumberError)


def test_a_cache_that_is_nan_is_an_error_until_it_is_released(model):
    session = model.open(Clip(), frames=9)
    expected = session.ask(QUESTION, **ASK).token_ids
    with torch.inference_mode():
        session._cache.buffers[1][0, 0, 0, 3, 0] = float("nan")
    turns = session.turns
    for _ in range(2):
        assert "computed NaN" in refused(lambda: session.ask(QUESTION, **ASK), NumberError)
    assert session.turns is turns
    session.release()
    assert session.ask(QUESTION, **ASK).token_ids == expected


def test_nan_behind_the_first_token_is_an_error(model):
    """The embedding of a token that is said, not asked."""
    said = model.answer(Clip(), QUESTION, frames=9, **ASK).token_ids
    weight = model.checkpoint.model.get_input_embeddings().weight
    token = next(token for token in said[:-1] if token not in model.pipeline.prompts.tokenizer(QUESTION).input_ids)
    before = weight[token].clone()
    try:
        with torch.no_grad():
            weight[token] = float("nan")
        refused(lambda: model.answer(Clip(), QUESTION, frames=9, **ASK), NumberError)
    finally:
        weight.data[token] = before


def test_a_checkpoint_whose_weights_are_damaged_is_a_line(tmp_path):
    """The files of a checkpoint are not ours and have no checksum: what cannot be read is a line."""
    path = write_checkpoint(tmp_path / "model")
    data, random_ = (path / "model.safetensors").read_bytes(), random.Random(3)
    head = struct.unpack("<Q", data[:8])[0] + 8
    for number in range(8):
        wrong = bytearray(data)
        wrong[random_.randrange(head)] ^= 1 << random_.randrange(8)
        (path / "model.safetensors").write_bytes(wrong if number % 2 else data[: random_.randrange(len(data))])
        try:
            SlowFastLlava.from_pretrained(path, LAYOUT)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["x.safetensors", "x.html"])
def test_an_output_follows_links_and_is_a_regular_file(name, tmp_path):
    def write(out):
        if name.endswith("html"):
            return render(np.zeros((4, 48, 64, 3), np.uint8), out, LAYOUT, 4, (4, 4))
        return save_tensors("it", out, {"x": torch.ones(2)}, {})

    (tmp_path / "there").mkdir()
    real, link, dangling = tmp_path / "there" / name, tmp_path / name, tmp_path / f"new-{name}"
    real.write_text("old")
    link.symlink_to(real)
    dangling.symlink_to(f"there/made-{name}")
    for out in (link, dangling):
        assert write(out) == out and out.is_symlink()
    assert real.read_bytes() == (tmp_path / "there" / f"made-{name}").read_bytes() != b"old"
    assert len(list((tmp_path / "there").iterdir())) == 2 and len(list(tmp_path.iterdir())) == 3
    os.mkfifo(tmp_path / f"pipe-{name}")
    with pytest.raises(InputError, match="is not a regular file: name another"):
        write(tmp_path / f"pipe-{name}")


def test_what_a_link_beside_an_output_leads_to_is_not_written(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".x.{os.getpid()}.part").symlink_to(victim)
    save_tensors("it", tmp_path / "x", {"x": torch.ones(2)}, {})
    assert victim.read_text() == "mine" and not (tmp_path / "x").is_symlink()

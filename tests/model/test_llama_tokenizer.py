"""Tokenizers that are a SentencePiece model alone, against SentencePiece and the published code's rules around it."""

import io
import json
import re
import sys

import pytest
from test_checkpoint import one_line

from sfllava_fast.errors import BackendError, CheckpointError
from sfllava_fast.model.checkpoint import load_tokenizer
from sfllava_fast.model.prompts import MARKER, TEMPLATES, Turn, build_prompt

SYMBOL = "<|sep|>"  # one that the model itself defines
QUESTIONS = [
    "Which {colour} comes first?",
    "what  is\tthe\n 'x'  \u2014 r\u00e9d or \u65e5\u672c? \U0001f642",
    "</s> is <s>this</s>a token?",
    f"[INST] 12345 ... ASSISTANT: a{SYMBOL} b {SYMBOL}",
]


def train():
    """A BPE model with bytes, as Llama's are."""
    spm = pytest.importorskip("sentencepiece")
    texts = [template.open_ended + template.multiple_choice for template in TEMPLATES.values()] + QUESTIONS * 3
    lines = [line for text in texts * 4 for line in text.split("\n")]
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        max_sentencepiece_length=16,
        user_defined_symbols=[SYMBOL],
        minloglevel=2,
        remove_extra_whitespaces=False,
    )
    return made.getvalue()


@pytest.fixture(scope="module")
def model():
    return train()


def load(path):
    return load_tokenizer(path, {"architectures": ["LlavaLlamaForCausalLM"]})


def write(path, model, **settings):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


class Slow:
    """The published rules: special tokens are cut out first, the rest is SentencePiece's."""

    def __init__(self, path, legacy, added=(), adds_bos=True):
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        self.legacy, self.adds_bos = legacy, adds_bos
        ends = {} if added else {"</s>": 2}
        self.ids = {"<unk>": 0, "<s>": 1} | ends | {text: len(self.model) + i for i, text in enumerate(added)}

    def __call__(self, text):
        cut = re.split("(" + "|".join(map(re.escape, self.ids)) + ")", text)
        ids = [1] * self.adds_bos
        for number, part in enumerate(part for part in cut if part):
            if part in self.ids:
                ids.append(self.ids[part])
            elif self.legacy or number == 0:
                ids += self.model.encode(part)
            else:  # the model's prefix goes to a byte that joins with nothing
                ids += self.model.encode("\n" + part)[2:]
        return ids


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("family", ["vicuna", "mistral", "llama2"])
@pytest.mark.parametrize("choices", [None, ["red", " blue  one"]])
def test_prompts_have_the_published_ids(tmp_path, model, family, legacy, choices):
    path = write(tmp_path / "llama", model, legacy=legacy)
    tokenizer, slow = load(path), Slow(path, legacy)
    for question in QUESTIONS:
        for turns in ([], [Turn(question, "an answer, of two  spaces")]):
            prompt = build_prompt(question, tokenizer, family, choices, turns=turns)
            before, after = prompt.text.split(MARKER)
            assert list(prompt.before) == slow(before)
            assert [1, *prompt.after] == slow(after)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", ["", " what", "  what", "</s>what", "</s> what </s>  is", "what</s>"])
def test_spaces_at_the_edges_are_the_published_ones(tmp_path, model, legacy, text):
    path = write(tmp_path / "llama", model, legacy=legacy)
    assert load(path)(text).input_ids == Slow(path, legacy)(text)


def test_prompts_of_a_tokenizer_with_added_tokens(tmp_path, model):
    """Yi's: no BOS, and tokens behind the model's own."""
    added = ["<|im_start|>", "<|im_end|>"]
    size = len(Slow(write(tmp_path / "yi", model), True).model)
    decoder = {str(size + i): {"content": text, "special": True} for i, text in enumerate(added)}
    end = {"content": added[1], "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    eos = end | {"__type": "AddedToken"}
    path = write(tmp_path / "yi", model, add_bos_token=False, eos_token=eos, added_tokens_decoder=decoder)
    tokenizer, slow = load(path), Slow(path, True, added, adds_bos=False)
    assert tokenizer.eos_token_id == size + 1 and len(tokenizer) == size + 2
    for question in QUESTIONS:
        prompt = build_prompt(question, tokenizer, "chatml")
        before, after = prompt.text.split(MARKER)
        assert (list(prompt.before), list(prompt.after)) == (slow(before), slow(after))
    # The same from the files of older releases.
    (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    (path / "added_tokens.json").write_text(json.dumps({text: size + i for i, text in enumerate(added)}))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
    again = load(path)
    assert build_prompt("who?", again, "chatml") == build_prompt("who?", tokenizer, "chatml")
    assert again.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("legacy", [True, False])
def test_text_comes_back(tmp_path, model, legacy):
    tokenizer = load(write(tmp_path / "llama", model, legacy=legacy))
    for text in QUESTIONS[:2]:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_chat_template_is_kept(tmp_path, model):
    assert load(write(tmp_path / "llama", model, chat_template="{{ x }}")).chat_template == "{{ x }}"


def test_files_that_are_no_tokenizer(tmp_path, model, monkeypatch):
    path = write(tmp_path / "llama", model[: len(model) // 2])
    with one_line(CheckpointError, "the tokenizer cannot be loaded"):
        load(path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.delitem(sys.modules, "sfllava_fast.model.llama_tokenizer")
    with one_line(BackendError, "no sentencepiece to read .*tokenizer.model with: pip install sentencepiece"):
        load(path)

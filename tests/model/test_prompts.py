"""Prompts against the published texts, token ids around the video's place, and the published option rule."""

import sys

import pytest
from tiny_llava import CHAT_TEMPLATES, byte_tokenizer, word_tokenizer

from sfllava_fast.errors import CheckpointError, InputError
from sfllava_fast.model.prompts import (
    FAMILIES,
    MARKER,
    build_prompt,
    encode_prompt,
    format_options,
    pick_option,
    prompt_family,
    same_choice,
    unknown_words,
)

QUESTION = "Which {colour} comes first?"
CHOICES = ["a red one", "a blue one", "neither"]

# As the published evaluation writes them, question and options filled in.
KEY_FRAMES = "The input consists of a sequence of key frames from a video."
CONCISELY = (
    "Answer concisely with overall content and context of the video, highlighting any significant events, "
    "characters, or objects that appear throughout the video."
)
SELECT = "You are a helpful expert in video analysis. Select the best option to answer the question."
LISTED = "Options:\n(A) a red one\n(B) a blue one\n(C) neither\nOnly give the best option."
PUBLISHED = {
    ("vicuna", False): f"USER: <image>\n{KEY_FRAMES} {CONCISELY} Question: {QUESTION} \n"
    "ASSISTANT:\nAnswer: In the video,",
    ("chatml", False): "<|im_start|>system\n Answer the question. <|im_end|>\n"
    f"<|im_start|>user\n <image>\n{KEY_FRAMES} {CONCISELY} Question: {QUESTION} <|im_end|>\n"
    "<|im_start|>assistant\nAnswer: In the video,",
    ("vicuna", True): f"{SELECT} USER: <image>\n{KEY_FRAMES}\nQuestion: {QUESTION}\n{LISTED} \n"
    "ASSISTANT:\nAnswer: Best option:(",
    ("chatml", True): f"<|im_start|>system\n {SELECT} <|im_end|>\n"
    f"<|im_start|>user\n <image>\n{KEY_FRAMES} Question: {QUESTION}\n{LISTED} <|im_end|>\n"
    "<|im_start|>assistant\nAnswer: Best option:(",
    ("mistral", False): f"[INST] <image>\n{QUESTION} [/INST]",
}


@pytest.mark.parametrize("family, multiple", PUBLISHED)
def test_prompts_are_the_published_ones(family, multiple):
    prompt = build_prompt(QUESTION, byte_tokenizer(family), family, CHOICES if multiple else None)
    assert prompt.text == PUBLISHED[family, multiple]


@pytest.mark.parametrize("family", ["vicuna", "mistral", "chatml", "llama2"])
@pytest.mark.parametrize("choices", [None, CHOICES])
def test_ids_are_both_sides_of_the_marker_with_one_bos(family, choices):
    tokenizer = byte_tokenizer(family)
    prompt = build_prompt(QUESTION, tokenizer, family, choices)
    left, right = prompt.text.split(MARKER)
    # The published way: tokenise each side with special tokens, keep the first BOS.
    before, after = tokenizer(left).input_ids, tokenizer(right).input_ids
    adds_bos = family != "chatml"
    assert (before[:1] == [1]) == adds_bos
    assert list(prompt.before) == before
    assert list(prompt.after) == after[adds_bos:]
    assert (prompt.before + prompt.after).count(1) == adds_bos
    assert 3 not in prompt.before + prompt.after
    assert len(prompt) == len(prompt.before) + len(prompt.after)


def test_bos_written_by_a_chat_template_is_not_doubled():
    template = "{{ bos_token }}[INST] <image>\n{{ messages[0]['content'][1]['text'] }} [/INST]"
    prompt = build_prompt("who?", byte_tokenizer(), "chat_template", chat_template=template)
    assert prompt.text == "<s>[INST] <image>\nwho? [/INST]"
    assert prompt.before[0] == 1 and prompt.before.count(1) == 1


def test_marker_at_either_end():
    tokenizer = byte_tokenizer()
    assert encode_prompt("<image>", tokenizer).before == (1,)
    assert encode_prompt("<image>", tokenizer).after == ()
    for text in ("none", "<image> two <image>"):
        with pytest.raises(CheckpointError, match="must contain <image> once"):
            encode_prompt(text, tokenizer)


def test_chat_templates_of_parts_and_of_strings():
    tokenizer = byte_tokenizer()
    parts = build_prompt("who?", tokenizer, "chat_template", chat_template=CHAT_TEMPLATES["vicuna"])
    assert parts.text == "USER: <image>\nwho? ASSISTANT:"
    plain = "{% for m in messages %}{{ 'Q ' + m['content'] + ' A' }}{% endfor %}"
    assert build_prompt("who?", tokenizer, "chat_template", chat_template=plain).text == "Q <image>\nwho? A"
    multiple = build_prompt("who?", tokenizer, "chat_template", ["me", "you"], plain).text
    assert multiple == "Q <image>\nQuestion: who?\nOptions:\n(A) me\n(B) you\nOnly give the best option. A"
    with pytest.raises(CheckpointError, match="chat template does not write <image> once"):
        build_prompt("who?", tokenizer, "chat_template", chat_template="{{ messages[0]['role'] }}")


@pytest.mark.parametrize("question", ["", "  \n", None])
def test_empty_question(question):
    with pytest.raises(InputError, match="question is empty"):
        build_prompt(question, byte_tokenizer(), "vicuna")


def test_question_must_not_hold_the_marker():
    with pytest.raises(InputError, match="marks the place of the video"):
        build_prompt("what is <image>?", byte_tokenizer(), "vicuna")


@pytest.mark.parametrize("choices", [["one"], [], "ab", [str(i) for i in range(27)]])
def test_bad_choices(choices):
    with pytest.raises(InputError, match="2 to 26 texts"):
        format_options(choices)


@pytest.mark.parametrize(
    "text_model, template, vocabulary, expected",
    [
        ("llama", CHAT_TEMPLATES["vicuna"], (), "vicuna"),
        ("llama", CHAT_TEMPLATES["chatml"], (), "chatml"),
        ("llama", "[INST] <<SYS>> {{ x }}", (), "llama2"),
        ("llama", "<|start_header_id|>{{ x }}", (), "chat_template"),
        ("llama", None, ("<|im_start|>",), "chatml"),
        ("llama", None, (), "vicuna"),
        ("mistral", CHAT_TEMPLATES["mistral"], (), "mistral"),
        ("mistral", None, (), "mistral"),
        ("qwen2", CHAT_TEMPLATES["chatml"], (), "chat_template"),
    ],
)
def test_family_rule(text_model, template, vocabulary, expected):
    assert prompt_family(text_model, template, vocabulary) == expected


def test_family_of_checkpoints_made_for_this_package():
    assert prompt_family("llama", CHAT_TEMPLATES["vicuna"], (), {}) == "chat_template"
    assert prompt_family("llama", CHAT_TEMPLATES["vicuna"], (), {"prompt": "vicuna"}) == "vicuna"
    with pytest.raises(InputError, match="unknown prompt 'poem'"):
        prompt_family("llama", None, (), {"prompt": "poem"})
    with pytest.raises(CheckpointError, match="needs a chat template"):
        prompt_family("qwen2", None)
    assert set(FAMILIES) == {"vicuna", "chatml", "mistral", "llama2", "chat_template"}


@pytest.mark.parametrize(
    "text, option",
    [
        ("A) a red one", 0),
        ("b", 1),
        ("C", 2),
        ("(B) a blue one", 1),
        ("The answer is C: neither", 2),
        ("A mistake; the answer is B) a blue one", 1),
        ("B, although A: too", 0),
        ("neither", 2),
        ("A blue one.", 1),
        ("", None),
        ("none of them", None),
        ("D) no such option", None),
        ("(a)", None),
    ],
)
def test_option_rule(text, option):
    assert pick_option(text, CHOICES) == option


def published_option(text):
    """The ladder of the published scorer, written from its description: letters of A to E, whatever the choices are."""
    option = "abcde".find(text[0].lower()) if text[0] in "abcdeABCDE" else None
    if "answer is " in text:
        text = text[text.index("answer is") :]
    for i, letter in enumerate("ABCDE"):
        if f"{letter}:" in text or f"{letter})" in text:
            return i
    return option


ANSWERS = [
    "A",
    "e) x",
    "Z",
    "(D",
    "it is E)",
    "answer is C: d",
    "B and D)",
    "C: no, the answer is (A)",
    "d: x",
    "5",
    "D or E)",
    "a blue one",
    "neither",
    "Because A: x",
]


@pytest.mark.parametrize("choices", [["v", "w", "x", "y", "z"], CHOICES, ["a blue one", "b", "neither", "5"]])
def test_the_published_rule_is_the_published_ladder(choices):
    for text in ANSWERS:
        option = published_option(text)
        wanted = option if option is not None and option < len(choices) else None
        assert pick_option(text, choices, published=True) == wanted, text


def test_our_rule_is_the_published_one_but_for_repeated_choices_and_letters_beyond_the_last():
    five = [f"{letter}one" for letter in "vwxyz"]
    assert [pick_option(text, five) for text in ANSWERS] == [published_option(text) for text in ANSWERS]
    assert pick_option("D or A)", CHOICES) == pick_option("D or A)", CHOICES, published=True) == 0
    assert pick_option("B or E)", CHOICES) == 1 and pick_option("B or E)", CHOICES, published=True) is None


SENTENCES = ["The cat sits on the sofa.", "A dog is running in the yard.", "C opens the box."]


@pytest.mark.parametrize("end", ["", ".", " ", " .", "\n"])
@pytest.mark.parametrize("number", range(3))
def test_a_choice_that_is_repeated_is_that_choice(number, end):
    said = SENTENCES[number].rstrip(".") + end
    assert pick_option(said, SENTENCES) == pick_option(said.upper(), SENTENCES) == number
    assert pick_option(said, [text.rstrip(".") for text in SENTENCES]) == number


def test_short_choices():
    assert [pick_option(text, ["2", "4", "6"]) for text in ("4", "6.", "B", "5", "42")] == [1, 2, 1, None, None]
    assert [pick_option(text, [2, 4, 6]) for text in ("4", "A")] == [1, 0]
    # A letter is a letter, though a choice be the same.
    assert [pick_option(text, ["b", "a"]) for text in ("A", "a.", "B")] == [0, 0, 1]
    assert [pick_option(text, ["x", ""]) for text in ("", " ", ".", "B", "x")] == [None, None, None, 1, 0]
    assert pick_option("same", ["same", "same"]) is None


def test_outer_blanks_are_kept_and_an_empty_choice_is_asked():
    prompt = build_prompt(" why? \n", byte_tokenizer(), "vicuna", ["", " a dog "])
    assert "Question:  why? \n\nOptions:\n(A) \n(B)  a dog \nOnly" in prompt.text
    template = "{% for m in messages %}{{ '<image>' + m['content'] | trim }}{% endfor %}"
    plain = template.replace("'<image>' + ", "")
    assert build_prompt(" why? ", byte_tokenizer(), "chat_template", chat_template=plain).text == "<image>\n why?"


@pytest.mark.parametrize("question, choices", [("a \ud83d", None), ("a", ["b", "\udc00 c"])])
@pytest.mark.parametrize("family", ["vicuna", "chat_template"])
def test_half_a_character_is_the_questions_fault(question, choices, family):
    with pytest.raises(InputError, match=r"contains '\\ud[0-9a-f]+', half of a surrogate pair"):
        build_prompt(question, byte_tokenizer(), family, choices)


@pytest.mark.parametrize(
    "text, option",
    [
        ("a red one", 0),
        ("A Red  one.", 0),
        ("“a blue one”!", 1),
        ("B", None),
        ("a", None),
        ("(A) a red one", None),
        ("a red one or a blue one", None),
        ("", None),
        ("...", None),
        ("7", 3),
        ("-7", None),
        ("twice", None),
    ],
)
def test_a_choice_is_told_by_its_words_alone(text, option):
    assert same_choice(text, [*CHOICES[:2], "...", 7, "twice", "Twice."]) == option


def test_a_chat_template_has_an_end(monkeypatch):
    long = "{% for a in range(300) %}{% for b in range(300) %}{{ b }}{% endfor %}{% endfor %}"
    monkeypatch.setattr("sfllava_fast.model.prompts._SECONDS", 0.01)
    before = sys.gettrace()
    with pytest.raises(CheckpointError, match="the chat template takes more than 0.01 seconds"):
        build_prompt(QUESTION, byte_tokenizer(), "chat_template", None, long)
    assert sys.gettrace() is before
    monkeypatch.undo()
    prompt = build_prompt(QUESTION, byte_tokenizer(), "chat_template", None, CHAT_TEMPLATES["vicuna"])
    assert QUESTION in prompt.text


def test_a_named_family_renders_no_chat_template(monkeypatch):
    monkeypatch.setattr("sfllava_fast.model.prompts._render", lambda *_: pytest.fail("it was rendered"))
    assert QUESTION in build_prompt(QUESTION, byte_tokenizer(), "vicuna", None, "{{ 1 / 0 }}").text


def test_unknown_words():
    tokenizer = word_tokenizer(["what", "is", "?", "red"])
    assert unknown_words("what is red ?", tokenizer) == []
    assert unknown_words("what is the elephant, the red?", tokenizer) == ["the", "elephant", ","]
    assert unknown_words("anything at all", byte_tokenizer()) == []

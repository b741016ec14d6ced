"""Prompts: the published templates, tokens around the video's place, and the published option rule.

Which prompt a checkpoint gets (`prompt_family`), first match:
1. a checkpoint made for this package (its config.json has a "sfllava_fast" entry): what the entry's "prompt"
   names, else its own chat template;
2. a Mistral language model: "mistral", the instruction form that the published code uses for it;
3. a Llama language model: by the markers of its chat template, "chatml" (Yi-34B), "llama2" or "vicuna";
   without a chat template, "chatml" where the tokenizer knows <|im_start|>, else "vicuna";
4. anything else: its own chat template.

"vicuna" and "chatml" are the prompts of SlowFast-LLaVA's published evaluation (open-ended and multiple
choice). It has no multiple-choice prompt for "mistral" and "llama2": they get the same words in their own
frame.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from .time_limit import TooLong, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "<image>"
_SECONDS = 5.0  # for a chat template, which takes a millisecond

_FRAMES = "The input consists of a sequence of key frames from a video."
_CONCISE = (
    "Answer concisely with overall content and context of the video, highlighting any significant events, "
    "characters, or objects that appear throughout the video."
)
_EXPERT = "You are a helpful expert in video analysis. Select the best option to answer the question."
_LLAMA2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
_OPTIONS = "Question: {question}\nOptions:\n{options}Only give the best option."
_PUBLISHED_OPTIONS = 5
_BEGIN_ANSWER = "Answer: In the video,"
_BEGIN_OPTION = "Answer: Best option:("
_CHATML = "<|im_start|>system\n {system} <|im_end|>\n<|im_start|>user\n {user} <|im_end|>\n<|im_start|>assistant\n"
_SYS = f"<<SYS>>\n{_LLAMA2_SYSTEM}\n<</SYS>>\n\n"


@dataclass(frozen=True)
class Template:
    """Prompt texts of a model family: the first turn's, what goes between an answer and the next one, and the text that
    ends answers besides the EOS token."""

    open_ended: str
    multiple_choice: str
    next_turn: str
    stop: str | None = None


def _chatml(system: str, user: str, begin: str) -> str:
    return _CHATML.replace("{system}", system).replace("{user}", user) + begin


TEMPLATES = {
    "vicuna": Template(
        f"USER: {MARKER}\n{_FRAMES} {_CONCISE} Question: {{question}} \nASSISTANT:\n{_BEGIN_ANSWER}",
        f"{_EXPERT} USER: {MARKER}\n{_FRAMES}\n{_OPTIONS} \nASSISTANT:\n{_BEGIN_OPTION}",
        "</s>USER: {words} ASSISTANT:",
    ),
    "chatml": Template(
        _chatml("Answer the question.", f"{MARKER}\n{_FRAMES} {_CONCISE} Question: {{question}}", _BEGIN_ANSWER),
        _chatml(_EXPERT, f"{MARKER}\n{_FRAMES} {_OPTIONS}", _BEGIN_OPTION),
        "<|im_end|>\n<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
    ),
    "mistral": Template(
        f"[INST] {MARKER}\n{{question}} [/INST]",
        f"[INST] {_EXPERT} {MARKER}\n{_FRAMES}\n{_OPTIONS} [/INST] {_BEGIN_OPTION}",
        "</s>[INST] {words} [/INST]",
    ),
    "llama2": Template(
        f"[INST] {_SYS}{MARKER}\n{{question}} [/INST]",
        f"[INST] {_SYS}{_EXPERT} {MARKER}\n{_FRAMES}\n{_OPTIONS} [/INST] {_BEGIN_OPTION}",
        " </s><s>[INST] {words} [/INST]",
    ),
}
FAMILIES = (*TEMPLATES, "chat_template")


@dataclass(frozen=True)
class Turn:
    """A question that was asked, and its answer."""

    question: str
    answer: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids before and after the place of the video, and the text they came from (one MARKER in it)."""

    text: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def prompt_family(
    text_model: str,
    chat_template: str | None,
    vocabulary: Collection[str] = (),
    package_config: dict[str, Any] | None = None,
) -> str:
    """One of FAMILIES, by the rule at the top of this module. Raises CheckpointError where none fits."""
    if package_config is not None:
        return check_family(package_config.get("prompt", "chat_template"))
    if text_model == "mistral":
        return "mistral"
    if text_model == "llama":
        if not chat_template:
            return "chatml" if "<|im_start|>" in vocabulary else "vicuna"
        for family, markers in (
            ("chatml", ("<|im_start|>",)),
            ("llama2", ("[INST]",)),
            ("vicuna", ("USER:", "ASSISTANT:")),
        ):
            if all(marker in chat_template for marker in markers):
                return family
    if not chat_template:
        raise CheckpointError(f"a {text_model} language model needs a chat template and this checkpoint has none")
    return "chat_template"


def check_family(family: str) -> str:
    """The family itself; InputError where there is none of that name."""
    if family not in FAMILIES:
        raise InputError(f"unknown prompt {family!r}: choose one of {', '.join(FAMILIES)}")
    return family


def build_prompt(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    choices: Sequence[str] | None = None,
    chat_template: str | None = None,
    turns: Sequence[Turn] = (),
) -> Prompt:
    """The prompt of a question in a family's form, tokenised around the video's place.

    chat_template: used by the family "chat_template"; None takes the tokenizer's own. turns: earlier ones of the same
    conversation, which come between the video and the question. Blanks around question and choices are kept, as
    published.
    Raises InputError for an empty question, one that holds MARKER or half of a character, or choices that are not 2 to
    26 texts.
    """
    check_question(question, choices)
    asked = [*((turn.question, turn.choices) for turn in turns), (question, choices)]
    if any(MARKER in part for text, options in asked for part in (text, *map(str, options or ()))):
        raise InputError(f"the question holds {MARKER}, which marks the place of the video: leave it out")
    answers = [turn.answer for turn in turns]
    if family == "chat_template":
        text = _render(tokenizer, chat_template, [user_words(*turn) for turn in asked], answers)
    else:
        template, (first, options) = TEMPLATES[family], asked[0]
        words = template.open_ended if options is None else template.multiple_choice
        text = words.format(question=first, options=options and format_options(options))
        for answer, turn in zip(answers, asked[1:]):
            gap = "" if text.endswith(("\n", "(")) else " "
            text += gap + answer + template.next_turn.format(words=user_words(*turn))
    return encode_prompt(text, tokenizer)


def check_question(question: object, choices: Sequence[Any] | None = None) -> None:
    """InputError for a question without words, and for half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(question, str) or not question.strip():
        raise InputError("the question is empty: ask something about the video")
    for text in (question, *map(str, choices or ())):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise InputError(f"the question holds {half}, half of a surrogate pair: write all of it") from None


def user_words(question: str, choices: Sequence[str] | None) -> str:
    """What a user's turn says; InputError for choices that are not 2 to 26 texts."""
    return question if choices is None else _OPTIONS.format(question=question, options=format_options(choices))


def format_options(choices: Sequence[str]) -> str:
    """The choices as published, a line each: "(A) first", an empty one as well."""
    if isinstance(choices, str):
        raise InputError(f"choices must be a list of 2 to 26 texts, not the text {choices!r}")
    texts = [str(choice) for choice in choices]
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise InputError(f"choices must be 2 to 26 texts, not {len(texts)}")
    return "".join(f"({letter}) {text}\n" for letter, text in zip(string.ascii_uppercase, texts))


def pick_option(text: str, choices: Sequence[Any], published: bool = False) -> int | None:
    """Index of the choice that a model's text names; None where it names none.

    By the published rule the first character names an option if it is a letter of A to E (of more letters where there
    are more choices), overruled by the first option whose letter stands before ":" or ")", searched from "answer is" on
    where the text says so. A letter beyond the last choice names none.

    Ours differs in two points: only letters of the choices count, and a text that repeats one choice alone is that
    choice, whatever its letters (`same_choice`).
    """
    text = text.strip()
    letters = string.ascii_uppercase[: max(len(choices), _PUBLISHED_OPTIONS) if published else len(choices)]
    first = letters.find(text[:1].upper()) if text else -1
    is_letter = first >= 0 and len(_bare(text)) == 1
    if not published and not is_letter and (same := same_choice(text, choices)) is not None:
        return same
    rest = text[text.index("answer is") :] if "answer is " in text else text
    marked = (i for i, letter in enumerate(letters) if re.search(f"{letter}[:)]", rest))
    option = next(marked, first)
    return option if 0 <= option < len(choices) else None


def same_choice(text: str, choices: Sequence[Any]) -> int | None:
    """Index of the one choice that a text is, but for case, blanks and outer punctuation; None where it is none, or
    several.

    For a model whose prompt holds no choices: the letters of its words name none.
    """
    said = _bare(text)
    same = [number for number, choice in enumerate(choices) if said and _bare(str(choice)) == said]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`“”‘’«»()[]")  # noqa: RUF001  # quotes of any language


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Tokenise the two sides of MARKER apart, as published, with one BOS where the tokenizer adds any."""
    if text.count(MARKER) != 1:
        raise CheckpointError(f"the prompt must hold {MARKER} once, not {text.count(MARKER)} times: {text[:80]!r}")
    before, after = text.split(MARKER)
    ids = [tokenizer(side, add_special_tokens=False).input_ids if side else [] for side in (before, after)]
    bos = tokenizer.bos_token_id
    # A chat template may have written BOS itself.
    if bos is not None and tokenizer("a").input_ids[:1] == [bos] and ids[0][:1] != [bos]:
        ids[0] = [bos, *ids[0]]
    return Prompt(text, tuple(ids[0]), tuple(ids[1]))


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the text that the tokenizer cannot spell, in order; none where it has no unknown token."""
    unk = tokenizer.unk_token_id
    if unk is None or unk not in tokenizer(text, add_special_tokens=False).input_ids:
        return []
    words = dict.fromkeys(re.findall(r"[^\W_]+|[^\w\s]", text))
    return [word for word in words if unk in tokenizer(word, add_special_tokens=False).input_ids]


def _render(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, words: Sequence[str], answers: Sequence[str]
) -> str:
    # Templates of image models take a list of parts; plain text ones take a string.
    for parts in (True, False):
        try:
            with time_limit(_SECONDS):
                text = tokenizer.apply_chat_template(
                    _messages(words, answers, parts),
                    chat_template=chat_template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
        except TooLong:
            raise CheckpointError(
                f"the chat template is not done after {_SECONDS:g} seconds: correct it, or choose another prompt"
            ) from None
        except Exception:  # whatever a template raises on content it does not know
            continue
        needed = [part.strip() for part in (*words, *answers)]
        if isinstance(text, str) and text.count(MARKER) == 1 and all(part in text for part in needed):
            return text
    raise CheckpointError(f"the chat template does not write {MARKER} once and the question: choose another prompt")


def _messages(words: Sequence[str], answers: Sequence[str], parts: bool) -> list[dict[str, Any]]:
    """The turns so far and the question, the video in the first."""
    messages = []
    for turn, said in enumerate(words):
        content: Any = [{"type": "text", "text": said}] if parts else said
        if turn == 0:
            content = [{"type": "image"}, *content] if parts else f"{MARKER}\n{said}"
        messages.append({"role": "user", "content": content})
        if turn < len(answers):
            answer = [{"type": "text", "text": answers[turn]}] if parts else answers[turn]
            messages.append({"role": "assistant", "content": answer})
    return messages

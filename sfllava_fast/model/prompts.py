"""Prompts: the published templates, the tokens around the video, and the published option rule.

The prompt of a checkpoint (`prompt_family`) is the first match of:

1. Its config.json has a "sfllava_fast" entry: the entry's "prompt", else the checkpoint's chat template.
2. A Mistral language model: "mistral", the instruction form of the published code.
3. A Llama language model: by the markers in its chat template "chatml" (Yi-34B), "llama2" or "vicuna". Without a chat
   template "chatml" if the tokenizer has <|im_start|>, else "vicuna".
4. Any other: the checkpoint's chat template.

"vicuna" and "chatml" are the prompts of SlowFast-LLaVA's published evaluation, open-ended and multiple choice. It has
no multiple-choice prompt for "mistral" and "llama2", which use the same words in their own form.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, InputError
from .time_limit import TooLong, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "<image>"
_SECONDS = 5.0  # time limit of a chat template, which usually takes a millisecond

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
    """Prompt texts of a model family.

    Attributes:
        open_ended: The first turn, with {question}.
        multiple_choice: The first turn, with {question} and {options}.
        next_turn: The text between an answer and the next one, with {words}.
        stop: Text that ends an answer besides the EOS token, or None.
    """

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
    """A previous question and its answer."""

    question: str
    answer: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        text: The text, with MARKER once in place of the video.
        before: Token ids before the video.
        after: Token ids after the video.
    """

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
    """The prompt family of a checkpoint, by the rule in the module's docstring.

    Args:
        text_model: model_type of the language model.
        chat_template: The checkpoint's chat template, or None.
        vocabulary: The tokenizer's tokens.
        package_config: The "sfllava_fast" entry of config.json, or None.

    Returns:
        One of FAMILIES.

    Raises:
        CheckpointError: If none matches.
    """
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
    """The family, if it is one of FAMILIES. Raises InputError otherwise."""
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
    """The prompt of a question.

    Args:
        question: The question. Blanks around it and the choices are kept, as published.
        tokenizer: The tokenizer.
        family: One of FAMILIES.
        choices: 2 to 26 texts for multiple choice, or None.
        chat_template: For the family "chat_template"; None uses the tokenizer's.
        turns: Earlier turns of the conversation, which are between the video and the question.

    Raises:
        InputError: If the question is empty or contains MARKER or half of a surrogate pair, or the choices are not 2 to
            26 texts.
        CheckpointError: If the chat template does not write the prompt.
    """
    check_question(question, choices)
    asked = [*((turn.question, turn.choices) for turn in turns), (question, choices)]
    if any(MARKER in part for text, options in asked for part in (text, *map(str, options or ()))):
        raise InputError(f"the question contains {MARKER}, which marks the place of the video: remove it")
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
    """Raise InputError for an empty question, or for half of a surrogate pair, which tokenizers do not accept."""
    if not isinstance(question, str) or not question.strip():
        raise InputError("the question is empty: ask something about the video")
    for text in (question, *map(str, choices or ())):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise InputError(f"the question contains {half}, half of a surrogate pair: write the whole pair") from None


def user_words(question: str, choices: Sequence[str] | None) -> str:
    """The text of a user's turn. Raises InputError unless the choices are 2 to 26 texts."""
    return question if choices is None else _OPTIONS.format(question=question, options=format_options(choices))


def format_options(choices: Sequence[str]) -> str:
    """The choices as published, one a line, "(A) first", also if a text is empty."""
    if isinstance(choices, str):
        raise InputError(f"choices must be a list of 2 to 26 texts, not the text {choices!r}")
    texts = [str(choice) for choice in choices]
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise InputError(f"choices must be 2 to 26 texts, not {len(texts)}")
    return "".join(f"({letter}) {text}\n" for letter, text in zip(string.ascii_uppercase, texts))


def pick_option(text: str, choices: Sequence[Any], published: bool = False) -> int | None:
    """Index of the choice in a model's answer, or None.

    The published rule takes the first option whose letter is followed by ":" or ")", searched after "answer is" if the
    text contains that. Otherwise it takes the first character, if it is one of A to E, or of more letters if there are
    more choices. A letter after the last choice gives None.

    Our rule differs in two points: only letters of the choices count, and a text that repeats exactly one choice is
    that choice (`same_choice`).

    Args:
        text: The model's answer.
        choices: The choices.
        published: Whether to apply the published rule.
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
    """Index of the only choice that equals a text except for case, blanks and outer punctuation; None otherwise.

    For a model whose prompt has no choices, so that letters in its answer do not mean options.
    """
    said = _bare(text)
    same = [number for number, choice in enumerate(choices) if said and _bare(str(choice)) == said]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`“”\u2018\u2019«»()[]")


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Tokenize the two sides of MARKER separately, as published, with one BOS if the tokenizer adds it.

    Raises:
        CheckpointError: If the text does not contain MARKER exactly once.
    """
    if text.count(MARKER) != 1:
        raise CheckpointError(f"the prompt must contain {MARKER} once, not {text.count(MARKER)} times: {text[:80]!r}")
    before, after = text.split(MARKER)
    ids = [tokenizer(side, add_special_tokens=False).input_ids if side else [] for side in (before, after)]
    bos = tokenizer.bos_token_id
    # A chat template may write BOS itself.
    if bos is not None and tokenizer("a").input_ids[:1] == [bos] and ids[0][:1] != [bos]:
        ids[0] = [bos, *ids[0]]
    return Prompt(text, tuple(ids[0]), tuple(ids[1]))


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the text with the tokenizer's unknown token, in order; none if it has no unknown token."""
    unk = tokenizer.unk_token_id
    if unk is None or unk not in tokenizer(text, add_special_tokens=False).input_ids:
        return []
    words = dict.fromkeys(re.findall(r"[^\W_]+|[^\w\s]", text))
    return [word for word in words if unk in tokenizer(word, add_special_tokens=False).input_ids]


def _render(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, words: Sequence[str], answers: Sequence[str]
) -> str:
    # The content is a list of parts for templates of image models, and a string for those of text models.
    for parts in (True, False):
        try:
            with time_limit(_SECONDS):
                text = cast(
                    str,
                    tokenizer.apply_chat_template(
                        _messages(words, answers, parts),
                        chat_template=chat_template,
                        tokenize=False,
                        add_generation_prompt=True,
                    ),
                )
        except TooLong:
            raise CheckpointError(
                f"the chat template takes more than {_SECONDS:g} seconds: correct it, or choose another prompt"
            ) from None
        except Exception:  # a template may raise any type for content of the other form
            continue
        if text.count(MARKER) == 1 and all(part.strip() in text for part in (*words, *answers)):
            return text
    raise CheckpointError(f"the chat template does not write {MARKER} once and the question: choose another prompt")


def _messages(words: Sequence[str], answers: Sequence[str], parts: bool) -> list[dict[str, Any]]:
    """The previous turns and the question, with the video in the first turn."""
    messages = []
    for turn, text in enumerate(words):
        content: Any = [{"type": "text", "text": text}] if parts else text
        if turn == 0:
            content = [{"type": "image"}, *content] if parts else f"{MARKER}\n{text}"
        messages.append({"role": "user", "content": content})
        if turn < len(answers):
            answer = [{"type": "text", "text": answers[turn]}] if parts else answers[turn]
            messages.append({"role": "assistant", "content": answer})
    return messages

"""The text side of a checkpoint: prompts from questions, answers from token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from ..errors import CheckpointError
from ..model.checkpoint import Checkpoint
from ..model.prompts import (
    TEMPLATES,
    Prompt,
    Turn,
    build_prompt,
    check_family,
    format_options,
    pick_option,
    prompt_family,
    same_choice,
    unknown_words,
)

log = logging.getLogger("sfllava_fast")

_STOP_TOKENS = 16  # the last ones, in which a stop text is looked for


class PromptFormat:
    """How a checkpoint is asked and how its answers are read.

    Attributes:
        family: One of `model.prompts.FAMILIES`.
        asks_openly: Whether prompts have no choices, as in training: the choice is then found in the answer.
        stop_ids: Token ids that end an answer.
        stop_text: A text that ends an answer, if it is not one token; else None.
    """

    def __init__(self, checkpoint: Checkpoint, prompt: str = "auto") -> None:
        self.tokenizer, self.chat_template = checkpoint.tokenizer, checkpoint.chat_template
        self.rows = cast(nn.Embedding, checkpoint.model.get_input_embeddings()).num_embeddings
        self.asks_openly = (checkpoint.options or {}).get("choices") == "open"
        if prompt == "auto":
            text_model, vocabulary = checkpoint.model.config.text_config.model_type, self.tokenizer.get_vocab()
            self.family = prompt_family(text_model, self.chat_template, vocabulary, checkpoint.options)
        else:
            self.family = check_family(prompt)
        self.stop_ids, self.stop_text = self._find_stops(checkpoint)

    def prompt(self, question: str, choices: Sequence[str] | None = None, turns: Sequence[Turn] = ()) -> Prompt:
        """The prompt of a question. Logs the words that the tokenizer does not have.

        Raises:
            InputError: For an empty question or wrong choices.
            CheckpointError: If the tokenizer has more tokens than the model has embeddings.
        """
        prompt = self._build(question, choices, turns)
        if max(prompt.before + prompt.after, default=0) >= self.rows:
            raise CheckpointError(
                f"the tokenizer has tokens beyond the model's {self.rows}: they do not belong together"
            )
        shown = [] if self.asks_openly else [str(choice) for choice in choices or ()]
        if unknown := unknown_words(" ".join([question, *shown]), self.tokenizer):
            log.warning("the model does not know these words and cannot use them: %s", ", ".join(unknown))
        return prompt

    def shortest(self) -> Prompt:
        """The prompt of a question of one character: the least that any question costs."""
        return self._build("?")

    def pick_option(self, text: str, choices: Sequence[Any]) -> int | None:
        """Index of the choice that an answer names; None if it names none."""
        return (same_choice if self.asks_openly else pick_option)(text, choices)

    def text(self, ids: Sequence[int], strip: bool = True) -> str:
        """The text of an answer's token ids, without special tokens and up to the stop text."""
        text = self._decode(ids)
        if self.stop_text:
            text = text.partition(self.stop_text)[0]
        return text.strip() if strip else text

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with the last of these token ids."""
        if ids[-1] in self.stop_ids:
            return True
        return self.stop_text is not None and self.stop_text in self._decode(ids[-_STOP_TOKENS:])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _build(self, question: str, choices: Sequence[str] | None = None, turns: Sequence[Turn] = ()) -> Prompt:
        if self.asks_openly:
            if choices is not None:
                format_options(choices)  # raises if they are wrong
            choices, turns = None, [Turn(turn.question, turn.answer) for turn in turns]
        return build_prompt(question, self.tokenizer, self.family, choices, self.chat_template, turns)

    def _find_stops(self, checkpoint: Checkpoint) -> tuple[frozenset[int], str | None]:
        named = [checkpoint.model.generation_config.eos_token_id, self.tokenizer.eos_token_id]
        ids = [i for eos in named if eos is not None for i in (eos if isinstance(eos, list) else [eos])]
        if not all(isinstance(i, int) for i in ids):
            raise CheckpointError(f"eos_token_id {named[0]!r} is no token id: correct generation_config.json")
        template = TEMPLATES.get(self.family)
        stop = template.stop if template else None
        if stop in self.tokenizer.get_vocab():
            ids.append(self.tokenizer.convert_tokens_to_ids(stop))
        return frozenset(ids), stop


class TextStream:
    """Passes an answer's text to a function while its token ids come."""

    def __init__(self, prompts: PromptFormat, on_text: Callable[[str], None]) -> None:
        self.prompts, self.on_text = prompts, on_text
        self.text, self.sent = "", 0

    def update(self, ids: Sequence[int]) -> None:
        """Pass on what these ids, all so far, add to the text."""
        self.text = self.prompts.text(ids, strip=False)
        if not self.text.endswith("\ufffd"):  # a character may span tokens: half of one waits
            self.finish()

    def finish(self) -> None:
        """Pass on what is left."""
        if len(self.text) > self.sent:
            self.on_text(self.text[self.sent :])
            self.sent = len(self.text)

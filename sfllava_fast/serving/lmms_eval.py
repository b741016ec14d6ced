"""The model `sfllava_fast` of lmms-eval.

It is what lmms-eval calls a simple model, not a chat model: those get a .webm file as audio.
"""

from __future__ import annotations

import inspect
import logging
import os
import string
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from ..engine.answer import Answer
from ..engine.options import ModelOptions
from ..engine.slowfast_llava import SlowFastLlava
from ..errors import ContextError, InputError, OutOfMemoryError, SfllavaError, VideoError, check_count, first_line
from ..model.prompts import pick_option
from ..ops.projector import Mode
from ..video import IMAGE_SUFFIXES, Source, import_decoder
from .task_text import read_task_text

log = logging.getLogger("sfllava_fast")

EMBEDDED = "embedded"
PROTOCOLS = ("published", "task")
OPTION_RULES = ("published", "own")
_GREEDY = {"do_sample": False, "temperature": 0, "num_beams": 1}
# Settings that are kept to, or change nothing in a greedy answer.
_KEPT = {"max_new_tokens", "until", "top_p", "top_k", "image_aspect_ratio"}


class Asked(NamedTuple):
    """A request as the model is asked it; until: texts that end the answer."""

    task: str
    video: Source
    question: str
    choices: list[str] | None
    max_new_tokens: int | None
    until: list[str]


class SfllavaFast(lmms):
    """A LLaVA checkpoint under lmms-eval: `--model sfllava_fast --model_args pretrained=DIR_OR_HUB_ID,...`.

    Answers are greedy. A question whose video cannot be read, or that does not fit the context or the memory, gets an
    empty answer and a line in the log. Under `accelerate launch` each process has its own GPU.

    Args:
        pretrained: A checkpoint, or "embedded" for the embedded model.
        protocol: "published": the paper's prompts; if a task lists options, the multiple-choice one, answered by a
            letter. "task": the task's whole text in the checkpoint's chat template.
        option_rule: How the letter is read: by the "published" rule or our "own", see `model.prompts.pick_option`.
        frames: As in `SlowFastLlava.open`.
        layout: As all below up to `prompt`: see `engine.options.ModelOptions`.
        decoder: As in `SlowFastLlava.open`.
        max_new_tokens: Where an answer is cut; None: the task's number, else the checkpoint's.
        batch_size: Must be 1: a video's questions are answered one by one.

    Raises:
        InputError: For unknown arguments, and for tasks that have no videos; before the first answer.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        protocol: str = "published",
        option_rule: str = "published",
        frames: int | None = None,
        layout: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        backend: str = "auto",
        attention: str = "auto",
        projector: Mode = "exact",
        reduction: str | None = None,
        prompt: str = "auto",
        decoder: str = "pyav",
        max_new_tokens: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _check_arguments(pretrained, protocol, frames, max_new_tokens, unknown)
        if option_rule not in OPTION_RULES:
            raise InputError(f"unknown option_rule {option_rule!r}: choose one of {', '.join(OPTION_RULES)}")
        import_decoder(decoder)
        self.published_options = option_rule == "published"
        self.protocol, self.frames, self.decoder, self.max_new_tokens = protocol, frames, decoder, max_new_tokens
        self._said: set[str] = set()
        if str(batch_size) != "1":
            self._say_once(f"batch_size={batch_size} is ignored: a video's questions are answered one by one")
        options = ModelOptions(
            layout=layout,
            dtype=dtype,
            device=_own_device(device),
            backend=backend,
            attention=attention,
            prompt="chat_template" if protocol == "task" and prompt == "auto" else prompt,
            projector=projector,
            reduction=reduction,
        )
        self.model = SlowFastLlava.load(None if pretrained == EMBEDDED else pretrained, options)
        self.device = self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request, in order; a video is opened once for all that ask about it."""
        asked = [self._read(request) for request in requests]
        answers: dict[int, Answer | SfllavaError] = {}
        start = time.perf_counter()
        with tqdm(total=len(asked), disable=self.rank != 0, desc="Model Responding") as progress:
            for numbers in _by_video(asked):
                for answer, number in zip(self._answer_video([asked[i] for i in numbers]), numbers):
                    answers[number] = answer
                    progress.update()
        self._log_outcome(list(answers.values()), time.perf_counter() - start)
        return [_result(one, answers[number], self.published_options) for number, one in enumerate(asked)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"the task {requests[0].task_name} asks for log-likelihoods, and sfllava_fast only generates: take a task "
            "that generates, such as egoschema_subset for egoschema_subset_mcppl"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            f"the task {requests[0].task_name} asks in rounds, and sfllava_fast answers single questions: take another"
        )

    def clean(self) -> None:
        """Release the model's memory: a judge may need it."""
        del self.model
        super().clean()

    def _read(self, request: Instance) -> Asked:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        video = _one_video(task, doc_to_visual(self.task_dict[task][split][doc_id]))
        question, choices = context, None
        if self.protocol == "published":
            question, choices, instruction = read_task_text(context)
            left_out = f", without {instruction!r}" if instruction else ""
            self._say_once(f"{task}: asked {'multiple choice' if choices else 'open-ended'} as published{left_out}")
        ignored = {name: value for name, value in settings.items() if name not in _KEPT}
        ignored = {name: value for name, value in ignored.items() if value not in (None, _GREEDY.get(name))}
        if ignored:
            self._say_once(f"{task}: answers are greedy, ignored are {ignored}")
        until = settings.get("until") or []
        return Asked(
            task,
            video,
            question,
            choices,
            self.max_new_tokens or settings.get("max_new_tokens"),
            [until] if isinstance(until, str) else until,
        )

    def _answer_video(self, asked: Sequence[Asked]) -> Iterator[Answer | SfllavaError]:
        """Answers to questions about one video, or the errors instead."""
        session = None
        try:
            for one in asked:
                answer: Answer | SfllavaError
                try:
                    session = session or self.model.open(one.video, self.frames, self.decoder)
                    answer = session.ask(one.question, one.choices, one.max_new_tokens)
                except (InputError, VideoError, ContextError, OutOfMemoryError) as error:
                    answer = error
                except (SfllavaError, RuntimeError, OSError, MemoryError):
                    raise  # it may stay with the process, as a CUDA error does
                except Exception as error:
                    answer = InputError(f"{type(error).__name__}: {first_line(error)}")
                if isinstance(answer, SfllavaError):
                    log.error("%s: a question has no answer: %s", one.task, answer)
                yield answer
        finally:
            if session is not None:
                session.close(spare=True)

    def _log_outcome(self, answers: Sequence[Answer | SfllavaError], seconds: float) -> None:
        """Report the speed to lmms-eval and log the failures. Raises the first one if nothing was answered."""
        failures = [answer for answer in answers if isinstance(answer, SfllavaError)]
        # Other processes would wait for one that raised.
        if failures and len(failures) == len(answers) and self.world_size == 1:
            raise failures[0]
        if failures:
            log.error("%d of %d questions have no answer and count as wrong", len(failures), len(answers))
        tokens = sum(len(answer.token_ids) for answer in answers if isinstance(answer, Answer))
        log_metrics(seconds, tokens, tokens / seconds)

    def _say_once(self, text: str) -> None:
        if text not in self._said and self.rank == 0:
            self._said.add(text)
            log.warning(text)


def _check_arguments(
    pretrained: str | None, protocol: str, frames: object, max_new_tokens: object, unknown: Iterable[str]
) -> None:
    if unknown:
        known = [name for name in inspect.signature(SfllavaFast).parameters if name != "unknown"]
        raise InputError(f"unknown model argument {', '.join(unknown)}: there are {', '.join(known)}")
    if pretrained is None:
        raise InputError(f"name the model: pretrained=DIR_OR_HUB_ID, or {EMBEDDED} for the embedded one")
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    for name, count in (("frames", frames), ("max_new_tokens", max_new_tokens)):
        if count is not None:
            check_count(name, count)


def _own_device(device: str | None) -> str | None:
    """The given device; if several processes ask for any GPU, each gets its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def _one_video(task: str, visuals: Sequence[Any] | None) -> Source:
    """The video of a document."""
    kinds = [type(visual).__name__ for visual in visuals or ()]
    if len(kinds) == 1:
        (visual,) = visuals or ()
        is_image = isinstance(visual, (str, os.PathLike)) and os.fspath(visual).lower().endswith(IMAGE_SUFFIXES)
        if isinstance(visual, (str, os.PathLike, np.ndarray, torch.Tensor)) and not is_image:
            return visual
        kinds = ["an image"] if is_image else kinds
    raise InputError(
        f"the task {task} shows {', '.join(kinds[:3]) or 'nothing'}{', ...' * (len(kinds) > 3)}, and sfllava_fast "
        "answers about one video: take a task of videos"
    )


def _by_video(asked: Sequence[Asked]) -> Iterable[list[int]]:
    """Numbers of the questions about each video."""
    groups: dict[str | int, list[int]] = {}
    for number, (_, video, *_) in enumerate(asked):
        key = os.fspath(video) if isinstance(video, (str, os.PathLike)) else id(video)
        groups.setdefault(key, []).append(number)
    return groups.values()


def _result(asked: Asked, answer: Answer | SfllavaError, published: bool) -> GenerationResult:
    """What lmms-eval scores: a letter if options were given and one was named, else the text."""
    if not isinstance(answer, Answer):
        return GenerationResult("")
    option = None if asked.choices is None else pick_option(answer.text, asked.choices, published)
    text = answer.text if option is None else string.ascii_uppercase[option]
    for end in asked.until:
        text = text.partition(end)[0] if end else text
    read = answer.prompt_tokens + answer.tokens["total"]
    return GenerationResult(text, TokenCounts(input_tokens=read, output_tokens=len(answer.token_ids)))

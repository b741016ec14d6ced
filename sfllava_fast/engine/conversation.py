"""Questions and answers about a video: what all kinds of sessions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError, dtype_name
from ..model.prompts import Prompt, Turn
from ..ops.projector import Mode
from .answer import Answer
from .pipeline import Pipeline
from .stages import Stopwatch

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..model.kv_cache import KvCache


class Conversation:
    """Questions about one video. A question that fails or is interrupted leaves the session as it was.

    Threads may share the sessions of a model: one of them runs, the others wait.

    Attributes:
        pipeline: The model.
        video: Path or name of the video.
        turns: The conversation so far, which a follow-up question includes.
        caveat: The checkpoint's caveat about answers to this video, or None.
        damage: What is missing of a damaged video, as far as it was read; else None.
    """

    damage: str | None = None

    def __init__(self, pipeline: Pipeline, video: str, projector: Mode) -> None:
        self.pipeline, self.video, self.projector = pipeline, video, projector
        self.caveat = pipeline.caveat(video)
        self.turns: list[Turn] = []
        self.closed = False

    @property
    def frames(self) -> list[int]:
        """Numbers of the frames that are shown."""
        raise NotImplementedError

    @property
    def slow_frames(self) -> list[int]:
        """Numbers of the frames of the slow pathway."""
        raise NotImplementedError

    @property
    def tokens(self) -> dict[str, int]:
        """The video's tokens by pathway, and their total."""
        raise NotImplementedError

    def ask(
        self,
        question: str,
        choices: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        follow_up: bool = False,
        on_token: Callable[[str], None] | None = None,
        clock: Stopwatch | None = None,
    ) -> Answer:
        """Answer a question, greedily.

        Args:
            question: The question.
            choices: Makes it a multiple-choice question.
            max_new_tokens: Where the answer is cut; None: the checkpoint's number, else 128.
            follow_up: Whether the model sees the earlier turns. If not, a new conversation begins.
            on_token: Called with each piece of text as it is generated. It may not ask this model, or wait for a thread
                that does.
            clock: A stopwatch that has been running since before the question.

        Raises:
            InputError: For wrong arguments, or a closed session.
            ContextError: If prompt, video and answer do not fit the context.
            OutOfMemoryError: If a stage runs out of memory.
            NumberError: If the model computes NaN.
            VideoError: If the video cannot be decoded (the first question decodes it).
        """
        with self.pipeline.exclusive.answering():
            return self.answer(question, choices, max_new_tokens, follow_up, on_token, clock)

    def answer(
        self,
        question: str,
        choices: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        follow_up: bool = False,
        on_token: Callable[[str], None] | None = None,
        clock: Stopwatch | None = None,
    ) -> Answer:
        """`ask` for a caller that holds `pipeline.exclusive`."""
        pipeline = self.pipeline
        self.check_open()
        max_new_tokens = pipeline.new_tokens(max_new_tokens)
        prompt = pipeline.prompts.prompt(question, choices, self.turns if follow_up else ())
        self._check_context(prompt, max_new_tokens)
        clock = clock or Stopwatch(pipeline.device)
        with torch.inference_mode():
            cache, logits = self._prefill(prompt, max_new_tokens, clock)
            ttft = clock.elapsed()
            with clock("generate"):
                (ids,) = pipeline.generate(cache, logits, [cache.length], max_new_tokens, on_token)
        answer = self.make_answer(question, choices, prompt, ids, clock, ttft, cache)
        turn = Turn(question, answer.text, None if choices is None else tuple(map(str, choices)))
        self.turns = [*self.turns, turn] if follow_up else [turn]
        return answer

    def make_answer(
        self,
        question: str,
        choices: Sequence[str] | None,
        prompt: Prompt,
        ids: list[int],
        clock: Stopwatch,
        ttft: float,
        cache: KvCache,
    ) -> Answer:
        """The Answer of generated token ids and of the cache in which they were decoded."""
        pipeline, encoder = self.pipeline, self.pipeline.encoder
        text = pipeline.prompts.text(ids)
        pipeline.warn_once(self.caveat)
        seconds, steps = clock.by_stage(), len(ids) - 1
        return Answer(
            text=text,
            video=self.video,
            question=question,
            model=pipeline.checkpoint.name,
            layout=str(pipeline.layout),
            frames=self.frames,
            slow_frames=self.slow_frames,
            tokens=self.tokens,
            backend=encoder.backend,
            projector=self.projector,
            attention=pipeline.checkpoint.attention.describe(),
            dtype=dtype_name(encoder.dtype),
            device=str(encoder.device),
            prompt_tokens=len(prompt),
            token_ids=ids,
            seconds=seconds,
            ttft=ttft,
            tokens_per_second=steps / seconds["generate"] if steps else None,
            choices=[str(choice) for choice in choices] if choices is not None else None,
            option=pipeline.prompts.pick_option(text, choices) if choices is not None else None,
            caveat=self.caveat,
            reduction=pipeline.prefilling.label,
            kept=pipeline.prefilling.length(self.tokens["total"]) - max(cache.skipped),
            damage=self.damage,
        )

    def check_open(self) -> None:
        """Raise InputError if the session or its model is closed."""
        self.pipeline.check_open()
        if self.closed:
            raise InputError(f"the session about {self.video} is closed: open the video again")

    def close(self) -> None:
        """Release everything. A closed session can be asked nothing."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_context(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise ContextError if prompt, video and answer do not fit the context."""
        raise NotImplementedError

    def _prefill(self, prompt: Prompt, max_new_tokens: int, clock: Stopwatch) -> tuple[KvCache, Tensor]:
        """A cache of the video and the prompt, with room for the answer, and the logits [1, V] after them."""
        raise NotImplementedError

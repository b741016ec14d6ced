"""What every session about a video has in common: questions and their answers, turns, an end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, dtype_name
from ..layouts.plan import Plan
from ..model.prompts import Prompt, Turn
from ..ops.token_offsets import token_frames
from ..reduction.prefilling import Place
from .answer import Answer
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache
    from ..ops.projector import Mode
    from .pipeline import Pipeline

_ROOM = 256


class Conversation:
    """Questions about a video. Asking changes nothing that is kept, so an interrupted or failed answer leaves the
    session as it was.

    Any threads may ask, push, save, release and close: one at a time in all sessions of a model, the others wait.

    frames, slow_frames: numbers of the frames that are shown, and of those that the slow pathway takes.
    tokens: the video's, by pathway, and their total.
    turns: the conversation so far, which a follow-up sees.
    caveat: what is said with each answer about this video (see `Answer`).
    damage: what is missing of the video, as far as it was noticed.
    """

    frames: list[int]
    slow_frames: list[int]
    tokens: dict[str, int]
    damage: str | None = None

    def __init__(self, model: Pipeline, video: str, projector: Mode) -> None:
        self.model, self.video, self.projector = model, video, projector
        self.caveat = model.caveat_about(video)
        self.turns: list[Turn] = []
        self.closed = False

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

        choices: makes it multiple choice. max_new_tokens: None takes the checkpoint's, else 128. follow_up: the model
        sees the earlier turns of the conversation; without it a new one begins. on_token: called with each piece of
        text as it is generated; it may not ask this model, nor one that waits for it. clock: has been running since before the question.

        Raises InputError, ContextError, OutOfMemoryError or NumberError, and on the first question VideoError.
        """
        with self.model.exclusive.answering():
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
        """`ask`, where the model is this thread's already."""
        model = self.model
        self.check_open()
        max_new_tokens = model.check_new_tokens(max_new_tokens)
        prompt = model.prompt(question, choices, self.turns if follow_up else ())
        self._check_context(prompt, max_new_tokens)
        clock = clock or Stopwatch(model.device)
        with torch.inference_mode():
            cache, logits = self._prefill(prompt, max_new_tokens, clock)
            first = clock.elapsed()
            with clock("generate"):
                (ids,) = model.generate(cache, logits, [cache.length], max_new_tokens, on_token)
        answer = self.make_answer(question, choices, prompt, ids, clock, first, cache)
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
        """What is told of an answer of these token ids, which were decoded in this cache."""
        model = self.model
        text = model.decode_text(ids)
        model.say_once(self.caveat)
        seconds, steps = clock.by_stage(), len(ids) - 1
        return Answer(
            text=text,
            video=self.video,
            question=question,
            model=model.checkpoint.name,
            layout=str(model.layout),
            frames=self.frames,
            slow_frames=self.slow_frames,
            tokens=self.tokens,
            backend=model.backend,
            projector=self.projector,
            attention=model.checkpoint.attention.describe(),
            dtype=dtype_name(model.dtype),
            device=str(model.device),
            prompt_tokens=len(prompt),
            token_ids=ids,
            seconds=seconds,
            ttft=ttft,
            tokens_per_second=steps / seconds["generate"] if steps else None,
            choices=[str(choice) for choice in choices] if choices is not None else None,
            option=model.pick_option(text, choices) if choices is not None else None,
            caveat=self.caveat,
            reduction=model.prefilling.text,
            kept=self.tokens["total"] - max(cache.skipped) + model.prefilling.adds,
            damage=self.damage,
        )

    def check_open(self) -> None:
        """InputError where the session is closed."""
        if self.closed:
            raise InputError(f"the session about {self.video} is closed: open the video again")

    def close(self) -> None:
        """Give everything back. A closed session can be asked nothing."""
        self.closed = True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_context(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise ContextError where prompt, video and answer exceed what the language model may see."""
        raise NotImplementedError

    def _prefill(self, prompt: Prompt, max_new_tokens: int, clock: Stopwatch) -> tuple[KvCache, Tensor]:
        """A cache of the video and the prompt, with room for the answer, and the logits [1, V] behind them."""
        raise NotImplementedError


class PrefilledSession(Conversation):
    """The video's tokens are encoded and prefilled at the first question, and kept: a later one costs its own tokens
    alone, and is answered exactly as it would be first.

    plan: what the layout does to the frames.
    """

    plan: Plan

    def __init__(self, model: Pipeline, video: str, projector: Mode) -> None:
        super().__init__(model, video, projector)
        self._before: tuple[int, ...] = ()
        self._embeds: Tensor | None = None  # [1, P, D]: the prompt before the video, and the video's tokens
        self._cache: KvCache | None = None  # their keys and values, and room for a question and an answer

    @property
    def slow_frames(self) -> list[int]:
        frames = self.frames
        return [frames[i] for i in self.plan.slow_frames]

    @property
    def tokens(self) -> dict[str, int]:
        return dict(self.plan.tokens)

    def encode(self, before: tuple[int, ...], clock: Stopwatch) -> Tensor:
        """The embeddings [1, P, D] of the prompt before the video and of the video, which is encoded only once."""
        if self._embeds is not None and before == self._before:
            return self._embeds
        model = self.model
        embeds, rows = model.allocate(len(before), self.tokens["total"])
        if self._embeds is None:
            self._write_video(rows, clock)
        else:
            rows.copy_(self.video_tokens())
        with clock("prefill"):
            embeds[0, : len(before)] = model.language.embed_tokens(before)
        self._retire_cache()
        self._before, self._embeds = before, embeds
        return embeds

    def place(self, before: tuple[int, ...]) -> Place:
        """Where the video is behind this prompt."""
        return Place(len(before), token_frames(self.plan, len(before)), self.plan)

    def video_tokens(self) -> Tensor:
        """The video's tokens [S, D]."""
        return self._embeds[0, len(self._before) :]

    @torch.inference_mode()
    def kept_tokens(self, question: str = "?") -> list[int] | None:
        """Which of the video's tokens pruning keeps for a question, ascending; None without pruning."""
        model = self.model
        with model.exclusive.answering():
            prompt, clock = model.prompt(question), Stopwatch(model.device)
            embeds, place = self.encode(prompt.before, clock), self.place(prompt.before)
            after = model.language.embed_tokens(prompt.after)[None]
            positions = model.prefilling.choose(torch.cat([embeds, after], dim=1), place).positions
        if positions is None:
            return None
        return [at - place.start for at in positions[0].tolist() if place.start <= at < embeds.shape[1]]

    @property
    def nbytes(self) -> int:
        """Bytes that the session holds: the video's tokens, and their keys and values."""
        return sum(part.nbytes for part in (self._embeds, self._cache) if part is not None)

    def release(self) -> None:
        """Give the keys and values back; the next question prefills the video's tokens again."""
        with self.model.exclusive.taken():
            self._cache = None
            self.model.sessions.forget(self)

    def close(self, spare: bool = False) -> None:
        """Give everything back, or with `spare` leave the cache's memory to the next session. A closed session can be
        asked nothing."""
        with self.model.exclusive.taken():
            if spare:
                self._retire_cache()
            self.release()
            self._embeds = None
            super().close()

    def _write_video(self, rows: Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the video's tokens."""
        raise NotImplementedError

    def _check_context(self, prompt: Prompt, max_new_tokens: int) -> None:
        self.model.check_context(prompt, self.tokens["total"], len(self.frames), max_new_tokens)

    def _prefill(self, prompt: Prompt, max_new_tokens: int, clock: Stopwatch) -> tuple[KvCache, Tensor]:
        embeds = self.encode(prompt.before, clock)
        with clock("prefill"):
            language, after = self.model.language, self.model.language.embed_tokens(prompt.after)[None]
            language.forget_scale()
            total = self._length + after.shape[1]
            # Beyond a bound every position depends on how many there are.
            if language.rescales(total) or self.model.prefilling.asks_anew:
                return self._prefill_anew(torch.cat([embeds, after], dim=1), max_new_tokens)
            cache = self._video_cache(total + max_new_tokens)
            return cache, language.extend(cache, after)

    def _prefill_anew(self, embeds: Tensor, max_new_tokens: int) -> tuple[KvCache, Tensor]:
        """A whole prompt in a cache of its own."""
        prefilling, place = self.model.prefilling, self.place(self._before)
        chosen = prefilling.choose(embeds, place)
        cache = self.model.language.new_cache(1, embeds.shape[1] + max_new_tokens, chosen.skipped)
        return cache, prefilling.extend(cache, chosen, place)

    def _video_cache(self, capacity: int) -> KvCache:
        """The video's keys and values, with room for so many tokens in all."""
        if self._cache is not None and self._cache.capacity >= capacity:
            self.model.sessions.touch(self)
        elif self._cache is not None:
            cache = self._new_cache(capacity, self._cache.skipped)
            cache.take(self._cache, [0])
            self._cache = cache
        else:
            prefilling, place = self.model.prefilling, self.place(self._before)
            chosen = prefilling.choose(self._embeds, place)
            cache = self._new_cache(capacity, chosen.skipped)
            prefilling.prefill(cache, chosen, place)
            self._cache = cache
        self._cache.length = self._length
        return self._cache

    def _new_cache(self, capacity: int, skipped: Sequence[int]) -> KvCache:
        """An empty cache of one row, for which other sessions may have to go."""
        sessions, language, room = self.model.sessions, self.model.language, rounded_up(capacity)
        cache = sessions.take_spare(room, skipped)
        sessions.touch(self, language.cache_bytes(room, skipped) if cache is None else cache.nbytes)
        return language.new_cache(1, room, skipped) if cache is None else cache

    @property
    def _length(self) -> int:
        """Tokens up to where a question goes on."""
        return self._embeds.shape[1] + self.model.prefilling.adds

    def _retire_cache(self) -> None:
        """Leave the cache's memory, with what was captured to decode in it, to whoever is next: itself, it may be."""
        cache = self._cache
        self.release()
        if cache is not None:
            self.model.sessions.keep_spare(cache)


def rounded_up(tokens: int) -> int:
    """Room for questions and answers somewhat longer than the first, so that the cache seldom moves."""
    return (tokens + _ROOM) // _ROOM * _ROOM

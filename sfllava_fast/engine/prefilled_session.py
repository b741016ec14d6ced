"""Sessions that keep the video's keys and values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.prompts import Prompt
from ..ops.projector import Mode
from .conversation import Conversation
from .pipeline import Pipeline
from .stages import Stopwatch
from .token_sources import TokenSource

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache
    from ..reduction.prefilling import Place

_ROOM = 256


class PrefilledSession(Conversation):
    """The first question encodes and prefills the video's tokens. A later one costs only its own tokens, and its answer
    is the same as if it were the first."""

    source: Any  # TokenSource; subclasses name theirs

    def __init__(self, pipeline: Pipeline, video: str, source: TokenSource, projector: Mode) -> None:
        super().__init__(pipeline, video, projector)
        self.source = source
        self._before: tuple[int, ...] = ()
        self._embeds: Tensor | None = None  # [1, P, D]: the prompt's start and the video's tokens
        self._version: Hashable = None  # of the tokens in _embeds
        self._cache: KvCache | None = None  # their keys and values, and room for a question and an answer

    @property
    def frames(self) -> list[int]:
        self.check_open()
        return list(self.source.frames)

    @property
    def slow_frames(self) -> list[int]:
        frames = self.frames
        return [frames[i] for i in self.source.plan.slow_frames]

    @property
    def tokens(self) -> dict[str, int]:
        self.check_open()
        return dict(self.source.tokens)

    @property
    def damage(self) -> str | None:  # type: ignore[override]  # read-only here
        return self.source.damage

    @property
    def nbytes(self) -> int:
        """Bytes that the session holds: the video's tokens, their keys and values, and what the source keeps."""
        held = sum(part.nbytes for part in (self._embeds, self._cache) if part is not None)
        return held + (0 if self.closed else self.source.nbytes)

    def encode(self, before: tuple[int, ...], clock: Stopwatch) -> Tensor:
        """The embeddings [1, P, D] of a prompt's start and the video, which is encoded once."""
        version = self.source.version()
        if self._embeds is not None and version != self._version:
            self._embeds = None
        if self._embeds is not None and before == self._before:
            return self._embeds
        embeds, rows = self.pipeline.allocate(len(before), self.tokens["total"])
        with clock("prefill"):
            embeds[0, : len(before)] = self.pipeline.language.embed_tokens(before)
        if self._embeds is None:
            self.source.write(rows, clock)
        else:
            rows.copy_(self.video_tokens())
        self._before, self._embeds, self._version = before, embeds, version
        self._retire_cache()
        return embeds

    def place(self, before: tuple[int, ...]) -> Place:
        """Where the video is after this start of a prompt."""
        from ..reduction.prefilling import Place

        start = len(before)
        return Place(start, self.source.offsets(start), self.source.place_plan())

    def video_tokens(self) -> Tensor:
        """The video's tokens [S, D]; a question must have been asked."""
        assert self._embeds is not None
        return self._embeds[0, len(self._before) :]

    @torch.inference_mode()
    def kept_tokens(self, question: str = "?") -> list[int] | None:
        """Which of the video's tokens pruning keeps for a question, ascending; None without pruning."""
        pipeline = self.pipeline
        with pipeline.exclusive.answering():
            self.check_open()
            prompt, clock = pipeline.prompts.prompt(question), Stopwatch(pipeline.device)
            embeds, place = self.encode(prompt.before, clock), self.place(prompt.before)
            after = pipeline.language.embed_tokens(prompt.after)[None]
            positions = pipeline.prefilling.choose(torch.cat([embeds, after], dim=1), place).positions
        if positions is None:
            return None
        return [at - place.start for at in positions[0].tolist() if place.start <= at < embeds.shape[1]]

    def release(self) -> None:
        """Release the keys and values; the next question prefills the video's tokens again."""
        with self.pipeline.exclusive.taken():
            self._cache = None
            self.pipeline.sessions.forget(self)

    def close(self, spare: bool = False) -> None:
        """Release everything. A closed session can be asked nothing.

        Args:
            spare: Leave the cache's memory to the next session.
        """
        with self.pipeline.exclusive.taken():
            if spare:
                self._retire_cache()
            self.release()
            self._embeds = None
            if not self.closed:
                self.source.close()
            super().close()

    def _check_context(self, prompt: Prompt, max_new_tokens: int) -> None:
        self.pipeline.check_context(prompt, self.tokens["total"], len(self.frames), max_new_tokens)

    def _prefill(self, prompt: Prompt, max_new_tokens: int, clock: Stopwatch) -> tuple[KvCache, Tensor]:
        embeds = self.encode(prompt.before, clock)
        with clock("prefill"):
            language, after = self.pipeline.language, self.pipeline.language.embed_tokens(prompt.after)[None]
            language.forget_scale()
            length = self._length(embeds)
            total = length + after.shape[1]
            # Beyond the bound of dynamic RoPE scaling, every key depends on the total length.
            if language.rescales(total) or self.pipeline.prefilling.depends_on_question:
                return self._prefill_anew(torch.cat([embeds, after], dim=1), max_new_tokens)
            cache = self._video_cache(embeds, length, total + max_new_tokens)
            return cache, language.extend(cache, after)

    def _prefill_anew(self, embeds: Tensor, max_new_tokens: int) -> tuple[KvCache, Tensor]:
        """A whole prompt in a cache of its own."""
        prefilling, place = self.pipeline.prefilling, self.place(self._before)
        chosen = prefilling.choose(embeds, place)
        cache = self.pipeline.language.new_cache(1, embeds.shape[1] + max_new_tokens, chosen.skipped)
        return cache, prefilling.extend(cache, chosen, place)

    def _video_cache(self, embeds: Tensor, length: int, capacity: int) -> KvCache:
        """The video's keys and values, with room for `capacity` tokens."""
        if self._cache is not None and self._cache.capacity >= capacity:
            self.pipeline.sessions.touch(self)
        elif self._cache is not None:
            cache = self._new_cache(capacity, self._cache.skipped)
            cache.take(self._cache, [0])
            self._cache = cache
        else:
            prefilling, place = self.pipeline.prefilling, self.place(self._before)
            chosen = prefilling.choose(embeds, place)
            cache = self._new_cache(capacity, chosen.skipped)
            prefilling.prefill(cache, chosen, place)
            self._cache = cache
        self._cache.length = length
        return self._cache

    def _new_cache(self, capacity: int, skipped: Sequence[int]) -> KvCache:
        """An empty cache of one row; other sessions are released if there are too many."""
        sessions, language, room = self.pipeline.sessions, self.pipeline.language, rounded_up(capacity)
        cache = sessions.take_spare(room, skipped)
        sessions.touch(self, language.cache_bytes(room, skipped) if cache is None else cache.nbytes)
        return language.new_cache(1, room, skipped) if cache is None else cache

    def _length(self, embeds: Tensor) -> int:
        """Positions before a question."""
        return self.pipeline.prefilling.length(embeds.shape[1])

    def _retire_cache(self) -> None:
        """Give the cache and its captured CUDA graph to the pool's spare slot, for the next session."""
        cache = self._cache
        self.release()
        if cache is not None:
            self.pipeline.sessions.keep_spare(cache)


def rounded_up(tokens: int) -> int:
    """A capacity with room for longer questions and answers, so that a cache is seldom copied."""
    return (tokens + _ROOM) // _ROOM * _ROOM

"""A stream whose frames go into the key/value cache as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import BackendError, ContextError, InputError, check_count
from ..layouts.layout import Layout
from ..model.prompts import TEMPLATES, Prompt
from ..video import as_frames
from .conversation import Conversation
from .pipeline import Pipeline
from .prefilled_session import rounded_up
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache

# Tokens of a question, with its prompt, that an appended stream leaves room for if the caller sets no bound.
_QUESTION = 256


class _Held(NamedTuple):
    """The frames in the cache.

    Attributes:
        evicted: Number of frames before them.
        tokens: Tokens [n, D] of each frame; all but the first begin with the separator between frames.
    """

    evicted: int
    tokens: list[Tensor]


class AppendSession(Conversation):
    """A stream whose tokens go into a growing KV cache as they come (VideoLLM-online, arXiv 2406.11816); made by
    `SlowFastLlava.open_stream`.

    A question costs only its own tokens. It is removed from the cache after its answer, and a follow-up question
    includes the earlier turns. The text before the video is that of an open-ended prompt, in every question.

    Beyond `most` frames the oldest quarter is evicted: the other frames move to its place in the cache, and their keys
    to its positions. The keys and values of all layers but the first still depend on the evicted frames, because they
    were computed with them in sight. So they cannot be computed again, and `max_sessions` does not release them. Their
    memory is bounded by `most`, and is allocated once unless a question is longer than all before.

    Attributes:
        most: Frames in the cache at most.
    """

    def __init__(self, pipeline: Pipeline, most: int | None, name: str) -> None:
        super().__init__(pipeline, name, "exact")
        if pipeline.prefilling.label:
            raise InputError(f"append takes no reduction, such as {pipeline.prefilling.label}: take another mode")
        layout, context = pipeline.layout, pipeline.checkpoint.context
        language, prompt = pipeline.language, pipeline.prompts.shortest()
        if not language.moves_keys:
            raise BackendError("the keys of this language model cannot be moved: take another mode than append")
        self._head = prompt.before
        between = [k for k, separator in enumerate(layout.separators) if separator.where == "between"]
        separators = pipeline.encoder.separators
        self._between = separators[between] if between and separators is not None else None
        self._alone = layout.plan(1, pipeline.encoder.grid).tokens["total"]
        self._per_frame = self._alone + len(between)
        self._context = min(context, language.rescales_after or context)
        if most is None:
            room = self._context - len(self._head) - _QUESTION - pipeline.new_tokens(None)
            most = max(1, room // self._per_frame - 1)
        check_count("frames", most)
        self.most = most
        # At most one frame more than is kept, before the oldest are evicted.
        self._most_tokens = (most + 1) * self._per_frame
        self._evicts = -(-most // 4)  # so a key is moved, and rounded, four times at most
        self._held = _Held(0, [])
        self._cache: KvCache | None = None  # None: what is held must be prefilled
        self._check_context(prompt, 1)

    def push(self, frames: Tensor) -> None:
        """Add the next frames of the stream. If this fails, the session is as it was.

        Args:
            frames: uint8 RGB [t, H, W, 3], one or many; H and W may differ from push to push.

        Raises:
            InputError: For other frames, or a closed session.
            OutOfMemoryError: If a stage runs out of memory.
        """
        frames, clock = as_frames(frames), Stopwatch(self.pipeline.device)
        with self.pipeline.exclusive.answering(), torch.inference_mode():
            self.check_open()
            tokens = [
                part
                for few in frames.split(self.pipeline.encoder.tower.frames_per_pass)
                for part in self._encode(few, clock)
            ]
            if self._between is not None:
                tokens = [torch.cat([self._between, part]) if i else part for i, part in enumerate(tokens, self.seen)]
            with clock("prefill"):
                self._append(tokens)

    @property
    def frames(self) -> list[int]:
        """Numbers of the frames in the cache."""
        return list(range(self._held.evicted, self.seen))

    @property
    def slow_frames(self) -> list[int]:
        return []

    @property
    def tokens(self) -> dict[str, int]:
        return self.pipeline.plan(len(self._held.tokens)).tokens

    @property
    def seen(self) -> int:
        """Frames pushed so far."""
        return self._held.evicted + len(self._held.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, and of the tokens that they were computed from."""
        cache = 0 if self._cache is None else self._cache.nbytes
        return cache + sum(tokens.nbytes for tokens in self._held.tokens)

    def close(self) -> None:
        with self.pipeline.exclusive.taken():
            super().close()
            self._cache, self._held = None, _Held(self.seen, [])

    def _check_context(self, prompt: Prompt, max_new_tokens: int) -> None:
        # For a full cache: whether a question fits must not change while the stream comes in.
        words = len(self._head) + len(prompt.after)
        total = self._most_tokens + words + max_new_tokens
        if total > self._context:
            raise ContextError(
                f"{self._most_tokens} video tokens + {words} of prompt + {max_new_tokens} new = {total} exceed the "
                f"context of {self._context}: lower max_new_tokens, or open the stream with fewer frames (now "
                f"{self.most}) or a smaller layout than {self.pipeline.layout}"
            )

    def _prefill(self, prompt: Prompt, max_new_tokens: int, clock: Stopwatch) -> tuple[KvCache, Tensor]:
        if not self._held.tokens:
            raise InputError("the stream has no frames yet: push some first")
        if prompt.before != self._head and self.pipeline.prompts.family not in TEMPLATES:
            raise InputError("this prompt has words of the question before the video: append needs them after it")
        with clock("prefill"):
            cache = self._ready(len(prompt.after) + max_new_tokens)
            return cache, self.pipeline.language.extend(cache, self.pipeline.language.embed_tokens(prompt.after)[None])

    def _encode(self, frames: Tensor, clock: Stopwatch) -> list[Tensor]:
        """The tokens [n, D] of each frame."""
        encoder, count = self.pipeline.encoder, len(frames)
        _, rows = self.pipeline.allocate(0, encoder.plan(count).tokens["total"])
        encoder.write_tokens(encoder.features(frames, clock), rows, clock)
        starts = range(0, count * self._per_frame, self._per_frame)
        return [rows[start : start + self._alone].clone() for start in starts]  # each frame's memory is freed by itself

    def _append(self, tokens: list[Tensor]) -> None:
        """Prefill the tokens of frames, and evict the oldest beyond the bound."""
        language, cache = self.pipeline.language, self._ready()
        evicted, held = self._held.evicted, self._held.tokens
        while tokens:
            fit = max(1, self.most - len(held))
            coming, tokens = tokens[:fit], tokens[fit:]
            language.prefill(cache, torch.cat(coming)[None])
            held = held + coming
            if len(held) > self.most:
                self._cache = None  # if this fails, the next question prefills what is held
                language.drop(cache, len(self._head), self._evicts * self._per_frame)
                evicted, held = evicted + self._evicts, held[self._evicts :]
                held[0] = held[0][-self._alone :]
        self._held = _Held(evicted, held)
        self._cache = cache

    def _ready(self, room: int = 0) -> KvCache:
        """The keys and values of what is held, with room for `room` tokens beyond a full cache."""
        language, held = self.pipeline.language, self._held.tokens
        least = len(self._head) + self._most_tokens + room
        if self._cache is None or self._cache.capacity < least:
            cache = language.new_cache(1, rounded_up(least))
            if self._cache is None:
                language.prefill(cache, torch.cat([language.embed_tokens(self._head), *held])[None])
            else:
                cache.take(self._cache, [0])
            self._cache = cache
        self._cache.length = len(self._head) + sum(map(len, held))
        return self._cache


def is_frame_by_frame(layout: Layout) -> bool:
    """Whether every frame has tokens of its own, equally many and contiguous."""
    together = layout.interleaved or len(layout.pathways) == 1
    each = all(path.frames.rule == "each" and not path.pad for path in layout.pathways)
    return together and each and all(separator.where != "end" for separator in layout.separators)

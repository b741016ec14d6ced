"""Questions about a stream, at any moment of it: frames are pushed as they come, and memory does not grow with them.

Of a stream that is kept (`StreamSession`, `MemorySession`) a question sees the tokens of its moment, which are
prefilled anew where frames came. One that is appended (`AppendSession`) goes into the key/value cache as it comes: a
question costs its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import BackendError, ContextError, InputError, LayoutError, check_count
from ..layouts.layout import Layout
from ..layouts.plan import Plan
from ..model.prompts import TEMPLATES, Prompt
from ..ops.memory_stream import MemoryStream
from ..ops.stream import SlowFastStream
from ..ops.token_offsets import token_frames
from ..reduction.prefilling import Place
from ..video import as_frames
from .answer import Answer
from .conversation import Conversation, PrefilledSession, rounded_up
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache
    from .pipeline import Pipeline

StreamMode = Literal["slowfast", "memory", "append"]
STREAM_MODES = get_args(StreamMode)
# Tokens of a question, with its prompt, that an appended stream leaves room for where the caller sets no bound.
_QUESTION = 256


class StreamSession(PrefilledSession):
    """A stream of which evenly spaced frames are kept; made by `SlowFastLlava.open_stream`.

    An answer is that of a `Session` about the frames that are kept at its moment. What they are prefilled to serves
    further questions for as long as they stay the same.

    stream: what is kept, and by which rule.
    """

    def __init__(self, model: Pipeline, stream: SlowFastStream | MemoryStream, name: str) -> None:
        # Features are projected as they come: nothing is left to commute.
        super().__init__(model, name, "exact")
        self.stream = stream
        self._shown: object = None  # what `_embeds` are the tokens of
        model.check_context(model.shortest_prompt(), *self._when_full(), 1)

    def push(self, frames: Tensor) -> None:
        """The next frames, uint8 RGB [t, H, W, 3], one or many; their size may change from push to push.

        Raises InputError or OutOfMemoryError; the stream is then as it was.
        """
        frames = as_frames(frames)
        with self.model.exclusive.answering(), torch.inference_mode():
            self.check_open()
            with Stopwatch(self.model.device)("aggregate"):  # of what the stream itself allocates
                self.stream.push(frames)

    @property
    def frames(self) -> list[int]:
        """Numbers in the stream of the frames kept."""
        self.check_open()
        return list(self.stream.frames)

    @property
    def plan(self) -> Plan:
        self.check_open()
        return self.stream.plan

    @property
    def seen(self) -> int:
        """Frames pushed."""
        self.check_open()
        return self.stream.seen

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.closed else self.stream.nbytes)

    def encode(self, before: tuple[int, ...], clock: Stopwatch) -> Tensor:
        showing = self._what_is_shown()
        if showing != self._shown:
            self._embeds = self._shown = None
        embeds = super().encode(before, clock)
        self._shown = showing
        return embeds

    def close(self, spare: bool = False) -> None:
        with self.model.exclusive.taken():
            super().close(spare)
            self.stream = None

    def _when_full(self) -> tuple[int, int]:
        """Tokens and frames that are shown at most."""
        most = self.stream.most
        return self.stream.layout.plan(most, self.model.checkpoint.grid).tokens["total"], most

    def _what_is_shown(self) -> object:
        return self.stream.frames

    def _write_video(self, rows: Tensor, clock: Stopwatch) -> None:
        self.model.write_tokens(self.stream.features, rows, clock)


class MemorySession(StreamSession):
    """A stream with a memory: the last frames in full, older ones as condensed clips."""

    _selection: dict[str, Any] = {}

    def ask(
        self, question: str, *arguments: Any, scores: Sequence[float] | Literal["question"] | None = None, **more: Any
    ) -> Answer:
        """Answer a question, as `Conversation.ask` does.

        scores: which of `stream.clips` are shown where not all can be: those that score highest, a number each;
            "question": those closest to the question, by cosine with the mean of its tokens' embeddings; None: all,
            the most similar neighbours merged.
        """
        with self.model.exclusive.answering():
            self._selection = self._select_by(question, scores)
            return self.answer(question, *arguments, **more)

    @property
    def tokens(self) -> dict[str, int]:
        recent, total = super().tokens, self.stream.count_tokens()
        clips = total - recent.pop("total")
        return recent | {"clips": clips, "total": total}

    def _select_by(self, question: str, scores: Sequence[float] | str | None) -> dict[str, Any]:
        if not isinstance(scores, str):
            return {"scores": scores}
        if scores != "question":
            raise InputError(f'scores must be numbers, "question" or None, not {scores!r}')
        ids = self.model.tokenizer(question, add_special_tokens=False).input_ids
        return {"question": self.model.language.embed_tokens(ids).float().mean(0)}

    def place(self, before: tuple[int, ...]) -> Place:
        sizes = [len(clip.tokens) for clip in self.stream.clips[: self.stream.shown_clips]]
        *clips, recent = accumulate(sizes, initial=len(before))
        return Place(len(before), (*clips, *token_frames(self.plan, recent)), None)

    def _when_full(self) -> tuple[int, int]:
        stream, grid = self.stream, self.model.checkpoint.grid
        clips = stream.shown_clips * stream.clip_layout.plan(stream.clip_frames, grid).tokens["total"]
        return clips + stream.layout.plan(stream.recent_frames, grid).tokens["total"], stream.recent_frames

    def _what_is_shown(self) -> object:
        return self.stream.seen, [clip.frames for clip in self.stream.select(**self._selection)]

    def _write_video(self, rows: Tensor, clock: Stopwatch) -> None:
        with clock("aggregate"):
            self.stream.tokens(**self._selection, out=rows)


class _Held(NamedTuple):
    """The frames in an appended cache: how many were there before them, and the tokens [n, D] of each; but for the
    first, with what stands between it and the one before."""

    evicted: int
    tokens: list[Tensor]


class AppendSession(Conversation):
    """A stream whose tokens go into a growing key/value cache as they come (VideoLLM-online, arXiv 2406.11816); made by
    `SlowFastLlava.open_stream`.

    A question is answered from what is there, costs its own tokens alone, and is forgotten; a follow-up brings the
    earlier turns with it. What stands before the video in an open question's prompt stands there in every one.

    Beyond `most` frames the oldest quarter is evicted: the others move to its place and their keys to its positions, as
    if the stream had begun with them. The keys and values of the layers behind the first go on remembering it, as they
    were computed with it in sight. So they cannot be computed again, and `max_sessions` does not release them: their
    memory is bounded by `most`, and allocated once but for questions longer than any before.
    """

    slow_frames: list[int] = []

    def __init__(self, model: Pipeline, most: int | None, name: str) -> None:
        super().__init__(model, name, "exact")
        if model.prefilling.text:
            raise InputError(f"append takes no reduction, such as {model.prefilling.text}: take another mode")
        layout = model.layout
        if not _is_frame_by_frame(layout):
            raise LayoutError(f"{layout} is not laid out frame by frame, each alike: append takes such layouts")
        language, prompt = model.language, model.shortest_prompt()
        if not language.moves_keys:
            raise BackendError("the keys of this language model cannot be moved: take another mode than append")
        self._head = prompt.before
        between = [k for k, separator in enumerate(layout.separators) if separator.where == "between"]
        self._between = model.separators[between] if between else None
        self._alone = layout.plan(1, model.checkpoint.grid).tokens["total"]
        self._per_frame = self._alone + len(between)
        self._context = min(model.checkpoint.context, language.rescales_after or model.checkpoint.context)
        if most is None:
            room = self._context - len(self._head) - _QUESTION - model.max_new_tokens
            most = max(1, room // self._per_frame - 1)
        check_count("frames", most)
        self.most = most
        # As many as there ever are: one more than are kept, before the oldest go.
        self._most_tokens = (most + 1) * self._per_frame
        self._evicts = -(-most // 4)  # a key is then moved four times at most, and rounded as often
        self._held = _Held(0, [])
        self._cache: KvCache | None = None  # None: to be prefilled with what is held
        self._check_context(prompt, 1)

    def push(self, frames: Tensor) -> None:
        """The next frames, uint8 RGB [t, H, W, 3], one or many; their size may change from push to push.

        Raises InputError or OutOfMemoryError; the session is then as it was.
        """
        frames, clock = as_frames(frames), Stopwatch(self.model.device)
        with self.model.exclusive.answering(), torch.inference_mode():
            self.check_open()
            tokens = [part for few in frames.split(self.model.frames_per_pass) for part in self._encode(few, clock)]
            if self._between is not None:
                tokens = [torch.cat([self._between, part]) if i else part for i, part in enumerate(tokens, self.seen)]
            with clock("prefill"):
                self._append(tokens)

    @property
    def frames(self) -> list[int]:
        """Numbers in the stream of the frames in the cache."""
        return list(range(self._held.evicted, self.seen))

    @property
    def tokens(self) -> dict[str, int]:
        return self.model.plan(len(self._held.tokens)).tokens

    @property
    def seen(self) -> int:
        """Frames pushed."""
        return self._held.evicted + len(self._held.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that the session holds: keys and values, and the tokens that they were computed from."""
        cache = 0 if self._cache is None else self._cache.nbytes
        return cache + sum(tokens.nbytes for tokens in self._held.tokens)

    def close(self) -> None:
        with self.model.exclusive.taken():
            super().close()
            self._cache, self._held = None, _Held(self.seen, [])

    def _check_context(self, prompt: Prompt, max_new_tokens: int) -> None:
        # Not the tokens of now: what can be asked does not change as the stream goes on.
        words = len(self._head) + len(prompt.after)
        total = self._most_tokens + words + max_new_tokens
        if total > self._context:
            raise ContextError(
                f"{self._most_tokens} video tokens + {words} of prompt + {max_new_tokens} new = {total} exceed the "
                f"context of {self._context}: lower max_new_tokens, or open the stream with fewer frames (now "
                f"{self.most}) or a smaller layout than {self.model.layout}"
            )

    def _prefill(self, prompt: Prompt, max_new_tokens: int, clock: Stopwatch) -> tuple[KvCache, Tensor]:
        if not self._held.tokens:
            raise InputError("the stream has no frames yet: push some first")
        if prompt.before != self._head and self.model.prompt_family not in TEMPLATES:
            raise InputError("this prompt has words of the question before the video: append takes them behind it")
        with clock("prefill"):
            cache = self._ready(len(prompt.after) + max_new_tokens)
            return cache, self.model.language.extend(cache, self.model.language.embed_tokens(prompt.after)[None])

    def _encode(self, frames: Tensor, clock: Stopwatch) -> list[Tensor]:
        """The tokens [n, D] of each frame."""
        model, count = self.model, len(frames)
        _, rows = model.allocate(0, model.plan(count).tokens["total"])
        model.write_tokens(model.features(frames, clock), rows, clock)
        starts = range(0, count * self._per_frame, self._per_frame)
        return [rows[start : start + self._alone].clone() for start in starts]  # each is let go by itself

    def _append(self, tokens: list[Tensor]) -> None:
        """Prefill the tokens of frames, evicting the oldest as the bound is passed."""
        language, cache = self.model.language, self._ready()
        evicted, held = self._held.evicted, self._held.tokens
        while tokens:
            fit = max(1, self.most - len(held))
            coming, tokens = tokens[:fit], tokens[fit:]
            language.prefill(cache, torch.cat(coming)[None])
            held = held + coming
            if len(held) > self.most:
                self._cache = None  # a push that fails from here on leaves what is held to be prefilled anew
                language.drop(cache, len(self._head), self._evicts * self._per_frame)
                evicted, held = evicted + self._evicts, held[self._evicts :]
                held[0] = held[0][-self._alone :]
        self._held = _Held(evicted, held)
        self._cache = cache

    def _ready(self, room: int = 0) -> KvCache:
        """The keys and values of what is held, with room for so many tokens beyond the most that may be."""
        language, held = self.model.language, self._held.tokens
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


def _is_frame_by_frame(layout: Layout) -> bool:
    """Whether every frame has tokens of its own, as many as every other, that stand together."""
    together = layout.interleaved or len(layout.pathways) == 1
    each = all(path.frames.rule == "each" and not path.pad for path in layout.pathways)
    return together and each and all(separator.where != "end" for separator in layout.separators)

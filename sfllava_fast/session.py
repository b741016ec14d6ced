"""Many questions about one video: it is decoded, encoded and prefilled once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .answer import Answer
from .errors import InputError, first_line
from .plan import Plan
from .prompts import Prompt, Turn, pick_option
from .stages import Stopwatch

if TYPE_CHECKING:
    from .kv_cache import KvCache
    from .pipeline import Pipeline
    from .video import Video

_FORMAT = "sfllava_fast session 1"
_ROOM = 256


class Session:
    """A video opened by a model; made by `SlowFastLlava.open` and `SlowFastLlava.load_session`.

    Nothing is decoded before the first question. What the video's tokens are prefilled to is kept: a later question
    costs its own tokens alone, and is answered exactly as it would be first. Asking changes nothing that is kept, so an
    interrupted or failed answer leaves the session as it was.

    turns: the conversation so far, which a follow-up sees.
    """

    def __init__(self, model: Pipeline, video: str, clip: Video | None, frames: Sequence[int], plan: Plan) -> None:
        self.model, self.video, self.frames, self.plan = model, video, list(frames), plan
        self.turns: list[Turn] = []
        self.closed = False
        self._clip = clip
        self._before: tuple[int, ...] = ()
        self._embeds: Tensor | None = None  # [1, P, D]: the prompt before the video, and the video's tokens
        self._cache: KvCache | None = None  # their keys and values, and room for a question and an answer

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
        text as it is generated. clock: has been running since before the question.

        Raises InputError, ContextError or OutOfMemoryError, and on the first question VideoError.
        """
        model = self.model
        self._check_open()
        max_new_tokens = model.check_new_tokens(max_new_tokens)
        prompt = model.prompt(question, choices, self.turns if follow_up else ())
        model.check_context(prompt, self.plan.tokens["total"], len(self.frames), max_new_tokens)
        clock = clock or Stopwatch(model.device)
        with torch.inference_mode():
            self.encode(prompt.before, clock)
            with clock("prefill"):
                cache, logits = self._prefill(prompt, max_new_tokens)
            first = clock.elapsed()
            with clock("generate"):
                (ids,) = model.generate(cache, logits, [cache.length], max_new_tokens, on_token)
        answer = self.make_answer(question, choices, prompt, ids, clock, first)
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
    ) -> Answer:
        """What is told of an answer of these token ids."""
        model = self.model
        text = model.decode_text(ids)
        seconds, steps = clock.by_stage(), len(ids) - 1
        return Answer(
            text=text,
            video=self.video,
            question=question,
            model=model.checkpoint.name,
            layout=str(model.layout),
            frames=self.frames,
            slow_frames=[self.frames[i] for i in self.plan.slow_frames],
            tokens=dict(self.plan.tokens),
            backend=model.backend,
            projector=model.projector,
            attention=model.checkpoint.attention.describe(),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            prompt_tokens=len(prompt),
            token_ids=ids,
            seconds=seconds,
            ttft=ttft,
            tokens_per_second=steps / seconds["generate"] if steps else None,
            choices=[str(choice) for choice in choices] if choices is not None else None,
            option=pick_option(text, choices) if choices is not None else None,
        )

    def encode(self, before: tuple[int, ...], clock: Stopwatch) -> Tensor:
        """The embeddings [1, P, D] of the prompt before the video and of the video, which is encoded only once."""
        if self._embeds is not None and before == self._before:
            return self._embeds
        model = self.model
        embeds, rows = model.allocate(len(before), self.plan.tokens["total"])
        if self._embeds is None:
            model.write_video(self._clip, self.frames, rows, clock)
        else:
            rows.copy_(self.video_tokens())
        with clock("prefill"):
            embeds[0, : len(before)] = model.language.embed_tokens(before)
        self.release()
        self._before, self._embeds, self._clip = before, embeds, None
        return embeds

    def video_tokens(self) -> Tensor:
        """The video's tokens [S, D]."""
        return self._embeds[0, len(self._before) :]

    def _prefill(self, prompt: Prompt, max_new_tokens: int) -> tuple[KvCache, Tensor]:
        """A cache that holds the video and the prompt, and the logits [1, V] behind them."""
        language, after = self.model.language, self.model.language.embed_tokens(prompt.after)[None]
        language.forget_scale()
        total = self._embeds.shape[1] + after.shape[1]
        if language.rescales(total):  # every position depends on how many there are
            cache = language.new_cache(1, total + max_new_tokens)
            return cache, language.extend(cache, torch.cat([self._embeds, after], dim=1))
        cache = self._video_cache(total + max_new_tokens)
        return cache, language.extend(cache, after)

    def _video_cache(self, capacity: int) -> KvCache:
        """The video's keys and values, with room for so many tokens in all."""
        language = self.model.language
        fits = self._cache is not None and self._cache.capacity >= capacity
        room = 0 if fits else _rounded_up(capacity)
        self.model.sessions.touch(self, room * language.token_bytes)
        if not fits:
            cache = self.model.sessions.take_spare(room)
            cache = language.new_cache(1, room) if cache is None else cache
            if self._cache is None:
                language.prefill(cache, self._embeds)
            else:
                cache.take(self._cache, [0])
            self._cache = cache
        self._cache.length = self._embeds.shape[1]
        return self._cache

    @property
    def nbytes(self) -> int:
        """Bytes that the session holds: the video's tokens, and their keys and values."""
        return sum(part.nbytes for part in (self._embeds, self._cache) if part is not None)

    def release(self) -> None:
        """Give the keys and values back; the next question prefills the video's tokens again."""
        self._cache = None
        self.model.sessions.forget(self)

    def close(self, spare: bool = False) -> None:
        """Give everything back, or with `spare` leave the cache's memory to the next session. A closed session can be
        asked nothing."""
        if spare and self._cache is not None:
            self.model.sessions.spare = self._cache
        self.release()
        self._embeds = self._clip = None
        self.closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise InputError(f"the session about {self.video} is closed: open the video again")

    def save(self, path: str | Path) -> Path:
        """Write the session, encoded and prefilled if it is, as one safetensors file, whole or not at all.

        Raises InputError where nothing has been asked yet, or the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._check_open()
        if self._embeds is None:
            raise InputError(f"the session about {self.video} holds nothing yet: ask a question first")
        tensors = {"tokens": self.video_tokens().clone()}
        if self._cache is not None:
            tensors["cache"] = self._cache.buffer[..., : self._embeds.shape[1], :].contiguous()
        facts = {
            "model": self.model.fingerprint(),
            "video": self.video,
            "frames": self.frames,
            "layout": str(self.model.layout),
            "before": self._before,
            "turns": [[turn.question, turn.answer, turn.choices] for turn in self.turns],
        }
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part, metadata={"format": _FORMAT, "session": json.dumps(facts)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write the session to {path}: {first_line(error)}") from error
        finally:
            part.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, model: Pipeline, path: str | Path) -> Session:
        """A saved session, for the model that wrote it. Raises InputError for any other file or model."""
        tensors, facts = _read(Path(path))
        if facts["model"] != model.fingerprint() or facts["layout"] != str(model.layout):
            raise InputError(f"{path} was saved with another model, dtype or layout: open the video again")
        frames, before = facts["frames"], tuple(facts["before"])
        session = cls(model, facts["video"], None, frames, model.layout.plan(len(frames), model.checkpoint.grid))
        session.turns = [Turn(asked, said, choices and tuple(choices)) for asked, said, choices in facts["turns"]]
        with torch.inference_mode():
            embeds, rows = model.allocate(len(before), session.plan.tokens["total"])
            rows.copy_(tensors["tokens"])
            embeds[0, : len(before)] = model.language.embed_tokens(before)
            session._before, session._embeds = before, embeds
            if "cache" in tensors:
                cache = model.language.new_cache(1, _rounded_up(embeds.shape[1]))
                cache.buffer[..., : embeds.shape[1], :] = tensors["cache"]
                session._cache = cache
                model.sessions.touch(session)
        return session


def _rounded_up(tokens: int) -> int:
    """Room for questions and answers somewhat longer than the first, so that the cache seldom moves."""
    return (tokens + _ROOM) // _ROOM * _ROOM


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is not a session of this version: save it again")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["session"])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable session: {first_line(error)}") from error

"""What a session shows of a video: which frames, which tokens, and how to write them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any, Literal, Protocol

from torch import Tensor

from ..errors import InputError
from ..layouts.plan import Plan
from ..ops.memory_stream import MemoryStream
from ..ops.stream import SlowFastStream
from ..ops.token_offsets import token_frames
from ..video import Video
from .pipeline import Pipeline
from .stages import Stopwatch


class TokenSource(Protocol):
    """A video's tokens at this moment.

    Attributes:
        frames: Numbers of the frames that are shown.
        plan: The layout's plan of them.
        tokens: Token counts by pathway, and their total.
        nbytes: Bytes that the source itself holds.
        damage: What is missing of a damaged video, as far as it was read; else None.
    """

    @property
    def damage(self) -> str | None: ...

    @property
    def frames(self) -> list[int]: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def tokens(self) -> dict[str, int]: ...

    @property
    def nbytes(self) -> int: ...

    def version(self) -> Hashable:
        """Changes whenever other tokens are to be shown."""

    def offsets(self, start: int) -> tuple[int, ...]:
        """Offsets [F + 1] of the frames' tokens in a sequence in which the first is at `start`."""

    def place_plan(self) -> Plan | None:
        """The plan of all tokens; None if they are not those of one layout."""

    def write(self, rows: Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the tokens."""

    def close(self) -> None:
        """Release what is held."""


class FileTokens:
    """The tokens of sampled frames of a video; the video is let go when they were written."""

    nbytes = 0

    def __init__(
        self, pipeline: Pipeline, clip: Video | None, frames: Sequence[int], damage: str | None = None
    ) -> None:
        self.pipeline, self.frames, self.damage = pipeline, list(frames), damage
        self.plan = pipeline.plan(len(self.frames))
        self.tokens = dict(self.plan.tokens)
        self._clip = clip

    def version(self) -> Hashable:
        return None

    def offsets(self, start: int) -> tuple[int, ...]:
        return token_frames(self.plan, start)

    def place_plan(self) -> Plan | None:
        return self.plan

    def write(self, rows: Tensor, clock: Stopwatch) -> None:
        assert self._clip is not None  # written once
        self.pipeline.encoder.write_video(self._clip, self.frames, rows, clock)
        self.damage = self._clip.damage
        self._clip = None

    def close(self) -> None:
        self._clip = None


class StreamTokens:
    """The tokens of the frames that a stream keeps."""

    damage = None

    def __init__(self, pipeline: Pipeline, stream: SlowFastStream) -> None:
        self.pipeline, self.stream = pipeline, stream

    @property
    def frames(self) -> list[int]:
        return list(self.stream.frames)

    @property
    def plan(self) -> Plan:
        return self.stream.plan

    @property
    def tokens(self) -> dict[str, int]:
        return dict(self.plan.tokens)

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes

    def most(self) -> tuple[int, int]:
        """Tokens and frames of a full stream."""
        return self.pipeline.plan(self.stream.most).tokens["total"], self.stream.most

    def version(self) -> Hashable:
        return tuple(self.stream.frames)

    def offsets(self, start: int) -> tuple[int, ...]:
        return token_frames(self.plan, start)

    def place_plan(self) -> Plan | None:
        return self.plan

    def write(self, rows: Tensor, clock: Stopwatch) -> None:
        self.pipeline.encoder.write_tokens(self.stream.features, rows, clock)

    def close(self) -> None:
        del self.stream


class MemoryTokens:
    """The tokens of a memory stream: clips of older frames, then the last frames in full."""

    damage = None

    def __init__(self, pipeline: Pipeline, stream: MemoryStream) -> None:
        self.pipeline, self.stream = pipeline, stream
        self._selection: dict[str, Any] = {}

    def select(self, question: str, scores: Sequence[float] | Literal["question"] | None) -> None:
        """Which clips are shown: see `MemorySession.ask`."""
        if scores == "question":
            ids = self.pipeline.prompts.tokenizer(question, add_special_tokens=False).input_ids
            self._selection = {"question": self.pipeline.language.embed_tokens(ids).float().mean(0)}
        elif isinstance(scores, str):
            raise InputError(f'scores must be numbers, "question" or None, not {scores!r}')
        else:
            self._selection = {"scores": scores}

    @property
    def frames(self) -> list[int]:
        return list(self.stream.frames)

    @property
    def plan(self) -> Plan:
        return self.stream.plan

    @property
    def tokens(self) -> dict[str, int]:
        recent, total = dict(self.plan.tokens), self.stream.count_tokens()
        clips = total - recent.pop("total")
        return recent | {"clips": clips, "total": total}

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes

    def most(self) -> tuple[int, int]:
        """Tokens and frames of a full stream."""
        stream, grid = self.stream, self.pipeline.encoder.grid
        clips = stream.shown_clips * stream.clip_layout.plan(stream.clip_frames, grid).tokens["total"]
        return clips + self.pipeline.plan(stream.recent_frames).tokens["total"], stream.recent_frames

    def version(self) -> Hashable:
        return self.stream.seen, tuple(clip.frames for clip in self.stream.select(**self._selection))

    def offsets(self, start: int) -> tuple[int, ...]:
        sizes = [len(clip.tokens) for clip in self.stream.clips[: self.stream.shown_clips]]
        *clips, recent = accumulate(sizes, initial=start)
        return (*clips, *token_frames(self.plan, recent))

    def place_plan(self) -> Plan | None:
        return None

    def write(self, rows: Tensor, clock: Stopwatch) -> None:
        with clock("aggregate"):
            self.stream.tokens(**self._selection, out=rows)

    def close(self) -> None:
        del self.stream

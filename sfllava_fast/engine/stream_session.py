"""Questions about a stream of which frames are kept: at any moment, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.memory_stream import MemoryStream
from ..ops.stream import SlowFastStream
from ..video import as_frames
from .answer import Answer
from .pipeline import Pipeline
from .prefilled_session import PrefilledSession
from .stages import Stopwatch
from .token_sources import MemoryTokens, StreamTokens


class StreamSession(PrefilledSession):
    """A stream of which evenly spaced frames are kept; made by `SlowFastLlava.open_stream`.

    An answer is that of a `Session` about the frames that are kept at that moment. Their keys and values are used again
    as long as the kept frames stay the same.
    """

    source: StreamTokens | MemoryTokens

    def __init__(self, pipeline: Pipeline, source: StreamTokens | MemoryTokens, name: str) -> None:
        # Frames are projected as they come: nothing is left to commute.
        super().__init__(pipeline, name, source, "exact")
        pipeline.check_context(pipeline.prompts.shortest(), *source.most(), 1)

    @property
    def stream(self) -> SlowFastStream | MemoryStream:
        """The kept features."""
        self.check_open()
        return self.source.stream

    @property
    def seen(self) -> int:
        """Frames pushed so far."""
        return self.stream.seen

    def push(self, frames: Tensor) -> None:
        """Add the next frames of the stream. If this fails, the stream is as it was.

        Args:
            frames: uint8 RGB [t, H, W, 3], one or many; H and W may differ from push to push.

        Raises:
            InputError: For other frames, or a closed session.
            OutOfMemoryError: If a stage runs out of memory.
        """
        frames = as_frames(frames)
        clock = Stopwatch(self.pipeline.device)
        # The stage of what the stream itself allocates.
        with self.pipeline.exclusive.answering(), torch.inference_mode(), clock("aggregate"):
            self.stream.push(frames)


class MemorySession(StreamSession):
    """A stream with a memory: the last frames in full, older ones as condensed clips."""

    source: MemoryTokens

    def ask(
        self, question: str, *arguments: Any, scores: Sequence[float] | Literal["question"] | None = None, **more: Any
    ) -> Answer:
        """Answer a question, as `Conversation.ask` does.

        Args:
            question: The question.
            *arguments: Those of `Conversation.ask`.
            scores: Which of `stream.clips` are shown if there are more than fit. Numbers, one a clip: those that score
                highest. "question": those closest to the question, by cosine with the mean of its tokens' embeddings.
                None: all, with the most similar neighbours merged.
            **more: Those of `Conversation.ask`.
        """
        with self.pipeline.exclusive.answering():
            self.check_open()
            self.source.select(question, scores)
            return self.answer(question, *arguments, **more)

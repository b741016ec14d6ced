"""`SlowFastLlava`: a checkpoint that answers questions about videos, one by one, in sessions or in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, LayoutError, check_count
from ..layouts.layout import Layout
from ..layouts.sampling import sample_frames
from ..layouts.slowfast import SlowFastLayout
from ..model.checkpoint import Checkpoint, load_checkpoint
from ..model.shipped import model_dir
from ..ops.memory_stream import MemoryStream
from ..ops.projector import Mode
from ..ops.stream import SlowFastStream
from ..video import Source, open_video
from .answer import Answer
from .append_session import AppendSession, is_frame_by_frame
from .batching import answer_batch
from .options import ModelOptions
from .pipeline import Pipeline
from .session import Session
from .session_pool import DEFAULT_SESSIONS
from .stages import Stopwatch
from .stream_session import MemorySession, StreamSession
from .token_sources import FileTokens, MemoryTokens, StreamTokens

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..reduction.prefilling import Reduction

STREAM_MODES = ("slowfast", "memory", "append")


def check_stream(mode: str, layout: Layout | None = None) -> None:
    """Raise InputError for an unknown mode of a stream, LayoutError for a layout that the mode cannot have."""
    if mode not in STREAM_MODES:
        raise InputError(f"unknown mode {mode!r} of a stream: choose one of {', '.join(STREAM_MODES)}")
    if layout is None:
        return
    if layout.canvas or (mode == "memory" and layout.stage == "before"):
        raise LayoutError(f"{layout} is not a layout for {mode} streams: take sf_llava or another")
    if mode == "append" and not is_frame_by_frame(layout):
        raise LayoutError(f"{layout} is not laid out frame by frame, each alike: append takes such layouts")


class SlowFastLlava:
    """A LLaVA checkpoint that answers questions about videos; load one with `from_pretrained`.

    A context manager: `close` at its end.

    Attributes:
        pipeline: The parts of the loaded model.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        layout: str | Layout | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        attention: str = "auto",
        prompt: str = "auto",
        projector: Mode = "exact",
        max_sessions: int = DEFAULT_SESSIONS,
        max_session_bytes: int | None = None,
        separators: Mapping[str, Tensor] | None = None,
        reduction: str | Reduction | None = None,
    ) -> Self:
        """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint in Hugging Face's or the original format.

        A reduction changes the transformers model; `close` restores it.

        Args:
            path_or_hub_id: A directory, or an id of the Hugging Face Hub. None: the embedded model.
            layout: As all that follow: see `ModelOptions`.

        Raises:
            CheckpointError: For a checkpoint that is missing, incomplete or of another architecture.
            LayoutError, InputError, BackendError: For an option; before anything is loaded if possible.
        """
        options = ModelOptions(
            layout=layout,
            dtype=dtype,
            device=device,
            backend=backend,
            attention=attention,
            prompt=prompt,
            projector=projector,
            max_sessions=max_sessions,
            max_session_bytes=max_session_bytes,
            separators=separators,
            reduction=reduction,
        )
        return cls.load(path_or_hub_id, options)

    @classmethod
    def load(cls, path_or_hub_id: str | Path | None, options: ModelOptions) -> Self:
        """`from_pretrained` with checked options."""
        embedded = path_or_hub_id is None
        path = model_dir() if path_or_hub_id is None else path_or_hub_id
        checkpoint = load_checkpoint(path, options.dtype, options.device, options.attention)
        if embedded:
            checkpoint = replace(checkpoint, name="embedded")
        return cls(Pipeline.build(checkpoint, options, embedded))

    @property
    def checkpoint(self) -> Checkpoint:
        """The stock transformers model and what was loaded with it."""
        return self.pipeline.checkpoint

    @property
    def layout(self) -> Layout:
        """What tokens a video becomes."""
        return self.pipeline.layout

    @property
    def frames(self) -> int:
        """Frames that are sampled if a call names no number."""
        return self.pipeline.frames

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.pipeline.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.pipeline.encoder.dtype

    def with_layout(self, layout: str | Layout) -> SlowFastLlava:
        """This model in another layout; weights and sessions are shared."""
        return SlowFastLlava(self.pipeline.with_layout(layout))

    def open(self, video: Source, frames: int | None = None, decoder: str = "pyav") -> Session:
        """A session of questions about a video. Nothing is decoded before the first question.

        Args:
            video: A file, a folder of frames, an opened Video, or frames in memory (uint8 RGB [T, H, W, 3]).
            frames: Frames to sample; all of a shorter video. None: `SlowFastLlava.frames`.
            decoder: One of `video.DECODERS`.

        Raises:
            VideoError: For a video that cannot be opened.
            InputError, LayoutError, BackendError: For the other arguments.
        """
        frames = self.frames if frames is None else frames
        check_count("frames", frames)
        clip = open_video(video, decoder)
        name = str(video if isinstance(video, (str, os.PathLike)) else clip.path)
        return Session(self.pipeline, name, FileTokens(self.pipeline, clip, sample_frames(clip.total, frames)))

    def open_stream(
        self,
        mode: str = "slowfast",
        frames: int | None = None,
        layout: str | Layout | None = None,
        name: str = "stream",
        **memory: Any,
    ) -> StreamSession | AppendSession:
        """A session about a stream of any length: `push` frames as they come, `ask` at any moment.

        Args:
            mode: "slowfast" keeps evenly spaced frames (`ops.stream.kept_frames`). "memory" keeps the last frames in
                full and older ones as condensed clips (`MemoryStream`). A question prefills what is kept. "append"
                prefills frames as they come: a question costs only its own tokens.
            frames: Frames to keep at most: evenly spaced (None: `SlowFastLlava.frames`), in full (None: 16), or in the
                cache (None: as many as fit beside a question).
            layout: Of the kept frames. None: the model's; its fast pathway if frames are appended.
            name: Of the stream, in the answers.
            **memory: Other arguments of `MemoryStream`.

        Raises:
            InputError, LayoutError, BackendError: For wrong arguments.
            ContextError: If a full stream would leave no room for a question.
        """
        check_stream(mode)
        if frames is not None:
            check_count("frames", frames)
        if layout is None and mode == "append" and isinstance(self.layout, SlowFastLayout) and self.layout.fast_grid:
            layout = self.layout.only("fast")
        pipeline = self.pipeline if layout is None else self.pipeline.with_layout(layout)
        encoder = pipeline.encoder
        check_stream(mode, pipeline.layout)
        if mode == "append":
            return AppendSession(pipeline, frames, name, **memory)

        def encode(pictures: Tensor) -> Tensor:
            return encoder.features(pictures, Stopwatch(encoder.device))

        kept = {"grid": encoder.grid, "backend": encoder.backend, "encode": encode, **memory}
        if mode == "slowfast":
            stream = SlowFastStream(pipeline.layout, pipeline.frames if frames is None else frames, **kept)
            return StreamSession(pipeline, StreamTokens(pipeline, stream), name)
        if frames is not None:
            kept["recent_frames"] = frames
        return MemorySession(pipeline, MemoryTokens(pipeline, MemoryStream(pipeline.layout, **kept)), name)

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote with this model. Raises InputError for any other file."""
        return Session.load(self.pipeline, path)

    def answer(
        self,
        video: Source,
        question: str,
        frames: int | None = None,
        decoder: str = "pyav",
        max_new_tokens: int | None = None,
        choices: Sequence[str] | None = None,
        on_token: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question about a video, greedily. Arguments and errors are those of `open` and `Session.ask`.

        The key/value buffers are kept for the next call.
        """
        clock = Stopwatch(self.device)
        with clock("decode"):
            session = self.open(video, frames, decoder)
        try:
            return session.ask(question, choices, max_new_tokens, on_token=on_token, clock=clock)
        finally:
            session.close(spare=True)

    def answer_batch(
        self,
        questions: Sequence[Sequence[Any]],
        frames: int | None = None,
        decoder: str = "pyav",
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """Answer questions about videos together: one forward pass over all prompts, then one a token for all rows.

        A video that several questions name is decoded, encoded and prefilled once. Memory grows with the rows.

        Args:
            questions: (video, question) or (video, question, choices) each.
            frames: As in `open`.
            decoder: As in `open`.
            max_new_tokens: As in `Session.ask`.

        Returns:
            The answers, in order; their seconds are those of the whole batch.

        Raises:
            SfllavaError: As `answer` does, before any computation if possible.
        """
        sessions: dict[object, Session] = {}
        asked = []
        for number, entry in enumerate(questions):
            if isinstance(entry, str) or not 2 <= len(entry) <= 3:
                raise InputError(f"entry {number} of the batch must be (video, question) or (video, question, choices)")
            video, question = entry[:2]
            key = os.fspath(video) if isinstance(video, (str, os.PathLike)) else id(video)
            if key not in sessions:
                sessions[key] = self.open(video, frames, decoder)
            asked.append((sessions[key], question, entry[2] if len(entry) == 3 else None))
        try:
            with self.pipeline.exclusive.answering():
                self.pipeline.check_open()
                return answer_batch(self.pipeline, asked, self.pipeline.new_tokens(max_new_tokens))
        finally:
            for session in sessions.values():
                session.close()

    def close(self) -> None:
        """Restore the transformers model that a reduction changed. A closed model can be asked nothing."""
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

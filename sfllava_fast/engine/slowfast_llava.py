"""The way in: a LLaVA checkpoint that answers questions about videos, one by one, in sessions or in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, LayoutError, check_count
from ..layouts.layout import Layout
from ..layouts.presets import parse_layout
from ..layouts.sampling import sample_frames
from ..layouts.slowfast import SlowFastLayout
from ..model.attention import resolve_attention
from ..model.checkpoint import choose_device, choose_dtype, load_checkpoint
from ..model.prompts import check_family
from ..ops.backends.aggregate import choose
from ..ops.memory_stream import MemoryStream
from ..ops.projector import Mode, check_mode, why_layout_not_commuted
from ..ops.stream import SlowFastStream
from ..video import Source, open_video
from .answer import Answer
from .batching import answer_batch
from .pipeline import Pipeline
from .session import Session
from .session_pool import DEFAULT_SESSIONS
from .stages import Stopwatch
from .stream_session import STREAM_MODES, AppendSession, MemorySession, StreamMode, StreamSession

if TYPE_CHECKING:
    from ..reduction.prefilling import Reduction


def check_settings(
    layout: str | Layout | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    attention: str = "auto",
    projector: Mode = "exact",
    reduction: str | Reduction | None = None,
    prompt: str = "auto",
) -> None:
    """Raise what `from_pretrained` would of these arguments, as far as it takes no checkpoint to know."""
    from ..reduction.settings import parse_reduction

    check_mode(projector)
    if prompt != "auto":
        check_family(prompt)
    if layout is not None:
        parsed = parse_layout(layout)
        if projector == "commuted" and (reason := why_layout_not_commuted(parsed)):
            raise InputError(f"this model's projector cannot be commuted with pooling: {reason}; use exact or auto")
    if isinstance(reduction, str):
        parse_reduction(reduction)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device, {})
    if backend != "auto":
        choose(backend, torch.empty(1, 1, 8, dtype=dtype, device=device))
    if attention not in ("auto", "sdpa"):  # which serve everywhere, and take measuring on a GPU
        resolve_attention(attention, device, dtype)


class SlowFastLlava(Pipeline):
    """A LLaVA checkpoint that answers questions about videos; load one with `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        layout: str | Layout | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        attention: str = "auto",
        prompt: str = "auto",
        projector: Mode = "exact",
        max_sessions: int = DEFAULT_SESSIONS,
        max_session_bytes: int | None = None,
        separators: Mapping[str, torch.Tensor] | None = None,
        reduction: str | Reduction | None = None,
    ) -> SlowFastLlava:
        """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint, Hugging Face's format or the original; None is the embedded model.

        layout: any, or its text, such as a name of `layouts.PRESETS`, which also says how many frames are sampled; None
        takes the checkpoint's own default, else the paper's. dtype, device: None is float32 on
        a CPU and the checkpoint's 16 bits on a GPU, which is taken where there is one. backend: of the
        aggregator, by name or "auto". attention: one of `attention.CHOICES`. prompt:
        "auto" or one of `prompts.FAMILIES`. projector: "exact", "commuted" or "auto", as in `project_and_aggregate`.
        max_sessions, max_session_bytes: beyond these the least recently used sessions give their key/value caches back;
            the bytes include the cache that `answer` keeps for the next call.
        separators: by name, [D] each, what the layout's separators are; else the checkpoint's newline, else the
        embedding of a text (see `separator_vectors.find_separators`). reduction: fewer of the video's tokens in the
        language model, as `reduction.settings.FORMS` writes it or as its settings; the transformers model is changed
        for it, and put back by `close`, or where the context ends that this model is.

        Raises CheckpointError, LayoutError, BackendError or InputError.
        """
        check_settings(layout, dtype, device, backend, attention, projector, reduction, prompt)
        check_count("max_sessions", max_sessions)
        if max_session_bytes is not None and not (isinstance(max_session_bytes, int) and max_session_bytes > 0):
            raise InputError(f"max_session_bytes must be a number of bytes of at least 1, not {max_session_bytes!r}")
        if separators is not None and not isinstance(separators, Mapping):
            raise InputError(f"separators must be a dict of vectors by name, not a {type(separators).__name__}")
        home = None
        if path_or_hub_id is None:
            from ..model.shipped import model_dir

            home = model_dir()
            checkpoint = replace(load_checkpoint(home, dtype, device, attention), name="embedded")
        else:
            checkpoint = load_checkpoint(path_or_hub_id, dtype, device, attention)
        bounds = max_sessions, max_session_bytes
        return cls(checkpoint, layout, backend, prompt, projector, *bounds, separators, reduction, home)

    def open(self, video: Source, frames: int | None = None, decoder: str = "pyav") -> Session:
        """A session of questions about a video: a file, a folder of frames, an opened Video, or frames in memory (uint8
        RGB [T, H, W, 3]).

        frames: how many to sample (fewer where the video is shorter); None takes the checkpoint's, else 50.
        Raises VideoError, InputError, LayoutError or BackendError.
        """
        frames = self.frames if frames is None else frames
        check_count("frames", frames)
        clip = open_video(video, decoder)
        name = str(video if isinstance(video, (str, os.PathLike)) else clip.path)
        indices = sample_frames(clip.total, frames)
        return Session(self, name, clip, indices, self.plan(len(indices)))

    def open_stream(
        self,
        mode: StreamMode = "slowfast",
        frames: int | None = None,
        layout: str | Layout | None = None,
        name: str = "stream",
        **memory: Any,
    ) -> StreamSession | AppendSession:
        """A session about a stream of any length: `push` frames as they come, `ask` at any moment.

        mode: "slowfast" keeps evenly spaced frames (`stream.kept_frames`), "memory" the last ones in full and older
            ones as condensed clips (`memory.MemoryStream`, whose other settings may follow); a question prefills what
            is kept at its moment. "append" prefills frames as they come, so that a question costs its own tokens alone.
        frames: kept at most: evenly spaced (None: the checkpoint's number, else 50), in full (16), or in the cache (as
            many as fit the context beside a question).
        layout: of the frames kept; None takes the model's, and of it the fast pathway where frames are appended.
        name: of the stream, told with the answers.
        Raises InputError, LayoutError, BackendError, and ContextError where a full stream would leave no room to ask.
        """
        if layout is None and mode == "append" and isinstance(self.layout, SlowFastLayout) and self.layout.fast_grid:
            layout = self.layout.only("fast")
        if frames is not None:
            check_count("frames", frames)
        model = self if layout is None else self.with_layout(layout)
        if model.layout.canvas or (mode == "memory" and model.layout.stage == "before"):
            raise LayoutError(f"{model.layout} is not a layout for {mode} streams: take sf_llava or another")
        if mode == "append":
            return AppendSession(model, frames, name, **memory)
        kept = {"grid": model.checkpoint.grid, "backend": model.backend, **memory}
        kept["encode"] = lambda pictures: model.features(pictures, Stopwatch(model.device))
        if mode == "slowfast":
            most = model.frames if frames is None else frames
            return StreamSession(model, SlowFastStream(model.layout, most, **kept), name)
        if mode == "memory":
            recent = {} if frames is None else {"recent_frames": frames}
            return MemorySession(model, MemoryStream(model.layout, **recent, **kept), name)
        raise InputError(f"unknown mode {mode!r} of a stream: choose one of {', '.join(STREAM_MODES)}")

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote, for this model. Raises InputError for any other file."""
        return Session.load(self, path)

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
        """Answer one question about a video, greedily.

        The arguments and errors are those of `open` and `Session.ask`. The key/value buffers stay for the next call.
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
        questions: Sequence[Sequence],
        frames: int | None = None,
        decoder: str = "pyav",
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """Answer questions about videos together, each (video, question) or (video, question, choices).

        A video that several questions name is decoded, encoded and prefilled once. All prompts are in one forward pass,
        and then all rows' next tokens: memory grows with their number. The seconds told are those of the whole batch.
        Raises as `answer` does, before any computation where possible.
        """
        sessions: dict[object, Session] = {}
        asked = []
        for number, entry in enumerate(questions):
            if isinstance(entry, str) or not 2 <= len(entry) <= 3:
                raise InputError(f"entry {number} of the batch must be (video, question) or (video, question, choices)")
            video, question, choices = (*entry, None)[:3]
            key = os.fspath(video) if isinstance(video, (str, os.PathLike)) else id(video)
            if key not in sessions:
                sessions[key] = self.open(video, frames, decoder)
            asked.append((sessions[key], question, choices))
        try:
            with self.exclusive.answering():
                return answer_batch(self, asked, self.check_new_tokens(max_new_tokens))
        finally:
            for session in sessions.values():
                session.close()

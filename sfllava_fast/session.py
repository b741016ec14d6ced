"""Many questions about one video: it is decoded, encoded and prefilled once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conversation import PrefilledSession, rounded_up
from .errors import InputError, first_line
from .plan import Plan
from .prompts import Turn
from .stages import Stopwatch
from .tensor_file import save_tensors

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .video import Video

_FORMAT = "sfllava_fast session 2"


class Session(PrefilledSession):
    """A video opened by a model; made by `SlowFastLlava.open` and `SlowFastLlava.load_session`.

    Nothing is decoded before the first question. What the video's tokens are prefilled to is kept: a later question
    costs its own tokens alone, and is answered exactly as it would be first.
    """

    def __init__(self, model: Pipeline, video: str, clip: Video | None, frames: Sequence[int], plan: Plan) -> None:
        super().__init__(model, video, model.projector)
        self.frames, self.plan = list(frames), plan
        self._clip = clip

    def encode(self, before: tuple[int, ...], clock: Stopwatch) -> Tensor:
        embeds = super().encode(before, clock)
        if self._clip is not None:
            self.damage = self._clip.damage
        self._clip = None
        return embeds

    def close(self, spare: bool = False) -> None:
        super().close(spare)
        self._clip = None

    def _write_video(self, rows: Tensor, clock: Stopwatch) -> None:
        self.model.write_video(self._clip, self.frames, rows, clock)

    def save(self, path: str | Path) -> Path:
        """Write the session, encoded and prefilled if it is, as one safetensors file, whole or not at all.

        Raises InputError where nothing has been asked yet, or the file cannot be written.
        """
        self.check_open()
        if self._embeds is None:
            raise InputError(f"the session about {self.video} holds nothing yet: ask a question first")
        tensors = {"tokens": self.video_tokens()}
        if self._cache is not None:
            for number, part in enumerate(self._cache.first(self._length)):
                tensors[f"cache.{number}"] = part
        facts = {
            "model": self.model.fingerprint(),
            "video": self.video,
            "frames": self.frames,
            "layout": str(self.model.layout),
            "before": self._before,
            "skipped": None if self._cache is None else self._cache.skipped,
            "turns": [[turn.question, turn.answer, turn.choices] for turn in self.turns],
        }
        metadata = {"format": _FORMAT, "session": json.dumps(facts)}
        return save_tensors("the session", path, tensors, metadata)

    @classmethod
    def load(cls, model: Pipeline, path: str | Path) -> Session:
        """A saved session, for the model that wrote it. Raises InputError for any other file or model."""
        tensors, facts = _read(Path(path))
        if facts["model"] != model.fingerprint() or facts["layout"] != str(model.layout):
            raise InputError(f"{path} was saved with another model, dtype, layout or reduction: open the video again")
        frames, before = facts["frames"], tuple(facts["before"])
        session = cls(model, facts["video"], None, frames, model.plan(len(frames)))
        session.turns = [Turn(asked, said, choices and tuple(choices)) for asked, said, choices in facts["turns"]]
        with torch.inference_mode():
            embeds, rows = model.allocate(len(before), session.plan.tokens["total"])
            rows.copy_(tensors["tokens"])
            embeds[0, : len(before)] = model.language.embed_tokens(before)
            session._before, session._embeds = before, embeds
            if "cache.0" in tensors:
                session._cache = model.language.new_cache(1, rounded_up(session._length), facts["skipped"])
                for number, part in enumerate(session._cache.first(session._length)):
                    part.copy_(tensors[f"cache.{number}"])
                model.sessions.touch(session)
        return session


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

"""Many questions about one video: it is decoded, encoded and prefilled once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..layouts.plan import Plan
from ..model.prompts import Turn
from ..tensor_file import CHECKSUM, load_tensors, save_tensors
from .conversation import PrefilledSession, rounded_up
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..video import Video
    from .pipeline import Pipeline

_FORMAT = "sfllava_fast session 3"


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
        with self.model.exclusive.taken():
            super().close(spare)
            self._clip = None

    def _write_video(self, rows: Tensor, clock: Stopwatch) -> None:
        self.model.write_video(self._clip, self.frames, rows, clock)

    def save(self, path: str | Path) -> Path:
        """Write the session, encoded and prefilled if it is, as one safetensors file, whole or not at all.

        Raises InputError where nothing has been asked yet, or the file cannot be written.
        """
        with self.model.exclusive.taken():
            return self._save(path)

    def _save(self, path: str | Path) -> Path:
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
            "damage": self.damage or "",
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
        """A saved session, for the model that wrote it. Raises InputError for any other file or model, and for one that
        is not as it was written."""
        tensors, facts = _read(Path(path))
        if facts["model"] != model.fingerprint() or facts["layout"] != str(model.layout):
            raise InputError(
                f"{path} was saved with another model, prompt, dtype, layout or reduction: open the video again"
            )
        frames, before = facts["frames"], tuple(facts["before"])
        session = cls(model, facts["video"], None, frames, model.plan(len(frames)))
        session.damage = facts["damage"] or None
        session.turns = [Turn(asked, said, choices and tuple(choices)) for asked, said, choices in facts["turns"]]
        with model.exclusive.taken(), torch.inference_mode(), Stopwatch(model.device)("prefill"):
            if not session._fits(tensors, before, facts["skipped"]):
                raise InputError(f"{path} holds other tensors than this model's sessions do: open the video again")
            embeds, rows = model.allocate(len(before), session.plan.tokens["total"])
            rows.copy_(tensors["tokens"])
            embeds[0, : len(before)] = model.language.embed_tokens(before)
            session._before, session._embeds = before, embeds
            if facts["skipped"] is not None:
                session._cache = model.language.new_cache(1, rounded_up(session._length), facts["skipped"])
                for number, part in enumerate(session._cache.first(session._length)):
                    part.copy_(tensors[f"cache.{number}"])
                model.sessions.touch(session)
        return session

    def _fits(self, tensors: dict[str, Tensor], before: tuple[int, ...], skipped: list[int] | None) -> bool:
        """Whether these are what a session of this model, about these frames, saves."""
        model, video = self.model, self.plan.tokens["total"]
        embedding = model.language.embed.weight
        expected = {"tokens": torch.empty(video, embedding.shape[1], dtype=model.dtype, device="meta")}
        if skipped is not None:
            if len(skipped) != model.language.config.num_hidden_layers or max(skipped) > video:
                return False
            length = len(before) + video + model.prefilling.adds
            for number, part in enumerate(model.language.meta_cache(length, skipped).first(length)):
                expected[f"cache.{number}"] = part
        alike = all(
            name in expected and tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
            for name, tensor in tensors.items()
        )
        return alike and len(tensors) == len(expected) and max(before, default=0) < len(embedding)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, metadata = load_tensors(path)
        if metadata.get("format") == _FORMAT and CHECKSUM in metadata:
            return tensors, _parse_facts(metadata["session"])
    except (LookupError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable session: {first_line(error)}") from error
    raise InputError(f"{path} is not a session of this version: save it again")


def _parse_facts(text: str) -> dict[str, Any]:
    """What `save` wrote beside the tensors; ValueError for anything else."""
    facts = json.loads(text)
    told = {"model": str, "video": str, "damage": str, "layout": str, "frames": list, "before": list, "turns": list}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in told.items()):
        raise ValueError("what it tells of the session is incomplete")
    skipped, turns = facts.get("skipped"), facts["turns"]
    numbers = [facts["frames"], facts["before"], [] if skipped is None else skipped]
    if not all(isinstance(some, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in some) for some in numbers):
        raise ValueError("its frames and tokens are not numbers")
    if not facts["frames"] or not all(map(_is_turn, turns)):
        raise ValueError("it names no frames, or its turns are not questions and answers")
    return facts | {"skipped": skipped}


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, list) or len(turn) != 3 or not isinstance(turn[2], (list, type(None))):
        return False
    return all(isinstance(text, str) for text in [*turn[:2], *(turn[2] or ())])

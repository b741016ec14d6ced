"""Many questions about one video, which is decoded, encoded and prefilled once; saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..model.prompts import Turn
from ..tensor_file import CHECKSUM, load_tensors, save_tensors
from .pipeline import Pipeline
from .prefilled_session import PrefilledSession, rounded_up
from .stages import Stopwatch
from .token_sources import FileTokens

_FORMAT = "sfllava_fast session 3"


class Session(PrefilledSession):
    """A video that a model has opened; made by `SlowFastLlava.open` and `SlowFastLlava.load_session`.

    Nothing is decoded before the first question.
    """

    source: FileTokens

    def __init__(self, pipeline: Pipeline, video: str, source: FileTokens) -> None:
        super().__init__(pipeline, video, source, pipeline.encoder.projector)

    def save(self, path: str | Path) -> Path:
        """Write the session as one safetensors file, whole or not at all; keys and values if they are in memory.

        Returns:
            The path.

        Raises:
            InputError: If nothing has been asked yet, or the file cannot be written.
        """
        with self.pipeline.exclusive.taken():
            return self._save(path)

    def _save(self, path: str | Path) -> Path:
        self.check_open()
        if self._embeds is None:
            raise InputError(f"the session about {self.video} holds nothing yet: ask a question first")
        tensors = {"tokens": self.video_tokens()}
        if self._cache is not None:
            for number, part in enumerate(self._cache.first(self._length(self._embeds))):
                tensors[f"cache.{number}"] = part
        facts = {
            "model": self.pipeline.fingerprint(),
            "video": self.video,
            "damage": self.damage or "",
            "frames": self.frames,
            "layout": str(self.pipeline.layout),
            "before": self._before,
            "skipped": None if self._cache is None else self._cache.skipped,
            "turns": [[turn.question, turn.answer, turn.choices] for turn in self.turns],
        }
        metadata = {"format": _FORMAT, "session": json.dumps(facts)}
        return save_tensors("the session", path, tensors, metadata)

    @classmethod
    def load(cls, pipeline: Pipeline, path: str | Path) -> Session:
        """Load a saved session.

        Raises:
            InputError: For a file that is no session, is damaged, or was saved with another model.
        """
        tensors, facts = _read(Path(path))
        if facts["model"] != pipeline.fingerprint() or facts["layout"] != str(pipeline.layout):
            raise InputError(
                f"{path} was saved with another model, prompt, dtype, layout or reduction: open the video again"
            )
        before = tuple(facts["before"])
        source = FileTokens(pipeline, None, facts["frames"], facts["damage"] or None)
        session = cls(pipeline, facts["video"], source)
        session.turns = [Turn(asked, said, choices and tuple(choices)) for asked, said, choices in facts["turns"]]
        with pipeline.exclusive.taken(), torch.inference_mode(), Stopwatch(pipeline.device)("prefill"):
            if not session._fits(tensors, before, facts["skipped"]):
                raise InputError(f"{path} has other tensors than a session of this model: open the video again")
            embeds, rows = pipeline.allocate(len(before), source.tokens["total"])
            rows.copy_(tensors["tokens"])
            embeds[0, : len(before)] = pipeline.language.embed_tokens(before)
            session._before, session._embeds = before, embeds
            if facts["skipped"] is not None:
                length = session._length(embeds)
                session._cache = pipeline.language.new_cache(1, rounded_up(length), facts["skipped"])
                for number, part in enumerate(session._cache.first(length)):
                    part.copy_(tensors[f"cache.{number}"])
                pipeline.sessions.touch(session)
        return session

    def _fits(self, tensors: dict[str, Tensor], before: tuple[int, ...], skipped: list[int] | None) -> bool:
        """Whether these are the tensors of a session of this model about these frames."""
        pipeline, video = self.pipeline, self.source.tokens["total"]
        language, encoder = pipeline.language, pipeline.encoder
        expected = {"tokens": torch.empty(video, encoder.width, dtype=encoder.dtype, device="meta")}
        if skipped is not None:
            if len(skipped) != language.config.num_hidden_layers or max(skipped) > video:
                return False
            length = pipeline.prefilling.length(len(before) + video)
            for number, part in enumerate(language.meta_cache(length, skipped).first(length)):
                expected[f"cache.{number}"] = part
        alike = all(
            name in expected and tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
            for name, tensor in tensors.items()
        )
        return alike and len(tensors) == len(expected) and max(before, default=0) < pipeline.prompts.rows


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, metadata = load_tensors(path)
        if metadata.get("format") == _FORMAT and CHECKSUM in metadata:
            return tensors, _parse_facts(metadata["session"])
    except (LookupError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable session: {first_line(error)}") from error
    raise InputError(f"{path} is not a session of this version: save it again")


def _parse_facts(text: str) -> dict[str, Any]:
    """The metadata that `save` wrote; raises ValueError for anything else."""
    facts = json.loads(text)
    kinds = {"model": str, "video": str, "damage": str, "layout": str, "frames": list, "before": list, "turns": list}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("its metadata is incomplete")
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

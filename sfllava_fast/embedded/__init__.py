"""A small LLaVA that ships with the package and answers questions about drawn clips (see model/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

from ..model.shipped import is_sample, model_dir, sample_video

__all__ = ["CAVEAT", "is_sample", "model_dir", "sample_answers", "sample_questions", "sample_video"]
_HERE = Path(__file__).parent
CAVEAT = "the embedded model knows drawn shapes only: about other videos its answers mean nothing; name a checkpoint"


def sample_questions() -> list[str]:
    """Questions about the sample video."""
    return [pair["question"] for pair in _sample()]


def sample_answers() -> list[str]:
    """The right answers to `sample_questions`, from the scene that was drawn."""
    return [pair["answer"] for pair in _sample()]


def _sample() -> list[dict[str, str]]:
    return json.loads((_HERE / "sample.json").read_text())

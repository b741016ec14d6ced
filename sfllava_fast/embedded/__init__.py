"""A small LLaVA that ships with the package: it answers questions about drawn clips (see model/README.md)."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

_HERE = Path(__file__).parent
CAVEAT = "the embedded model knows drawn shapes only: about other videos its answers mean nothing; name a checkpoint"


def model_dir() -> Path:
    """The Hugging Face directory of the model."""
    return _HERE / "model"


def mixture_file() -> Path:
    """The scorers of a mixture of depths, and the decoder that was trained with them."""
    return model_dir() / "reduction" / "mixture.safetensors"  # not beside the weights: vLLM loads all that are there


def compression_file() -> Path:
    """Compression tokens, and the decoder that was trained with them."""
    return model_dir() / "reduction" / "compression.safetensors"


def sample_video() -> Path:
    """An encoded clip that training never drew."""
    return _HERE / "sample.mp4"


def is_sample(video: str | os.PathLike[str]) -> bool:
    """Whether a file is the sample video, or a copy of it."""
    with suppress(OSError, ValueError):
        same_size = os.stat(video).st_size == sample_video().stat().st_size
        return same_size and Path(video).read_bytes() == sample_video().read_bytes()
    return False


def sample_questions() -> list[str]:
    """Questions about the sample video."""
    return [pair["question"] for pair in _sample()]


def sample_answers() -> list[str]:
    """The right answers to `sample_questions`, from the scene that was drawn."""
    return [pair["answer"] for pair in _sample()]


def _sample() -> list[dict[str, str]]:
    return json.loads((_HERE / "sample.json").read_text())

"""A small LLaVA that ships with the package: it answers questions about drawn clips (see model/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

_HERE = Path(__file__).parent


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


def sample_questions() -> list[str]:
    """Questions about the sample video."""
    return [pair["question"] for pair in _sample()]


def sample_answers() -> list[str]:
    """The right answers to `sample_questions`, from the scene that was drawn."""
    return [pair["answer"] for pair in _sample()]


def _sample() -> list[dict[str, str]]:
    return json.loads((_HERE / "sample.json").read_text())

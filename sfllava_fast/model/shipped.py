"""Paths of the embedded model, its reductions and its sample video in the package."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_EMBEDDED = Path(__file__).parents[1] / "embedded"


def model_dir() -> Path:
    """The Hugging Face directory of the model."""
    return _EMBEDDED / "model"


def mixture_file() -> Path:
    """The scorers of a mixture of depths, and the decoder that was trained with them."""
    return (
        model_dir() / "reduction" / "mixture.safetensors"
    )  # in a subfolder, since vLLM loads all safetensors of the model's


def compression_file() -> Path:
    """Compression tokens, and the decoder that was trained with them."""
    return model_dir() / "reduction" / "compression.safetensors"


def sample_video() -> Path:
    """A video that training never drew."""
    return _EMBEDDED / "sample.mp4"


def is_sample(video: str | os.PathLike[str]) -> bool:
    """Whether a file is the sample video, or a copy of it."""
    with suppress(OSError, ValueError):
        same_size = os.stat(video).st_size == sample_video().stat().st_size
        return same_size and Path(video).read_bytes() == sample_video().read_bytes()
    return False

"""Sizes that follow from a transformers config."""

from __future__ import annotations

from typing import Any


def tower_grid(vision: Any) -> tuple[int, int]:
    """(rows, columns) of a frame's patches, from a vision tower's config."""
    side = vision.image_size // vision.patch_size
    return side, side


def head_width(text: Any) -> int:
    """Channels of an attention head, from a language model's config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

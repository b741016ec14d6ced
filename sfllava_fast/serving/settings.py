"""The video settings in a served checkpoint's config: layout, frames, and so the number of placeholders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, InputError, check_count
from ..layouts.layout import Layout
from ..layouts.presets import choose_layout, parse_patches_only
from ..model.config_sizes import tower_grid

_KEYS = {"layout", "frames", "prompt"}


@dataclass(frozen=True)
class VideoSettings:
    """How a served model reads videos.

    Attributes:
        layout: Of every video.
        frames: Frames that are sampled, unless a request has another number.
        grid: (rows, columns) of a frame's patches.
    """

    layout: Layout
    frames: int
    grid: tuple[int, int]

    @classmethod
    def from_config(cls, config: Any) -> VideoSettings:
        """The settings of a transformers LLaVA config: "layout" and "frames" of its entry "sfllava_fast", if any.

        Raises:
            InputError, LayoutError: For a wrong entry.
            CheckpointError: If the vision tower's tokens are not a grid.
        """
        options = getattr(config, "sfllava_fast", None) or {}
        if not isinstance(options, dict) or set(options) - _KEYS:
            raise InputError(f"the config's sfllava_fast must be an object of layout and frames, not {options!r}")
        layout, frames = choose_layout(None, options)
        check_count("frames", frames)
        settings = cls(parse_patches_only(layout), frames, _patch_grid(config))
        settings.count_tokens(frames)
        return settings

    def count_tokens(self, frames: int) -> int:
        """Placeholders of a video of `frames` sampled frames. Raises LayoutError if the layout leaves no token."""
        return self.layout.plan(frames, self.grid).tokens["total"]


def _patch_grid(config: Any) -> tuple[int, int]:
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    has_class_token = vision.model_type == "clip_vision_model"
    if has_class_token != (strategy == "default"):
        raise CheckpointError(
            f"vision_feature_select_strategy {strategy!r} does not select exactly a {vision.model_type}'s patches: "
            f"set it to {'default' if has_class_token else 'full'!r}"
        )
    return tower_grid(vision)

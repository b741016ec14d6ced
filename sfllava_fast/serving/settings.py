"""Settings of videos in a served checkpoint's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, InputError
from ..layouts.layout import Layout
from ..layouts.presets import parse_patches_only
from ..layouts.sampling import choose_frames
from ..layouts.slowfast import SlowFastLayout
from ..model.config_sizes import tower_grid

_KEYS = {"layout", "frames", "prompt"}


@dataclass(frozen=True)
class VideoSettings:
    """Settings of a served checkpoint's videos.

    Attributes:
        layout: The layout.
        frames: Number of frames that are sampled from a video unless the request has another number.
        grid: (rows, columns) of a frame's patches.
    """

    layout: Layout
    frames: int
    grid: tuple[int, int]

    @classmethod
    def from_config(cls, config: Any) -> VideoSettings:
        """The settings in a transformers LLaVA config: "layout" and "frames" of its entry "sfllava_fast", if any.

        Raises:
            InputError: If the entry has another form.
            LayoutError: If the layout is wrong, or needs more than patches.
            CheckpointError: If the vision tower's features are not exactly the patches.
        """
        options = getattr(config, "sfllava_fast", None) or {}
        if not isinstance(options, dict) or set(options) - _KEYS:
            raise InputError(f"the config's sfllava_fast must be an object of layout and frames, not {options!r}")
        layout = options.get("layout", SlowFastLayout())
        frames = choose_frames(None, None, options)
        settings = cls(parse_patches_only(layout), frames, _patch_grid(config))
        settings.count_tokens(frames)
        return settings

    def count_tokens(self, frames: int) -> int:
        """Number of placeholders of a video of `frames` sampled frames. Raises LayoutError if there is none."""
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

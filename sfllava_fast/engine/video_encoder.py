"""From frames to a video's tokens: preprocessing, vision tower, projector and aggregator in one layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError, RenumberedError
from ..layouts.layout import Layout
from ..layouts.plan import Plan
from ..layouts.presets import parse_layout
from ..model.checkpoint import Checkpoint
from ..model.separator_vectors import find_separators
from ..model.tower import FRAMES_PER_PASS, Tower
from ..ops.aggregate import slowfast_aggregate
from ..ops.backends.aggregate import choose
from ..ops.projector import Mode, project_and_aggregate, why_not_commuted
from ..video import Video
from ..video.canvas import CanvasVideo
from ..video.pixels import load_pixels
from ..video.preprocess import PreprocessSpec, preprocess
from .options import check_commutes
from .stages import Stopwatch

_LARGEST = 16  # times the tower's pictures: frames are resized to this at most, before they are cropped


class VideoEncoder:
    """A checkpoint's stages before the language model.

    Attributes:
        layout: What tokens a video becomes.
        separators: The layout's separators [K, D], or None.
        tower: The vision tower.
        backend: Name of the aggregator's backend.
        projector: "exact", "commuted" or "auto".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: str | Layout,
        backend: str = "auto",
        projector: Mode = "exact",
        separators: Mapping[str, Tensor] | None = None,
    ) -> None:
        model = checkpoint.model
        self.checkpoint, self.projector = checkpoint, projector
        self.device, self.dtype, self.grid = model.device, model.dtype, checkpoint.grid
        self.tower = Tower(checkpoint)
        self._take_layout(layout, separators)
        self.width = model.config.text_config.hidden_size
        self.backend = choose(backend, torch.empty(1, 1, self.width, dtype=self.dtype, device=self.device)).name
        self.preprocess_spec = _read_spec(checkpoint.preprocessor, model.config.vision_config.image_size)

    def with_layout(self, layout: str | Layout) -> VideoEncoder:
        """This encoder in another layout; the tower is shared."""
        other = copy(self)
        other._take_layout(layout)
        return other

    def plan(self, frames: int) -> Plan:
        """The layout's plan of a video of `frames` sampled frames."""
        return self.layout.plan(self.layout.count_pictures(frames), self.grid)

    def write_video(self, clip: Video, frames: Sequence[int], rows: Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the tokens of these frames of a video."""
        try:
            parts = self._encode_frames(clip, frames, clock)
        except RenumberedError:  # damage that shows late: now the frames' numbers are known
            parts = self._encode_frames(clip, frames, clock)
        with clock("projector"):
            patches = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        if self.projector == "exact" or self.layout.stage == "before":
            self.write_tokens(self._project_first(patches, clock), rows, clock)
        else:
            self._project_and_aggregate(patches, rows, clock)

    def write_tokens(self, features: Tensor, rows: Tensor, clock: Stopwatch) -> None:
        """Fill the rows [S, D] with the tokens of what `features` returned."""
        if self.layout.stage == "before":
            self._project_and_aggregate(features, rows, clock)
            return
        with clock("aggregate"):
            slowfast_aggregate(
                features, self.layout, out=rows, backend=self.backend, grid=self.grid, separators=self.separators
            )

    def features(self, frames: Tensor, clock: Stopwatch) -> Tensor:
        """What the layout pools of frames in memory.

        Args:
            frames: uint8 RGB [T, H, W, 3].
            clock: Times the stages.

        Returns:
            The projector's output [T, N, D], or patch features [T, N, C] if the layout pools before the projector.
        """
        with clock("preprocess"):
            pixels = preprocess(frames, self.preprocess_spec, self.dtype, self.device)
        with clock("vision"):
            patches = self.encode(pixels).contiguous()
        return self._project_first(patches, clock)

    def encode(self, pixels: Tensor) -> Tensor:
        """Patch features [T, N, C] of pixel values [T, 3, h, w], with the class token if the layout reads it."""
        return self.tower.encode(pixels, self.layout.class_token)

    def project(self, patches: Tensor) -> Tensor:
        """Patch features [T, N, C] as the language model's embeddings [T, N, D], by the stock projector."""
        return self.checkpoint.model.model.multi_modal_projector(patches)

    def _take_layout(self, layout: str | Layout, separators: Mapping[str, Tensor] | None = None) -> None:
        parsed = parse_layout(layout)
        if parsed.class_token and not self.checkpoint.drops_first:
            raise InputError(f"{layout} reads the class token, which this model's vision tower does not have")
        if self.projector == "commuted":
            if reason := why_not_commuted(self.checkpoint.model.model.multi_modal_projector):
                raise InputError(f"the projector cannot be commuted with pooling: {reason}; take exact or auto")
            check_commutes(parsed, self.projector)
        self.layout, self.separators = parsed, find_separators(parsed.separators, self.checkpoint, separators)

    def _project_first(self, patches: Tensor, clock: Stopwatch) -> Tensor:
        if self.layout.stage == "before":
            return patches
        with clock("projector"):
            return self.project(patches)

    def _project_and_aggregate(self, patches: Tensor, rows: Tensor, clock: Stopwatch) -> None:
        project_and_aggregate(
            patches,
            self.checkpoint.model.model.multi_modal_projector,
            self.layout,
            mode=self.projector,
            out=rows,
            backend=self.backend,
            grid=self.grid,
            separators=self.separators,
            stage=clock,
        )

    def _encode_frames(self, clip: Video, frames: Sequence[int], clock: Stopwatch) -> list[Tensor]:
        """Patch features of these frames, in parts [t, N, C]; on a GPU decoding continues while the tower runs."""
        if self.layout.canvas:
            clip = CanvasVideo(clip, frames, *self.layout.canvas)
            frames = range(clip.total)
        parts = []
        passes = math.ceil(len(frames) / min(self.tower.frames_per_pass, FRAMES_PER_PASS))
        size = math.ceil(len(frames) / passes)  # equal passes: one of two frames takes as long as one of several
        with load_pixels(clip, frames, self.preprocess_spec, self.dtype, self.device, size) as pixels:
            batches = iter(pixels)
            if self.device.type == "cpu":  # decoding uses its cores: a tower beside it slows both down
                with clock("wait"):
                    batches = _joined(list(batches), max(1, self.tower.frames_per_pass // size))
            while True:
                with clock("wait"):
                    batch = next(batches, None)
                if batch is None:
                    break
                with clock("vision"):
                    parts.append(self.encode(batch))
        clock.add("decode", pixels.decode_seconds)
        clock.add("preprocess", pixels.preprocess_seconds)
        return parts


def _read_spec(processor: dict[str, Any], side: int) -> PreprocessSpec:
    """A checkpoint's image processor; raises CheckpointError if it does not fit a tower of side x side pictures."""
    try:
        spec = PreprocessSpec.from_processor(processor)
        most = max(spec.resized(side, side))
        if not isinstance(spec.rescale, (int, float)) or most > _LARGEST * side:
            raise TypeError(f"rescale_factor {spec.rescale!r}, frames resized to {most}")
    except TypeError as error:  # a value that is no number, or no list of numbers
        raise CheckpointError(f"the image processor's settings cannot be used ({error}): correct them") from error
    made = spec.crop or spec.resized(side, side)
    if made != (side, side):
        raise CheckpointError(
            f"the image processor makes {made[1]}x{made[0]} pictures and the vision tower takes {side}x{side}: set "
            "size and crop_size in preprocessor_config.json"
        )
    return spec


def _joined(batches: list[Tensor], count: int) -> Iterator[Tensor]:
    """The batches, `count` at a time as one."""
    for start in range(0, len(batches), count):
        few = batches[start : start + count]
        yield torch.cat(few) if len(few) > 1 else few[0]

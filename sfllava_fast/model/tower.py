"""The vision tower: patch features of pictures, in passes that fit memory."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .out_of_memory import is_out_of_memory

log = logging.getLogger("sfllava_fast")

# Frames in one pass at most: enough to fill a GPU, few enough to begin while others are decoded.
FRAMES_PER_PASS = 16
_PASS_BYTES = 64 << 20  # activations of a pass on a CPU, where a small tower takes more frames


class Tower:
    """A checkpoint's vision tower.

    Attributes:
        frames_per_pass: Frames that run together; halved when a pass runs out of memory.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.frames_per_pass = self._frames_that_fit()

    def encode(self, pixels: Tensor, class_token: bool = False) -> Tensor:
        """Patch features: `hidden_states[vision_feature_layer]`, several layers side by side.

        Args:
            pixels: [T, 3, h, w], as the checkpoint's image processor makes them.
            class_token: Whether the class token, if the tower has one, stays before the patches.

        Returns:
            [T, N, C], a view if the class token is left out.
        """
        while True:
            try:
                parts = [self.run(part) for part in pixels.split(self.frames_per_pass)]
                break
            except RuntimeError as error:
                if self.frames_per_pass == 1 or not is_out_of_memory(error):
                    raise
            self.frames_per_pass = min(self.frames_per_pass, len(pixels)) // 2 or 1
            log.warning("out of memory in the vision tower: going on with %d frames a pass", self.frames_per_pass)
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        return hidden[:, 1:] if self.checkpoint.drops_first and not class_token else hidden

    def run(self, pixels: Tensor) -> Tensor:
        """One pass: all tokens [T, 1 + N, C], the class token first if the tower has one."""
        tower, depths = self.checkpoint.model.model.vision_tower, self.checkpoint.depths
        if len(depths) == 1:
            return tower(pixels).last_hidden_state
        states = tower(pixels, output_hidden_states=True).hidden_states
        return torch.cat([states[depth] for depth in depths], dim=-1)

    def _frames_that_fit(self) -> int:
        """Frames whose activations take at most a quarter of the free memory.

        On a CPU a small tower takes more frames: the products of few are too small to reach the CPU's rate.
        """
        model, (rows, columns) = self.checkpoint.model, self.checkpoint.grid
        vision = model.config.vision_config
        values = (rows * columns + 1) * (2 * vision.intermediate_size + 8 * vision.hidden_size)
        if model.device.type == "cpu":
            return max(FRAMES_PER_PASS, _PASS_BYTES // (values * model.dtype.itemsize))
        free, _ = torch.cuda.mem_get_info(model.device)
        return max(1, min(FRAMES_PER_PASS, free // (4 * values * model.dtype.itemsize)))

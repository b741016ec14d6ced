"""Frames to pixel values, as CLIP's image processor computes them, but without Pillow and frame by frame.

torch's antialiased uint8 resize matches Pillow's, rows first and then columns: it differs by at most 1 in a few values
per thousand, and by 2 in some when it enlarges. Pillow 13 resizes tall frames columns first, and so differs from its
earlier versions; torch and this module match the earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import InputError, dtype_name

ResizeMode = Literal["stretch", "crop", "pad"]
Resample = Literal["bicubic", "bilinear"]
_RESAMPLES: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
_SERIAL = 32767  # elements; torch uses several threads for more
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PreprocessSpec:
    """How a frame is converted to the vision tower's input.

    Attributes:
        size: Pixels of the square (stretch, pad) or of the shorter edge (crop), or (height, width) to stretch to. None
            does not resize.
        crop: (height, width) of the center crop after the resize. None does not crop.
        mean: Mean of each channel, of values after `value * rescale`.
        std: Standard deviation of each channel, of the same values.
        mode: "stretch" ignores the aspect ratio, as the published SF-LLaVA does (`image_aspect_ratio: resize`). "crop"
            keeps it and crops the center, as CLIP does. "pad" first adds borders of the mean colour to make a square,
            as in LLaVA-1.5's training.
        rescale: Factor of the uint8 values.
        resample: "bicubic" or "bilinear".

    Raises:
        InputError: If the values do not make a picture.
    """

    size: int | tuple[int, int] | None = 336
    crop: tuple[int, int] | None = (336, 336)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    mode: ResizeMode = "stretch"
    rescale: float = 1 / 255
    resample: Resample = "bicubic"

    def __post_init__(self) -> None:
        if self.mode not in get_args(ResizeMode):
            raise InputError(f"unknown preprocess mode {self.mode!r}: choose one of {', '.join(get_args(ResizeMode))}")
        if self.resample not in _RESAMPLES.values():
            raise InputError(f"unknown resampling {self.resample!r}: choose bicubic or bilinear")
        for name, edges in (("size", self._edges()), ("crop", self.crop or ())):
            if len(edges) not in (0, 2) or not all(isinstance(n, int) and n > 0 for n in edges):
                raise InputError(f"preprocess {name} must be positive integers, not {getattr(self, name)!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
                raise InputError(f"preprocess {name} must be three numbers, one a channel, not {values!r}")
        if min(self.std) <= 0:
            raise InputError(f"preprocess std must be above 0, not {self.std!r}")
        if self.size is not None and self.crop and any(c > e for c, e in zip(self.crop, self._edges())):
            raise InputError(f"cannot crop {self.crop} out of frames resized to {self.size}: lower crop or raise size")

    @classmethod
    def from_processor(cls, processor: Any, mode: ResizeMode = "stretch") -> PreprocessSpec:
        """The spec of a transformers image processor like CLIP's.

        Args:
            processor: The image processor, or its config as a dict.
            mode: As in the class. A size of {"height", "width"} turns "crop" into "stretch", as in transformers.

        Raises:
            InputError: If the processor has another form or resampling.
        """
        config = processor if isinstance(processor, Mapping) else _as_dict(processor)
        size = _read_size(config.get("size")) if config.get("do_resize", True) else None
        crop = _read_size(config.get("crop_size")) if config.get("do_center_crop", True) else None
        if isinstance(crop, int):
            crop = (crop, crop)
        if isinstance(size, tuple) and mode == "crop":
            mode = "stretch"
        resample = config.get("resample", 3)
        if resample not in _RESAMPLES:
            raise InputError(
                f"the image processor has resample={resample}, and supported are 2 (bilinear) and 3 (bicubic)"
            )
        normalise = config.get("do_normalize", True)
        return cls(
            size=size,
            crop=crop,
            mode=mode,
            resample=_RESAMPLES[resample],
            mean=tuple(config.get("image_mean") or CLIP_MEAN) if normalise else (0.0, 0.0, 0.0),
            std=tuple(config.get("image_std") or CLIP_STD) if normalise else (1.0, 1.0, 1.0),
            rescale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a frame of this size after the resize and before the crop."""
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        if self.mode != "crop":
            return self.size, self.size
        short, long = sorted((height, width))
        edge = int(self.size * long / short)
        return (self.size, edge) if height <= width else (edge, self.size)

    def made(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the pixels of a frame of this size. Raises InputError if the frame is too small."""
        if self.mode == "pad":
            height = width = max(height, width)
        height, width = self.resized(height, width)
        if self.crop and (self.crop[0] > height or self.crop[1] > width):
            raise InputError(
                f"cannot crop {self.crop[1]}x{self.crop[0]} out of frames of {width}x{height}: resize them first"
            )
        return self.crop or (height, width)

    def _edges(self) -> tuple[int, ...]:
        if self.size is None:
            return ()
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


def preprocess(
    frames: torch.Tensor,
    spec: PreprocessSpec = PreprocessSpec(),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Resize and normalise frames.

    Args:
        frames: uint8 RGB [n, H, W, 3].
        spec: The preprocessing.
        dtype: Of the pixels.
        device: Where the work is done.

    Returns:
        [n, 3, h, w] of `dtype` on `device`.

    Raises:
        InputError: If frames have another shape or dtype, or are smaller than the crop.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
        raise InputError(f"frames must be uint8 [n, H, W, 3], not {dtype_name(frames.dtype)} {list(frames.shape)}")
    out = empty_pixels(len(frames), *spec.made(*frames.shape[1:3]), dtype, device)
    workers = min(torch.get_num_threads(), len(frames)) if out.device.type == "cpu" else 1
    if workers < 2:
        for frame, pixels in zip(frames, out):
            write_pixels(frame, spec, pixels)
        return out
    with ThreadPoolExecutor(workers, "sfllava-preprocess") as pool:
        for _ in pool.map(write_pixels, frames, [spec] * len(frames), out):
            pass
    return out


def empty_pixels(count: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An uninitialised [count, 3, height, width] for `write_pixels`."""
    shape = (count, 3, height, width)
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # NumPy requests huge pages and torch does not: page faults of small pages cost more than the arithmetic.
    return torch.from_numpy(np.empty(shape, f"i{dtype.itemsize}")).view(dtype)


def write_pixels(frame: torch.Tensor, spec: PreprocessSpec, out: torch.Tensor) -> None:
    """Resize and normalise a frame on the device of `out`. On a CPU it uses one thread.

    Args:
        frame: uint8 RGB [H, W, 3].
        spec: The preprocessing.
        out: [3, h, w] with (h, w) = `spec.made(H, W)`.
    """
    # A view in channels-last memory: torch's fast path for three interleaved bytes.
    pixels = _move(frame, out.device).permute(2, 0, 1)[None]
    if spec.mode == "pad":
        pixels = _pad_square(pixels, spec)
    size = spec.resized(*pixels.shape[-2:])
    if size != tuple(pixels.shape[-2:]):
        pixels = _resize(pixels, size, spec.resample)
    _normalise(_crop_middle(pixels[0], out.shape[-2:]), spec, out)


def _move(frame: torch.Tensor, device: torch.device) -> torch.Tensor:
    if frame.device == device or device.type != "cuda":
        return frame.to(device)
    # torch does not reuse pinned memory before its copy is done.
    return frame.pin_memory().to(device, non_blocking=True)


def _normalise(pixels: torch.Tensor, spec: PreprocessSpec, out: torch.Tensor) -> None:
    scale, shift = _scale_and_shift(spec, out.device)
    if out.device.type != "cpu":
        out.copy_(pixels.float().mul_(scale).sub_(shift))
        return
    # NumPy, since torch would start several threads in each thread that calls this.
    values = out.numpy() if out.dtype == torch.float32 else np.empty(out.shape, np.float32)
    np.copyto(values, pixels.numpy())
    values *= scale.numpy()
    values -= shift.numpy()
    if out.dtype != torch.float32:
        for part, full in zip(out.view(-1).split(_SERIAL), torch.from_numpy(values).view(-1).split(_SERIAL)):
            part.copy_(full)


@lru_cache(maxsize=8)
def _scale_and_shift(spec: PreprocessSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), float32 [3, 1, 1]: the result is pixel * scale - shift."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (spec.rescale / std).to(device), (mean / std).to(device)


def _resize(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    if pixels.device.type == "cpu":
        return F.interpolate(pixels, size, mode=mode, antialias=True)
    # Other devices have no uint8 kernel: two passes, with halves rounded up in between as in Pillow.
    for step in ((pixels.shape[-2], size[1]), size):
        pixels = F.interpolate(pixels.float(), step, mode=mode, antialias=True).add_(0.5).floor_().clamp_(0, 255)
    return pixels


def _pad_square(pixels: torch.Tensor, spec: PreprocessSpec) -> torch.Tensor:
    """The frames, centered in a square of the mean colour."""
    count, channels, height, width = pixels.shape
    if height == width:
        return pixels
    side = max(height, width)
    colour = torch.tensor([int(v * 255) for v in spec.mean], dtype=torch.uint8, device=pixels.device)
    square = colour.expand(count, side, side, channels).contiguous().permute(0, 3, 1, 2)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top : top + height, left : left + width] = pixels
    return square


def _crop_middle(pixels: torch.Tensor, crop: Sequence[int]) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return pixels[..., top : top + crop[0], left : left + crop[1]]


def _as_dict(processor: Any) -> Mapping[str, Any]:
    if not hasattr(processor, "to_dict"):
        raise InputError(f"expected a transformers image processor or its config, not {type(processor).__name__}")
    return processor.to_dict()


def _read_size(size: Any) -> int | tuple[int, int]:
    """A transformers size: a number, {"shortest_edge": n} or {"height": h, "width": w}."""
    if isinstance(size, Mapping):
        if size.get("height") and size.get("width"):
            return (size["height"], size["width"])
        if size.get("shortest_edge"):
            return size["shortest_edge"]
    elif isinstance(size, int):
        return size
    elif isinstance(size, Sequence) and len(size) == 2:
        return tuple(size)
    raise InputError(f"cannot read the image processor's size {size!r}: expected shortest_edge, or height and width")

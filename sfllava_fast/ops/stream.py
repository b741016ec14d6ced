"""Streams of any length in bounded memory: which frames are kept as it grows, and their tokens at any moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, check_count
from ..layouts.layout import Layout
from ..layouts.plan import Plan
from ..layouts.presets import parse_layout
from ..layouts.slowfast import SlowFastLayout
from .aggregate import resolve_plan, slowfast_aggregate

Encode = Callable[[Any], Tensor]


def kept_frames(seen: int, most: int) -> range:
    """The frames of a stream that are kept, by the dyadic rule.

    Every stride-th frame from frame 0 on is kept; the stride is the smallest power of two that leaves at most `most`. So
    when `most` frames are held and another is due, every other one is dropped and the stride doubles. Of `most` frames
    or more, more than most / 2 are kept at any time, evenly spaced, and no dropped frame is needed again. Uniform
    sampling has no such property: every position moves with each new frame.

    Args:
        seen: frames of the stream so far.
        most: frames held at most.

    Returns:
        The numbers of the kept frames.

    Raises:
        InputError: a number is no integer of at least 0 (`seen`) or 1 (`most`).
    """
    if not isinstance(seen, int) or seen < 0:
        raise InputError(f"the frames seen must be an integer of at least 0, not {seen!r}")
    check_count("most", most)
    stride = 1 << max(0, -(-seen // most) - 1).bit_length()
    return range(0, seen, stride)


class SlowFastStream:
    """A growing video: `push` frames as they arrive, take its `tokens` at any time.

    The tokens equal bit for bit those of `slowfast_aggregate` on the features of `frames`, which `kept_frames` selects.
    Each frame is encoded once, into one buffer that is allocated once. Memory and time per frame do not grow with the
    stream. Not differentiable.

    Args:
        layout: a layout or its text.
        most: frames held at most.
        grid, backend: as in `slowfast_aggregate`.
        encode: a function of frames [r, ...], a strided view of pushed frames, that returns features [r, N, D]. It does
            not get frames that are dropped within the same push. None if the frames are features already.

    Attributes:
        seen: frames pushed.
    """

    def __init__(
        self,
        layout: Layout | str = SlowFastLayout(),
        most: int = 50,
        *,
        grid: tuple[int, int] | None = None,
        backend: str = "auto",
        encode: Encode | None = None,
    ) -> None:
        check_count("most", most)
        check_encode(encode)
        self.layout, self.most, self.grid, self.backend = parse_layout(layout), most, grid, backend
        self.seen = 0
        self._encode = encode
        self._buffer: Tensor | None = None  # [most, N, D]; its first rows are the frames kept
        self._intact = True

    @torch.no_grad()
    def push(self, frames: Any) -> None:
        """Adds the next frames. If it raises, the stream is unchanged.

        Args:
            frames: [t, ...], at least one, or anything with a length and slices that `encode` takes.

        Raises:
            InputError: no frames, or features that are not [r, N, D] of the first ones' shape, dtype and device.
            LayoutError: the layout does not fit the features.
        """
        self._check_intact()
        seen = self.seen + count_frames(frames)
        kept = kept_frames(seen, self.most)
        due = slice_frames(frames, slice(-self.seen % kept.step, None, kept.step))
        features = None
        if len(due) or self._encode is None:
            features = encode_frames(self._encode, due, like=self._buffer)
        buffer = self._buffer
        if buffer is None:
            assert features is not None  # frame 0 is kept
            buffer = self._buffer = self._allocate(features)
        # An interrupt between the copies leaves rows of two strides, which must not be read.
        self._intact = False
        held = self._thin(buffer, kept.step // self.stride)
        if features is not None:
            buffer[held : len(kept)].copy_(features)
        self.seen, self._intact = seen, True

    def tokens(self, out: Tensor | None = None, separators: Tensor | None = None) -> Tensor:
        """Tokens [S, D] of the kept frames; InputError before the first frame.

        Args:
            out, separators: as in `slowfast_aggregate`.
        """
        return slowfast_aggregate(
            self.features, self.layout, out=out, backend=self.backend, grid=self.grid, separators=separators
        )

    def count_tokens(self) -> int:
        """The number of tokens that `tokens` returns now."""
        return self.plan.tokens["total"]

    @property
    def plan(self) -> Plan:
        """The layout's plan for the kept frames, numbered from 0."""
        return resolve_plan(self.features, self.layout, self.grid)

    @property
    def frames(self) -> range:
        """The numbers of the kept frames in the stream."""
        return kept_frames(self.seen, self.most)

    @property
    def stride(self) -> int:
        """The step from one kept frame to the next."""
        return self.frames.step

    @property
    def nbytes(self) -> int:
        """Bytes that the stream holds: those of its buffer, from the first push on."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def features(self) -> Tensor:
        """Features [t, N, D] of the kept frames, a view that the next push changes. InputError before the first."""
        self._check_intact()
        if self._buffer is None:
            raise InputError("the stream has no frames yet: push some first")
        return self._buffer[: len(self.frames)]

    def _allocate(self, features: Tensor) -> Tensor:
        """A buffer for frames of this kind; the error of a layout that does not fit them."""
        with torch.inference_mode(False):  # else it could not be written outside inference mode
            buffer = features.new_empty(self.most, *features.shape[1:])
        resolve_plan(buffer, self.layout, self.grid)
        return buffer

    def _thin(self, buffer: Tensor, step: int) -> int:
        """Keeps every step-th of the rows held, moved together in place; returns their number."""
        held = len(self.frames[::step])
        if step > 1:
            for row in range(1, held):
                buffer[row].copy_(buffer[row * step])
        return held

    def _check_intact(self) -> None:
        if not self._intact:
            raise InputError("a push was interrupted as it moved frames: this stream has lost some, open another")


def count_frames(frames: Any) -> int:
    """The number of pushed frames; InputError if there are none."""
    try:
        count = len(frames)
    except TypeError:
        raise InputError(f"push frames as [t, ...], not {type(frames).__name__} without a length") from None
    if count == 0:
        raise InputError("push one frame or more")
    return count


def slice_frames(frames: Any, which: slice) -> Any:
    """frames[which]; InputError for what cannot be sliced."""
    try:
        return frames[which]
    except (TypeError, KeyError, ValueError, RuntimeError):
        raise InputError(f"push frames as [t, ...], not {type(frames).__name__} that cannot be sliced") from None


def check_encode(encode: object) -> None:
    """InputError unless it is None or callable."""
    if encode is not None and not callable(encode):
        raise InputError(f"encode must be a function of frames, or None, not {type(encode).__name__}")


def encode_frames(encode: Encode | None, frames: Any, like: Tensor | None) -> Tensor:
    """Features [r, N, D] of r frames; InputError unless they have N, D, dtype and device of `like` [..., N, D]."""
    features = frames if encode is None else encode(frames)
    if not isinstance(features, Tensor):
        raise InputError(f"features must be a torch.Tensor, not {type(features).__name__}")
    if features.dim() != 3 or len(features) != len(frames) or not features.is_floating_point():
        raise InputError(
            f"features must be [frames, patches, channels] of {len(frames)} frames, floating point, "
            f"not {list(features.shape)} {features.dtype}"
        )
    if like is not None and _kind(features) != _kind(like):
        raise InputError(f"this stream's features are {_kind(like)}, not {_kind(features)}: open another stream")
    return features


def _kind(features: Tensor) -> str:
    patches, channels = features.shape[-2:]
    return f"[{patches}, {channels}] {features.dtype} on {features.device}"

"""Where the tokens of each frame are in a sequence."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from torch import Tensor

from ..errors import InputError
from ..layouts.plan import Plan


def token_frames(plan: Plan, start: int = 0) -> tuple[int, ...]:
    """Where each frame's tokens begin in a sequence that has the plan's tokens from `start` on, and where the last end.

    A pathway's frame bin is a frame of its own: SF-LLaVA's 50 frames are 10 slow ones of 288 and 50 fast ones of 16.
    Separators and zeros count to the frame before them; separators at the end are text.
    """
    end = plan.offsets[-1] - sum(separator.where == "end" for separator in plan.separators)
    return (*(start + item.first_token for item in plan.items), start + end)


def placeholder_frames(input_ids: Tensor, placeholders: Collection[int]) -> tuple[int, ...] | None:
    """Where a prompt's vision tokens begin and end, as one frame; None where it has none.

    input_ids: int64 [B, S]. placeholders: the ids that stand for vision tokens.
    Raises InputError unless they are one run, at the same place in every row.
    """
    found = sum((input_ids == token for token in placeholders), start=input_ids < 0)
    places = found.any(0).nonzero()[:, 0]
    if not len(places):
        return None
    start, stop = int(places[0]), int(places[-1]) + 1
    if not bool(found[:, start:stop].all()):
        raise InputError(
            "input_ids have several runs of vision tokens, or rows with theirs at different places: "
            "give one run a prompt and batch prompts of one form, or say `with mixture.on_frames(offsets)`"
        )
    return start, stop


def check_frames(frames: Sequence[int]) -> tuple[int, ...]:
    """Frame offsets [F + 1] as integers. Raises InputError where they do not ascend."""
    try:
        frames = tuple(int(at) for at in frames)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        frames = ()
    if len(frames) < 2 or frames[0] < 0 or any(stop <= start for start, stop in zip(frames, frames[1:])):
        raise InputError("frames must be where each frame's tokens begin and the last end, ascending: 0, 16, 32, ...")
    return frames


def check_ratio(ratio: float) -> float:
    """InputError unless it is in (0, 1]."""
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise InputError(f"ratio must be above 0 and at most 1, not {ratio!r}")
    return float(ratio)


def kept_of(ratio: float, tokens: int) -> int:
    """How many of a frame's tokens are kept: ratio * tokens, rounded up."""
    return math.ceil(ratio * tokens - 1e-9)  # 0.1 * 30 is a little more than 3


def clip_frames(frames: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """The frames within tokens [start, stop), counted from `start`; empty where there are none."""
    if stop <= frames[0] or start >= frames[-1]:
        return ()
    inside = [min(max(at, start), stop) - start for at in frames]
    return tuple(sorted(set(inside)))

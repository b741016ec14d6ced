"""Where the tokens of each frame are in a sequence.

Token offsets are [F + 1] positions, ascending: where each frame's tokens begin, and where those of the last frame end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from torch import Tensor

from ..errors import InputError
from ..layouts.plan import Plan


def token_frames(plan: Plan, start: int = 0) -> tuple[int, ...]:
    """The token offsets of a plan's tokens in a sequence.

    Each frame bin of a pathway counts as a frame: SF-LLaVA's 50 frames are 10 slow ones of 288 tokens and 50 fast ones
    of 16. Separators and zeros belong to the frame before them; separators at the end are text.

    Args:
        plan: of the video.
        start: position of the plan's first token.

    Returns:
        [F + 1] positions.
    """
    end = plan.offsets[-1] - sum(separator.where == "end" for separator in plan.separators)
    return (*(start + item.first_token for item in plan.items), start + end)


def placeholder_frames(input_ids: Tensor, placeholders: Collection[int]) -> tuple[int, ...] | None:
    """The token offsets of a prompt's vision tokens, as one frame; None without any.

    Args:
        input_ids: int64 [B, S].
        placeholders: the ids of vision tokens.

    Returns:
        (first position, position after the last), or None.

    Raises:
        InputError: the vision tokens are not one run, at the same positions in every row.
    """
    found = sum((input_ids == token for token in placeholders), start=input_ids < 0)
    places = found.any(0).nonzero()[:, 0]
    if not len(places):
        return None
    start, stop = int(places[0]), int(places[-1]) + 1
    if not bool(found[:, start:stop].all()):
        raise InputError(
            f"input_ids have several runs of vision tokens between {start} and {stop}, or rows with theirs at other "
            "places: give one run a prompt and batch prompts of one form, or use `with mixture.on_frames(offsets)`"
        )
    return start, stop


def check_frames(token_offsets: Sequence[int]) -> tuple[int, ...]:
    """Token offsets as integers; InputError unless they ascend from 0 or more."""
    try:
        offsets = tuple(int(at) for at in token_offsets)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        offsets = ()
    if len(offsets) < 2 or offsets[0] < 0 or any(stop <= start for start, stop in zip(offsets, offsets[1:])):
        wrong = f", not {list(offsets)}" if 0 < len(offsets) <= 16 else ""
        raise InputError(
            f"token_offsets must be ascending, each frame's first token and the end of the last: 0, 16, 32, ...{wrong}"
        )
    return offsets


def check_ratio(ratio: float) -> float:
    """InputError unless it is in (0, 1]."""
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise InputError(f"ratio must be above 0 and at most 1, not {ratio!r}")
    return float(ratio)


def kept_of(ratio: float, tokens: int) -> int:
    """How many of a frame's tokens are kept: ratio * tokens, rounded up."""
    return math.ceil(ratio * tokens - 1e-9)  # 0.1 * 30 is a little more than 3


def clip_frames(token_offsets: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """The token offsets within positions [start, stop), counted from `start`; empty without any."""
    if stop <= token_offsets[0] or start >= token_offsets[-1]:
        return ()
    inside = [min(max(at, start), stop) - start for at in token_offsets]
    return tuple(sorted(set(inside)))

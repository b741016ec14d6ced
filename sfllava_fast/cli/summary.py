"""An answer in the terminal: its text on stdout, what it cost on stderr."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from ..terminal import as_json, shown

if TYPE_CHECKING:
    from ..engine.answer import Answer

log = logging.getLogger("sfllava_fast")


def print_answer(answer: Answer, in_json: bool) -> None:
    """Print an answer and its summary, or one JSON object."""
    if answer.choices and answer.choice is None:
        log.warning("the answer is none of the choices")
    if in_json:
        print(as_json(answer.to_json()))
        return
    print(shown(answer.text if answer.choice is None else answer.choice))
    sys.stdout.flush()
    print(shown(summary(answer)), file=sys.stderr)


def summary(answer: Answer) -> str:
    """Three lines: frames and tokens, seconds by stage, what ran."""
    stages = "  ".join(f"{stage} {value:.3f}" for stage, value in answer.seconds.items())
    rate = f"{answer.tokens_per_second:.1f} tokens/s, " if answer.tokens_per_second else ""
    kept = f", {answer.kept:,} kept by {answer.reduction}" if answer.reduction else ""
    slow = f", {len(set(answer.slow_frames))} of them slow" if answer.slow_frames else ""
    kernels = f"aggregator {answer.backend}, attention {answer.attention}"
    return "\n".join(
        (
            f"frames   {len(answer.frames)}{slow}; tokens: {token_counts(answer)}{kept}",
            f"seconds  {answer.ttft:.3f} to the first token: {stages}",
            f"ran      {rate}{answer.dtype} on {answer.device}, {kernels}",
        )
    )


def token_counts(answer: Answer) -> str:
    """The video's tokens by pathway and separator, and their total."""
    parts = [f"{name} {count:,}" for name, count in answer.tokens.items() if count and name != "total"]
    return f"{' + '.join(parts)} = {answer.tokens['total']:,}"

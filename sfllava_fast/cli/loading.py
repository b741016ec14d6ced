"""What commands check and load before they run."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import BackendError, InputError

if TYPE_CHECKING:
    from ..engine.options import ModelOptions
    from ..engine.slowfast_llava import SlowFastLlava
    from ..layouts.layout import Layout
    from ..video import Video


def check_questions(questions: Sequence[str], choices: Sequence[str] | None = None) -> None:
    """Raise InputError for an empty question or wrong choices."""
    from ..model.prompts import format_options

    if not all(question.strip() for question in questions):
        raise InputError('the question is empty: ask something, such as "What happens in the video?"')
    if choices is not None:
        format_options(choices)


def model_options(args: argparse.Namespace) -> ModelOptions:
    """The options of a command line, checked before anything is loaded or decoded."""
    from ..engine.options import ModelOptions

    names = ("layout", "dtype", "device", "backend", "attention", "projector", "reduction")
    return ModelOptions(**{name: getattr(args, name) for name in names})


def load_model(path: str | None, options: ModelOptions) -> SlowFastLlava:
    """The model of a command; None: the embedded one."""
    from ..engine.slowfast_llava import SlowFastLlava

    return SlowFastLlava.load(path, options)


def open_timed(path: str, decoder: str) -> tuple[Video, float]:
    """The opened video, and the seconds that this took without the decoder's import."""
    from ..video import import_decoder, open_video

    with contextlib.suppress(BackendError):  # open_video raises it if this video needs the decoder
        import_decoder(decoder)
    start = time.perf_counter()
    return open_video(path, decoder), time.perf_counter() - start


def checkpoint_defaults(model: str, layout: str | None) -> tuple[Layout, int, tuple[int, int]]:
    """Layout, frames and grid of a checkpoint from its config alone; `layout` replaces its own."""
    from ..layouts.presets import choose_layout
    from ..model.checkpoint import config_grid, locate, read_config

    path = locate(model)
    config = read_config(path)
    return *choose_layout(layout, config.get("sfllava_fast")), config_grid(path, config)

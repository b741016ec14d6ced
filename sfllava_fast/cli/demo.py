"""The command `demo`: the embedded model on its sample video."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..output_folder import check_folder
from ..terminal import shown
from .loading import load_model
from .progress import progress
from .summary import token_counts

if TYPE_CHECKING:
    from rich.table import Table

    from ..engine.answer import Answer


def run_demo(args: argparse.Namespace) -> None:
    """Answer questions about the sample video, and draw what each pathway takes."""
    from .. import embedded
    from ..engine.options import ModelOptions
    from ..inspect import render

    out = args.out / "sfllava_fast_demo.png"
    check_folder(out)
    clip = embedded.sample_video()
    with progress() as show:
        show("loading the model")
        model = load_model(None, ModelOptions())
        session, answers = model.open(clip), []
        for question in embedded.sample_questions():
            show(question)
            answers.append(session.ask(question))
        show("drawing")
        render(clip, out, model.layout, model.frames, model.checkpoint.grid)
    _print_answers(answers, embedded.sample_answers())
    print(shown(f"What each pathway took: {out}"))


def _print_answers(answers: list[Answer], truths: list[str]) -> None:
    from rich.console import Console

    first = answers[0]
    console = Console(highlight=False, markup=False)
    console.print(f"{Path(first.video).name}: {len(first.frames)} frames, layout {first.layout}")
    console.print(f"tokens: {token_counts(first)}")
    console.print(_answer_table(answers, truths))
    console.print(_stage_table(answers))


def _answer_table(answers: list[Answer], truths: list[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    right = [answer.text == truth for answer, truth in zip(answers, truths)]
    table = Table(
        "Question",
        "Answer",
        "Drawn",
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        caption_style="",
        caption=f"{sum(right)} of {len(right)} answers are right (the clip is drawn: the truth is known).",
    )
    for answer, truth, is_right in zip(answers, truths, right):
        table.add_row(Text(answer.question), Text(answer.text, "green" if is_right else "red"), Text(truth))
    return table


def _stage_table(answers: list[Answer]) -> Table:
    """Milliseconds by stage: of the first answer, and medians of the others, for which the video is prefilled."""
    from rich import box
    from rich.table import Table

    from ..engine.stages import STAGES

    first, later = answers[0], answers[1:]
    table = Table("Stage", box=box.SIMPLE_HEAD)
    for name in ("First question, ms", "Later ones, ms"):
        table.add_column(name, justify="right")
    for stage in first.seconds:
        after = [f"{1e3 * median(a.seconds[stage] for a in later):.2f}"] if stage in later[0].seconds else [""]
        table.add_row(stage, f"{1e3 * first.seconds[stage]:.2f}", *after, end_section=stage == STAGES[-1])
    table.add_row("to the first token", f"{1e3 * first.ttft:.2f}", f"{1e3 * median(a.ttft for a in later):.2f}")
    return table

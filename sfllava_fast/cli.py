"""The command line: ask a question, answer a file of them, inspect a layout, show what runs here, or see the demo.

Answers go to stdout; progress, summaries, warnings and errors to stderr. Exit codes: 0 done, 2 bad usage or
input (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import BackendError, InputError, SfllavaError

if TYPE_CHECKING:
    from .engine import Answer, SlowFastLlava
    from .video import Video

log = logging.getLogger("sfllava_fast")

PROGRAM = "sfllava-fast"

_TOP_EXAMPLES = """
examples:
  sfllava-fast demo                              the small model that ships answers about its sample video
  sfllava-fast ask clip.mp4 "What happens?"      ask about your own video, file or folder of frames
  sfllava-fast batch FILE --out answers.jsonl    answer a file of questions, and go on after any kill
  sfllava-fast score answers.jsonl               see how many answers are right
  sfllava-fast inspect clip.mp4 --out clip.png   see which frames and patches the layout keeps
  sfllava-fast info                              see what is built and used on this machine, and why

`sfllava-fast COMMAND --help` shows the options of a command, with examples.
"""
_ASK_EXAMPLES = """
examples:
  the model that ships (trained on drawn shapes; meaningless on real footage):
    sfllava-fast ask shapes.mp4 "which direction does the red circle move?"

  a real checkpoint, from a folder or the Hugging Face hub:
    sfllava-fast ask clip.mp4 "What is the man doing?" --model llava-hf/llava-v1.6-vicuna-7b-hf

  fewer frames and another layout, the answer as JSON:
    sfllava-fast ask clip.mp4 "Why?" --frames 32 --layout slowfast-slow_8frms_concat-fast_4x4 --json

  several questions: the video is watched once; --follow-up lets each see the turns before it:
    sfllava-fast ask clip.mp4 "What is on the table?" "Who takes it?" --follow-up

  multiple choice, frames already extracted:
    sfllava-fast ask frames/ "What is in the box?" --choices "a cat" "a dog" "nothing"
"""
_BATCH_EXAMPLES = """
questions.jsonl has a line for each question, and videos lie in one folder:
  {"id": 1, "video": "clip.mp4", "question": "What happens?"}
  {"id": 2, "video": "clip.mp4", "question": "What is in the box?", "choices": ["a cat", "a dog"], "answer": "a dog"}

examples:
  on every GPU of this machine; the same command again goes on where a kill left it:
    sfllava-fast batch questions.jsonl --videos clips/ --out answers.jsonl --workers 8 --model DIR

  a published question file, as CSV or as the lists made of it:
    sfllava-fast batch MSVD_QA.csv --videos MSVD/videos --out msvd.jsonl --model DIR
    sfllava-fast batch val_q.json --truths val_a.json --videos MSVD/videos --out msvd.jsonl --model DIR

  32 requests at a time to a vLLM server that sees the same files:
    sfllava-fast batch questions.jsonl --videos clips/ --out answers.jsonl --server http://host:8000/v1 --workers 32

  what ended as an error, once more:
    sfllava-fast batch questions.jsonl --videos clips/ --out answers.jsonl --workers 8 --model DIR --retry-errors

exit code: 0 every question is answered, 1 some ended as errors, 2 the batch could not go on, 130 interrupted.
"""
_SCORE_EXAMPLES = """
examples:
  multiple choice, overall and by type:
    sfllava-fast score intentqa.jsonl --by question_type

  open-ended, judged by an OpenAI-compatible server (its key in OPENAI_API_KEY):
    sfllava-fast score msvd.jsonl --judge http://host:8000/v1
"""
_BENCH_EXAMPLES = """
examples:
  the model that ships, on a drawn 720p clip:
    sfllava-fast bench

  the shapes of LLaVA-NeXT-7B with random weights, nothing to download, everything written down:
    sfllava-fast bench --config 7b --json pipeline.json --plot pipeline.png --trace trace.json
"""
_INSPECT_EXAMPLES = """
examples:
  the paper's layout, 50 frames of 24x24 patches:
    sfllava-fast inspect clip.mp4 --out clip.png

  what a given model would take (its layout, frames and grid), as one self-contained page:
    sfllava-fast inspect clip.mp4 --out clip.html --model path/to/checkpoint

  another layout:
    sfllava-fast inspect clip.mp4 --out clip.png --layout slowfast-slow_4frms_concat-fast_2x2 --frames 16
"""
_LAYOUT_HELP = "token layout, such as slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as done:  # argparse has said why
        return int(done.code or 0)
    try:
        with _messages(getattr(args, "verbose", False)):
            code = args.run(args)
            sys.stdout.flush()
        return code or 0
    except SfllavaError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left (`| head`): nothing to say, and nothing for Python to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="say more on stderr, the libraries' own messages included",
    )
    style = {"parents": [common], "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Ask questions of videos with SlowFast-LLaVA, fast.",
        epilog=_TOP_EXAMPLES,
        **style,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_ask(commands, style)
    _add_batch(commands, style)
    _add_score(commands, style)
    _add_inspect(commands, style)
    _add_info(commands, style)
    _add_demo(commands, style)
    _add_bench(commands, style)
    return parser


def _add_ask(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "ask",
        help="answer questions about a video",
        description="Answer questions about a video, which is decoded, encoded and prefilled once.",
        epilog=_ASK_EXAMPLES,
        **style,
    )
    _add_video(parser)
    parser.add_argument("questions", metavar="QUESTION", nargs="+")
    parser.add_argument(
        "--follow-up", action="store_true", help="each question after the first sees the earlier turns"
    )
    parser.add_argument("--choices", nargs="+", metavar="CHOICE", help="make it multiple choice")
    _add_model_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the answer alone"
    )
    parser.set_defaults(run=ask)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `ask` and `batch` that say what answers, and how."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="LLaVA-1.5 or LLaVA-NeXT checkpoint, Hugging Face or original format (default: the one that ships)",
    )
    parser.add_argument("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the model's)")
    parser.add_argument("--frames", type=_count, metavar="N", help="frames to sample (default: the model's)")
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="what aggregates the tokens: auto, cpu, cuda, triton or torch (default: auto)",
    )
    parser.add_argument(
        "--projector",
        default="exact",
        metavar="MODE",
        help="exact: the published order, bit for bit; commuted: its second layer runs on pooled tokens, several "
        "times less work and no less accurate; auto: commuted where it can serve (default: exact)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        metavar="NAME",
        help="auto, eager, sdpa, flash_attention_2, _3 or _4 (default: auto)",
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: what suits the device)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_count, metavar="N", help="longest answer (default: the model's)"
    )


def _add_batch(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer a file of questions about many videos",
        description="Answer a file of questions, each video watched once, in worker processes or through a server. "
        "The output is appended to, a line a question: run it again to go on after any kill.",
        epilog=_BATCH_EXAMPLES,
        **style,
    )
    option = parser.add_argument
    option("questions", type=Path, metavar="QUESTIONS", help="JSON lines, or a published file (JSON list or CSV)")
    option("--truths", type=Path, metavar="FILE", help="the published list of true answers that belongs to it")
    option("--videos", type=Path, default=Path(), metavar="DIR", help="folder of the videos (default: here)")
    option("--out", type=Path, required=True, metavar="FILE.jsonl", help="where answers are appended")
    option("--workers", type=_count, default=1, metavar="N", help="processes, or requests at a time (default: 1)")
    option("--server", metavar="URL", help="ask a vLLM server, such as http://host:8000/v1, instead of a model here")
    option("--upload", action="store_true", help="send videos to the server, for one that does not see the files")
    option("--attempts", type=_count, default=3, metavar="N", help="before a question is an error (default: 3)")
    option("--timeout", type=_seconds, metavar="SECONDS", help="for one answer, its video included (default: none)")
    option("--retry-errors", action="store_true", help="ask again what ended as an error")
    option("--ray", action="store_true", help="workers are actors of a Ray cluster; needs the extra [ray]")
    _add_model_options(parser)
    _add_decoder(parser)
    parser.set_defaults(run=batch)


def _add_score(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "score",
        help="count the right answers of a batch",
        description="Count the right answers of a batch: multiple choice by the published option rule, open-ended ones "
        "by a judge. Verdicts are kept: run it again to go on after any kill.",
        epilog=_SCORE_EXAMPLES,
        **style,
    )
    option = parser.add_argument
    option("answers", type=Path, metavar="ANSWERS.jsonl", help="what `sfllava-fast batch` wrote")
    option("--judge", metavar="URL", help="an OpenAI-compatible server that judges open-ended answers")
    option("--judge-model", metavar="NAME", help="(default: the first that the server has)")
    option("--out", type=Path, metavar="FILE.jsonl", help="verdicts (default: beside the answers, .judged.jsonl)")
    option("--workers", type=_count, default=4, metavar="N", help="requests at a time (default: 4)")
    option("--by", metavar="FIELD", help="also by the values of this field, such as question_type")
    option("--retry-errors", action="store_true", help="ask the judge again where it gave no verdict")
    option("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=score)


def _add_inspect(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="draw which frames and patches a layout keeps",
        description="Draw the sampled frames, which are slow, what each pathway keeps, and the token budget.",
        epilog=_INSPECT_EXAMPLES,
        **style,
    )
    _add_video(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE.png|FILE.html", help="picture to write"
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help="take layout, frames and grid from this checkpoint"
    )
    parser.add_argument("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the paper's)")
    parser.add_argument("--frames", type=_count, metavar="N", help="frames to sample (default: 50)")
    parser.add_argument("--grid", type=_grid, metavar="HxW", help="patches of a frame (default: 24x24)")
    parser.set_defaults(run=inspect)


def _add_info(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "info",
        help="show what is built, loaded and used, and why not",
        description="Show what is built, loaded and used on this machine, and why not.",
        epilog="example:\n  sfllava-fast info --json",
        **style,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=info)


def _add_demo(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "demo",
        help="the model that ships answers questions about its sample video",
        description="Ask the model that ships about its sample video, and draw what its layout keeps.",
        epilog="example:\n  sfllava-fast demo --out pictures",
        **style,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder of the picture (default: here)"
    )
    parser.set_defaults(run=demo)


def _add_bench(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the pipeline here, stage by stage, against the plain one",
        description="Measure where the time to an answer goes, against the plain pipeline on the same weights: the "
        "same tokens first, then paired rounds. Exit code 1 where answers differ or the gate is missed.",
        epilog=_BENCH_EXAMPLES,
        **style,
    )
    add_bench_options(parser)
    parser.set_defaults(run=bench)


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sfllava-fast bench` and of `python -m bench pipeline`."""
    option = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR_OR_HUB_ID", help="a checkpoint (default: the one that ships)")
    which.add_argument("--config", metavar="NAME", help="random weights of real shapes: 7b, 34b, small or tiny")
    option("--video", type=Path, metavar="FILE", help="(default: a clip of 1280x720 that is drawn for the run)")
    option("--question", action="append", metavar="TEXT", help="may be repeated; the first one is timed")
    option("--frames", type=_count, metavar="N", help="frames to sample (default: 50)")
    option("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the model's)")
    option("--new-tokens", type=_count, metavar="N", help="longest answer (default: 32)")
    option("--rounds", type=_count, metavar="N", help="paired rounds (default: 9)")
    option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    option("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: what suits the device)")
    option("--attention", metavar="NAME", help="of both pipelines: auto, eager, sdpa or flash_attention_2")
    option("--backend", metavar="NAME", help="of our aggregator (default: auto)")
    option("--json", type=Path, metavar="FILE", help="write the figures here")
    option("--plot", type=Path, metavar="FILE.png", help="draw the stages of both as bars")
    option("--trace", type=Path, metavar="FILE.json", help="write a profile of one answer, for ui.perfetto.dev")
    option("--gate", type=float, metavar="MARGIN", help="exit 1 where a ratio misses MARGIN times its bar")


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="a video file, or a folder of image frames")
    _add_decoder(parser)


def _add_decoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoder",
        default="pyav",
        metavar="pyav|decord",
        help="what reads the video (default: pyav, exact on every container)",
    )


def ask(args: argparse.Namespace) -> None:
    if not all(question.strip() for question in args.questions):
        raise InputError('the question is empty: ask something, such as "What happens in the video?"')
    options = _model_options(args)
    # Before the model, which may take long to load: a bad video should fail at once.
    video, opened = _open(args.video, args.decoder)
    with _progress() as say:
        say("loading the model")
        model = _load(args.model, **options)
        session = model.open(video, args.frames)
        for number, question in enumerate(args.questions):
            say("thinking" if number else "watching the video")
            answer = session.ask(
                question,
                args.choices,
                args.max_new_tokens,
                follow_up=args.follow_up and number > 0,
                on_token=_Told(say),
            )
            if not number:
                answer.seconds["decode"] += opened
            _print_answer(answer, args.json)


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `SlowFastLlava.from_pretrained` takes, beside the model."""
    from .config import SlowFastConfig

    names = ("dtype", "device", "backend", "attention", "projector")
    layout = None if args.layout is None else SlowFastConfig.parse(args.layout)
    return {"layout": layout, **{name: getattr(args, name) for name in names}}


def _print_answer(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer.to_json(), ensure_ascii=False))
        return
    print(answer.text if answer.choice is None else answer.choice)
    sys.stdout.flush()
    print(_summary(answer), file=sys.stderr)


def batch(args: argparse.Namespace) -> int:
    from .offline.questions import by_video, read_questions
    from .offline.run import run

    groups = by_video(read_questions(args.questions, args.truths))
    make, settings = _server_answerer(args) if args.server else _model_answerer(args)
    limits = {"workers": args.workers, "attempts": args.attempts, "retry_errors": args.retry_errors}
    if not args.server:  # a client keeps the time itself: waiting for a server is not the question's fault
        limits["timeout"] = args.timeout
    if args.ray:
        from .offline.ray_workers import RayWorker

        limits["start"] = RayWorker
    summary, complete = run(groups, args.out, settings, make, **limits)
    print(summary, file=sys.stderr)
    return 0 if complete else 1


def _model_answerer(args: argparse.Namespace) -> tuple[Callable, dict[str, Any]]:
    from .offline.answerers import model_answerer

    from .video import import_decoder

    if args.upload:
        raise InputError("--upload is for a server: name it with --server")
    import_decoder(args.decoder)  # rather than when every worker has loaded its model
    options = {name: getattr(args, name) for name in ("frames", "decoder", "max_new_tokens")}
    return model_answerer(args.model, args.videos, **_model_options(args), **options)


def _server_answerer(args: argparse.Namespace) -> tuple[Callable, dict[str, Any]]:
    from .offline.answerers import server_answerer

    defaults = {"backend": "auto", "attention": "auto", "projector": "exact", "decoder": "pyav", "ray": False}
    given = [
        f"--{name}"
        for name in ("layout", "frames", "dtype", "device", *defaults)
        if getattr(args, name) != defaults.get(name)
    ]
    if given:
        raise InputError(f"{', '.join(given)}: the server decides that; leave it out")
    return server_answerer(args.server, args.model, args.videos, args.max_new_tokens, args.timeout, args.upload)


def score(args: argparse.Namespace) -> None:
    from .offline.score import score, table

    options = ("judge", "judge_model", "out", "workers", "by", "retry_errors")
    figures = score(args.answers, **{name: getattr(args, name) for name in options})
    if args.json:
        print(json.dumps({name: of.to_json() for name, of in figures.items()}, ensure_ascii=False))
        return
    print(table(figures))


def inspect(args: argparse.Namespace) -> None:
    from .config import SlowFastConfig
    from .inspect import render

    layout, frames, grid = _defaults_of(args.model) if args.model else (SlowFastConfig(), 50, (24, 24))
    with _progress() as say:
        say("drawing")
        layout = layout if args.layout is None else args.layout
        out = render(args.video, args.out, layout, args.frames or frames, args.grid or grid, args.decoder)
    print(out)


def info(args: argparse.Namespace) -> None:
    from .info import report

    facts = report()
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    width = max(len(name) for section in facts.values() for name in section)
    for section, rows in facts.items():
        print(section)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")


def demo(args: argparse.Namespace) -> None:
    from . import embedded
    from .inspect import render

    out = args.out / "sfllava_fast_demo.png"
    if not args.out.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {args.out}")
    clip = embedded.sample_video()
    with _progress() as say:
        say("loading the model")
        model = _load(None)
        session, answers = model.open(clip), []
        for question in embedded.sample_questions():
            say(question)
            answers.append(session.ask(question))
        say("drawing")
        render(clip, out, model.layout, model.frames, model.checkpoint.grid)
    _print_demo(answers, embedded.sample_answers())
    print(f"What each pathway took: {out}")


def bench(args: argparse.Namespace) -> int:
    from .parts import import_part

    try:
        import_part("_bench", "bench")
        from ._bench.report import main
    except ImportError as error:
        needs = "pip install 'sfllava_fast[bench,llava,video]'"
        raise BackendError(f"the benchmark lacks something ({error}): {needs}") from error
    return main(args)


def _print_demo(answers: list[Answer], expected: list[str]) -> None:
    from rich.console import Console

    first = answers[0]
    console = Console(highlight=False, markup=False)
    console.print(f"{Path(first.video).name}: {len(first.frames)} frames, layout {first.layout}")
    console.print(f"tokens: {_tokens(first)}")
    console.print(_answer_table(answers, expected))
    console.print(_stage_table(answers))


def _answer_table(answers: list[Answer], expected: list[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    right = [answer.text == truth for answer, truth in zip(answers, expected)]
    table = Table(
        "Question",
        "Answer",
        "Drawn",
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        caption_style="",
        caption=f"{sum(right)} of {len(right)} answers are right (the clip is drawn: the truth is known).",
    )
    for answer, truth, is_right in zip(answers, expected, right):
        table.add_row(Text(answer.question), Text(answer.text, "green" if is_right else "red"), Text(truth))
    return table


def _stage_table(answers: list[Answer]) -> Any:
    """Milliseconds by stage: the first answer's, and the medians of the others, which have the video behind them."""
    from statistics import median

    from rich import box
    from rich.table import Table

    from .stages import STAGES

    first, later = answers[0], answers[1:]
    table = Table("Stage", box=box.SIMPLE_HEAD)
    for name in ("First question, ms", "Later ones, ms"):
        table.add_column(name, justify="right")
    for stage in first.seconds:
        after = [f"{1e3 * median(a.seconds[stage] for a in later):.2f}"] if stage in later[0].seconds else [""]
        table.add_row(stage, f"{1e3 * first.seconds[stage]:.2f}", *after, end_section=stage == STAGES[-1])
    table.add_row("to the first token", f"{1e3 * first.ttft:.2f}", f"{1e3 * median(a.ttft for a in later):.2f}")
    return table


def _summary(answer: Answer) -> str:
    """Three lines about an answer: frames and tokens, seconds by stage, what ran."""
    seconds = answer.seconds
    stages = "  ".join(f"{stage} {value:.3f}" for stage, value in seconds.items())
    rate = f"{answer.tokens_per_second:.1f} tokens/s, " if answer.tokens_per_second else ""
    slow = len(set(answer.slow_frames))
    return "\n".join(
        [
            f"frames   {len(answer.frames)}, {slow} of them slow; tokens: {_tokens(answer)}",
            f"seconds  {answer.ttft:.3f} to the first token: {stages}",
            f"ran      {rate}{answer.dtype} on {answer.device}, aggregator {answer.backend}, "
            f"attention {answer.attention}",
        ]
    )


def _tokens(answer: Answer) -> str:
    tokens = answer.tokens
    return f"slow {tokens['slow']:,} + fast {tokens['fast']:,} = {tokens['total']:,}"


def _load(path: str | None, **options: Any) -> SlowFastLlava:
    from .engine import SlowFastLlava

    return SlowFastLlava.from_pretrained(path, **options)


def _open(path: str, decoder: str) -> tuple[Video, float]:
    """The opened video, and the seconds that took."""
    from .video import import_decoder, open_video

    with contextlib.suppress(BackendError):  # open_video says it, where the decoder is needed at all
        import_decoder(decoder)
    start = time.perf_counter()
    return open_video(path, decoder), time.perf_counter() - start


def _defaults_of(model: str) -> tuple[str, int, tuple[int, int]]:
    """Layout, frames and grid of a checkpoint, from its config alone."""
    from .checkpoint import config_grid, locate, read_config
    from .config import SlowFastConfig

    path = locate(model)
    config = read_config(path)
    options = config.get("sfllava_fast") or {}
    return options.get("layout", str(SlowFastConfig())), options.get("frames", 50), config_grid(path, config)


class _Told:
    """Counts generated tokens for the progress line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.count = say, 0

    def __call__(self, text: str) -> None:
        self.count += 1
        self.say(f"answering, {self.count} tokens")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that says what is being done, on stderr where that is a terminal."""
    console = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            console = Console(stderr=True)
    if console is None:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)


@contextlib.contextmanager
def _messages(verbose: bool) -> Iterator[None]:
    """Our warnings on stderr, one line each; the libraries' only when asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    handler.addFilter(_lower_level)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    if not verbose:
        for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
            os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _lower_level(record: logging.LogRecord) -> bool:
    record.levelname = record.levelname.lower()
    return True


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def _grid(text: str) -> tuple[int, int]:
    with contextlib.suppress(ValueError):
        rows, columns = (int(part) for part in text.lower().split("x"))
        if rows > 0 and columns > 0:
            return rows, columns
    raise argparse.ArgumentTypeError(f"{text!r} is not a grid: write rows x columns, such as 24x24")

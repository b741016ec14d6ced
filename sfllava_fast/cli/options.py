"""The options of the command line. Nothing heavy is imported: help is printed at once, without torch."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..terminal import fit, one_line

PROGRAM = "sfllava-fast"

# Names of modules that are not imported here; a test compares them.
BACKENDS = ("auto", "cpu", "cuda", "triton", "torch")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
PROJECTORS = ("exact", "commuted", "auto")
DTYPES = ("float32", "fp32", "bfloat16", "bf16", "float16", "fp16")
MODES = ("slowfast", "memory", "append")
DECODERS = ("pyav", "decord")
SHAPES = ("tiny", "small", "7b", "34b")

_TOP_EXAMPLES = """
examples:
  sfllava-fast demo                             ask the embedded model
  sfllava-fast ask clip.mp4 "What happens?"     ask about your own video
  sfllava-fast watch - "What happens?"          answer while a stream comes in
  sfllava-fast batch FILE --out answers.jsonl   answer a file of questions
  sfllava-fast score answers.jsonl              count the right answers
  sfllava-fast inspect clip.mp4 --out clip.png  draw what the layout keeps
  sfllava-fast layouts                          list the named layouts
  sfllava-fast info                             show what runs here, and why

`sfllava-fast COMMAND --help` shows the options of a command, with examples.
"""
_ASK_EXAMPLES = """
examples:
  the embedded model (trained on drawn shapes; its answers about real videos mean nothing):
    sfllava-fast ask shapes.mp4 "which direction does the red circle move?"

  a real checkpoint, from a folder or the Hugging Face hub:
    sfllava-fast ask clip.mp4 "What is the man doing?" --model llava-hf/llava-v1.6-vicuna-7b-hf

  fewer frames and another layout, the answer as JSON:
    sfllava-fast ask clip.mp4 "Why?" --frames 32 --layout slowfast-slow_8frms_concat-fast_4x4 --json

  several questions: the video is decoded and encoded once; with --follow-up each sees the earlier turns:
    sfllava-fast ask clip.mp4 "What is on the table?" "Who takes it?" --follow-up

  multiple choice, frames already extracted:
    sfllava-fast ask frames/ "What is in the box?" --choices "a cat" "a dog" "nothing"
"""
_WATCH_EXAMPLES = """
Times are seconds of the stream since its first frame.

examples:
  a file, an answer every 2 seconds of it:
    sfllava-fast watch clip.mp4 "what is there?" --every 2

  a camera; while an answer is computed, the oldest waiting frames are dropped:
    sfllava-fast watch /dev/video0 "Who is at the door?" --every 5 --no-repeat --model DIR

  anything that ffmpeg reads, two questions, JSON lines:
    ffmpeg -i SOURCE -c copy -f matroska - | sfllava-fast watch - "Is it raining?" "How many cars?" --json --model DIR

  a day of a stream, the last minutes in full and older ones condensed:
    sfllava-fast watch rtsp://host/stream "What has happened?" --every 60 --mode memory --model DIR

exit codes: 0 the stream has ended, 2 an error, 130 interrupted.
"""
_BATCH_EXAMPLES = """
questions.jsonl has a line for each question; the videos are in one folder:
  {"id": 1, "video": "clip.mp4", "question": "Who sings?", "answer": "a bird"}
  {"id": 2, "video": "clip.mp4", "question": "Who?", "choices": ["Ada", "Bo"]}

examples:
  on every GPU of this machine; after a kill, the same command continues:
    sfllava-fast batch questions.jsonl --videos clips/ --out answers.jsonl --workers 8 --model DIR

  a published question file, CSV or JSON lists:
    sfllava-fast batch MSVD_QA.csv --videos MSVD/videos --out msvd.jsonl --model DIR
    sfllava-fast batch val_q.json --truths val_a.json --videos MSVD/videos --out msvd.jsonl --model DIR

  32 requests at a time to a vLLM server that sees the same files:
    sfllava-fast batch questions.jsonl --videos clips/ --out answers.jsonl --server http://host:8000/v1 --workers 32

  ask again what ended as an error:
    sfllava-fast batch questions.jsonl --videos clips/ --out answers.jsonl --workers 8 --model DIR --retry-errors

exit codes: 0 every question is answered, 1 some ended as errors, 2 the batch stopped, 130 interrupted.
"""
_SCORE_EXAMPLES = """
examples:
  multiple choice, overall and by type:
    sfllava-fast score intentqa.jsonl --by question_type

  open-ended, judged by an OpenAI-compatible server (its key in OPENAI_API_KEY):
    sfllava-fast score msvd.jsonl --judge http://host:8000/v1

exit codes: 0 all answers are counted, 1 some have no verdict of the judge, 2 an error, 130 interrupted.
"""
_BENCH_EXAMPLES = """
examples:
  the embedded model, on a drawn 720p clip:
    sfllava-fast bench

  the shapes of LLaVA-NeXT-7B with random weights, no download, all results written to files:
    sfllava-fast bench --config 7b --json pipeline.json --plot pipeline.png --trace trace.json
"""
_INSPECT_EXAMPLES = """
examples:
  the paper's layout, 50 frames of 24x24 patches:
    sfllava-fast inspect clip.mp4 --out clip.png

  the layout, frames and grid of a model, as one self-contained page:
    sfllava-fast inspect clip.mp4 --out clip.html --model path/to/checkpoint

  another layout, with its published frames and grid or with other ones:
    sfllava-fast inspect clip.mp4 --out clip.png --layout llava_video_slowfast-newline_grid
    sfllava-fast inspect clip.mp4 --out clip.png --layout pool:stride4,stride2,stride2,mean --frames 32 --grid 27x27
"""
_LAYOUTS_EXAMPLES = """
examples:
  the tokens of 64 frames of SigLIP's 27x27 patches:
    sfllava-fast layouts --frames 64 --grid 27x27

  options follow the name, in the order of the table; any other layout is a list of pathways (docs/layouts.md):
    sfllava-fast layouts --layout llava_next_video-bilinear-newline_grid
    sfllava-fast layouts --layout pool:each,stride3,stride3,max
"""
_LAYOUT_HELP = "token layout: a name that `sfllava-fast layouts` lists, slowfast-..., or pathways"

_REDUCTION_HELP = (
    "fewer video tokens in the language model: mixture:0.2 (some layers compute on a share of each frame's tokens), "
    "fastv:0.5 (from the third layer on, a share of all tokens), prune:64 or prune:0.25 (a number or a share of them "
    "goes in), compress (learned tokens stand in for them); prune and mixture take a scorer, such as "
    "prune:64:similarity (default: none)"
)


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line."""

    took_questions = False

    def error(self, message: str) -> NoReturn:
        if self.took_questions and "QUESTION" in message:
            message = "no question is left: --choices takes all texts after it; put the question before --choices"
        self.exit(2, f"{PROGRAM}: error: {one_line(message)} (`{self.prog} --help` shows how)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps lines as they are written and breaks only long ones; commands can still be pasted."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(self._fit(line, width) for line in text.strip("\n").splitlines())

    def _fit(self, line: str, width: int) -> str:
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith((f"{PROGRAM} ", "ffmpeg ")):
            return fit(line, indent + "  ", " \\", width)
        return fit(line, indent, "", width)


class _Choices(argparse.Action):
    """Takes all texts up to the next option; a question after them would be one of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.took_questions = True
        if [text.rstrip().endswith("?") for text in values] == [False] * (len(values) - 1) + [True] and len(values) > 1:
            parser.error(f"--choices took {values[-1]!r}, which looks like a question: put questions before --choices")
        setattr(namespace, self.dest, values)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        PROGRAM,
        parents=[_common_options()],
        formatter_class=_Formatter,
        description="Ask questions about videos with SlowFast-LLaVA, fast.",
        epilog=_TOP_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for add in (
        _add_ask,
        _add_watch,
        _add_batch,
        _add_score,
        _add_inspect,
        _add_layouts,
        _add_info,
        _add_demo,
        _add_bench,
    ):
        add(commands)
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    option = partial(common.add_argument, action="store_true", default=argparse.SUPPRESS)
    option("-v", "--verbose", help="more messages on stderr, the libraries' own too")
    option("--debug", help="print the traceback of an error, for a report")
    return common


def _add_command(commands: Any, name: str, *, help: str, description: str, epilog: str) -> argparse.ArgumentParser:
    style = {"parents": [_common_options()], "formatter_class": _Formatter}
    return commands.add_parser(name, help=help, description=description, epilog=epilog, **style)


def _add_ask(commands: Any) -> None:
    parser = _add_command(
        commands,
        "ask",
        help="answer questions about a video",
        description="Answer questions about a video. It is decoded, encoded and prefilled once.",
        epilog=_ASK_EXAMPLES,
    )
    _add_video(parser)
    parser.add_argument("questions", metavar="QUESTION", nargs="+")
    parser.add_argument("--follow-up", action="store_true", help="each question after the first sees the earlier turns")
    parser.add_argument(
        "--choices",
        nargs="+",
        action=_Choices,
        metavar="CHOICE",
        help="the choices of a multiple-choice question: all texts up to the next option; questions come first",
    )
    _add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object with everything about the answer")


def _add_watch(commands: Any) -> None:
    parser = _add_command(
        commands,
        "watch",
        help="answer questions again and again while a video comes in",
        description="Answer questions again and again while a video comes in: a file, a pipe, a camera, a stream.",
        epilog=_WATCH_EXAMPLES,
    )
    option = parser.add_argument
    option("video", metavar="VIDEO", help="a file, a named pipe, - for standard input, a device or a URL")
    option("questions", metavar="QUESTION", nargs="+")
    option(
        "--every",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="seconds of the stream between answers (default: 2)",
    )
    option("--rate", type=_rate, default=2.0, metavar="N", help="frames a second that are encoded (default: 2)")
    option(
        "--mode",
        default="slowfast",
        choices=MODES,
        help="slowfast: evenly spaced frames of the whole stream; memory: the last frames in full, older ones "
        "condensed; append: the last frames only, prefilled as they come, for the shortest latency (default: slowfast)",
    )
    option("--no-repeat", action="store_true", help="print an answer only if it differs from the one before")
    option("--json", action="store_true", help="print each answer as a line of JSON")
    _add_model_options(parser, frames="frames to keep at most (default: by model and mode)")


def _add_model_options(
    parser: argparse.ArgumentParser, frames: str = "frames to sample (default: the model's)"
) -> None:
    """The options of `ask`, `watch` and `batch` that choose the model and how it runs."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="LLaVA-1.5 or LLaVA-NeXT checkpoint, Hugging Face or original format (default: the embedded model)",
    )
    parser.add_argument("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the model's)")
    parser.add_argument("--frames", type=_count, metavar="N", help=frames)
    parser.add_argument("--reduction", metavar="TEXT", help=_REDUCTION_HELP)
    parser.add_argument(
        "--backend",
        default="auto",
        choices=BACKENDS,
        help="backend of the aggregator (default: auto)",
    )
    parser.add_argument(
        "--projector",
        default="exact",
        choices=PROJECTORS,
        help="exact: the published order, bit for bit; commuted: the second layer runs on pooled tokens, with several "
        "times less work and the same accuracy; auto: commuted if it saves enough (default: exact)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTIONS,
        metavar="NAME",
        help=f"{', '.join(ATTENTIONS)} (default: auto)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, 16 bits on a GPU)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--max-new-tokens", type=_count, metavar="N", help="longest answer (default: the model's)")


def _add_batch(commands: Any) -> None:
    parser = _add_command(
        commands,
        "batch",
        help="answer a file of questions about many videos",
        description="Answer a file of questions in worker processes or through a server; each video is decoded once. "
        "A line is appended for each answer: after a kill, the same command continues.",
        epilog=_BATCH_EXAMPLES,
    )
    option = parser.add_argument
    option("questions", type=Path, metavar="QUESTIONS", help="JSON lines, or a published file (JSON list or CSV)")
    option("--truths", type=Path, metavar="FILE", help="the published list of true answers to these questions")
    option("--videos", type=Path, default=Path(), metavar="DIR", help="folder of the videos (default: here)")
    option("--out", type=Path, required=True, metavar="FILE.jsonl", help="file that answers are appended to")
    option(
        "--workers", type=_count, default=1, metavar="N", help="worker processes, or concurrent requests (default: 1)"
    )
    option("--server", metavar="URL", help="ask a vLLM server, such as http://host:8000/v1, instead of a local model")
    option("--upload", action="store_true", help="send the videos to a server that cannot read the files")
    option("--upload-any", action="store_true", help="the same, also for videos outside --videos")
    option("--max-upload", type=_count, metavar="MIB", help="largest video to send (default: 256)")
    option(
        "--attempts", type=_count, default=3, metavar="N", help="attempts before a question is an error (default: 3)"
    )
    option(
        "--timeout", type=_seconds, metavar="SECONDS", help="time limit of an answer (default: none; of a server: 600)"
    )
    option("--retry-errors", action="store_true", help="ask again what ended as an error")
    option("--retry-changed", action="store_true", help="ask again if the question or the video file has changed")
    option("--ray", action="store_true", help="run the workers as actors of a Ray cluster (extra [ray])")
    _add_model_options(parser)
    _add_decoder(parser)


def _add_score(commands: Any) -> None:
    parser = _add_command(
        commands,
        "score",
        help="count the right answers of a batch",
        description="Count the right answers of a batch: multiple choice by an option rule, open-ended ones by a "
        "judge. Verdicts are kept: after a kill, the same command continues.",
        epilog=_SCORE_EXAMPLES,
    )
    option = parser.add_argument
    option("answers", type=Path, metavar="ANSWERS.jsonl", help="what `sfllava-fast batch` wrote")
    option("--judge", metavar="URL", help="an OpenAI-compatible server that judges open-ended answers")
    option("--judge-model", metavar="NAME", help="model of the judge (default: the server's first)")
    option(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="file of the verdicts (default: .judged.jsonl beside the answers)",
    )
    option("--workers", type=_count, default=4, metavar="N", help="concurrent requests (default: 4)")
    option(
        "--rule",
        choices=("published", "own"),
        default="published",
        help="how options and verdicts are read: as published, or by our stricter rule (default: published)",
    )
    option("--by", metavar="FIELD", help="count also by the values of a field, such as question_type")
    option("--retry-errors", action="store_true", help="ask the judge again if it gave no verdict")
    option("--retry-changed", action="store_true", help="ask the judge again if the answer or the truth has changed")
    option("--json", action="store_true", help="print one JSON object")


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        "inspect",
        help="draw which frames and patches a layout keeps",
        description="Draw which sampled frames each pathway reads, what it keeps of a frame, and the token budget.",
        epilog=_INSPECT_EXAMPLES,
    )
    _add_video(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png|FILE.html", help="picture to write")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="take layout, frames and grid from this checkpoint")
    parser.add_argument("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the paper's)")
    parser.add_argument("--frames", type=_count, metavar="N", help="frames to sample (default: the layout's, else 50)")
    kept = "draw what a pruning keeps: prune:64, prune:0.25:SCORER; chosen by the model if there is one"
    parser.add_argument("--reduction", metavar="TEXT", help=kept)
    grid = "patches of a frame (default: the layout's, else 24x24)"
    parser.add_argument("--grid", type=_grid, metavar="HxW", help=grid)


def _add_layouts(commands: Any) -> None:
    parser = _add_command(
        commands,
        "layouts",
        help="list the named layouts and their tokens",
        description="List the named layouts: tokens, where they pool, source.",
        epilog=_LAYOUTS_EXAMPLES,
    )
    parser.add_argument("--layout", metavar="TEXT", help="show this layout only; it needs no name")
    parser.add_argument("--frames", type=_count, metavar="N", help="frames to count tokens of (default: as published)")
    parser.add_argument("--grid", type=_grid, metavar="HxW", help="patches of a frame (default: as published)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def _add_info(commands: Any) -> None:
    parser = _add_command(
        commands,
        "info",
        help="show what is built, loaded and used, and why not",
        description="Show what is built, loaded and used on this machine, and why not.",
        epilog="example:\n  sfllava-fast info --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands,
        "demo",
        help="ask the embedded model about its sample video",
        description="Ask the embedded model about its sample video, and draw what its layout keeps.",
        epilog="example:\n  sfllava-fast demo --out pictures",
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of the picture (default: here)")


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands,
        "bench",
        help="measure the pipeline stage by stage, against the plain one",
        description="Measure the time of each stage against the plain pipeline on the same weights: first the answers "
        "are compared, then both run in paired rounds. Exit code 1 if answers differ or the gate is missed.",
        epilog=_BENCH_EXAMPLES,
    )
    add_bench_options(parser)


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sfllava-fast bench` and of `python -m bench pipeline`."""
    option = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR_OR_HUB_ID", help="a checkpoint (default: the embedded model)")
    which.add_argument("--config", choices=SHAPES, help="random weights of real shapes")
    option("--video", type=Path, metavar="FILE", help="(default: a 1280x720 clip, drawn for the run)")
    option("--question", action="append", metavar="TEXT", help="may be repeated; the first one is timed")
    option("--frames", type=_count, metavar="N", help="frames to sample (default: 50)")
    option("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the model's)")
    option("--new-tokens", type=_count, metavar="N", help="longest answer (default: 32)")
    option("--rounds", type=_count, metavar="N", help="paired rounds (default: 9)")
    option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    option("--dtype", choices=DTYPES, help="(default: float32 on a CPU, 16 bits on a GPU)")
    option(
        "--attention",
        choices=ATTENTIONS,
        metavar="NAME",
        help=f"of both pipelines: {', '.join(ATTENTIONS)} (default: auto)",
    )
    option("--backend", choices=BACKENDS, help="of our aggregator (default: auto)")
    option("--json", type=Path, metavar="FILE", help="write the results to this file")
    option("--plot", type=Path, metavar="FILE.png", help="draw the stages of both as bars")
    option("--trace", type=Path, metavar="FILE.json", help="write a profile of one answer, for ui.perfetto.dev")
    option("--gate", type=float, metavar="MARGIN", help="exit 1 if a ratio misses MARGIN times its bar")


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="a video file, or a folder of image frames")
    _add_decoder(parser)


def _add_decoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoder",
        default="pyav",
        choices=DECODERS,
        help="library that decodes the video (default: pyav, exact on every container)",
    )


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


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of frames a second above 0")


def _grid(text: str) -> tuple[int, int]:
    with contextlib.suppress(ValueError):
        rows, columns = (int(part) for part in text.lower().split("x"))
        if rows > 0 and columns > 0:
            return rows, columns
    raise argparse.ArgumentTypeError(f"{text!r} is not a grid: write rows x columns, such as 24x24")

"""The options of the command line; what its commands do is in cli.py."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from .. import __version__
from ..terminal import fit, one_line

PROGRAM = "sfllava-fast"

# The names of modules that are not imported here: help comes at once, and without torch.
BACKENDS = ("auto", "cpu", "cuda", "triton", "torch")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
PROJECTORS = ("exact", "commuted", "auto")
DTYPES = ("float32", "fp32", "bfloat16", "bf16", "float16", "fp16")
MODES = ("slowfast", "memory", "append")
DECODERS = ("pyav", "decord")
SHAPES = ("tiny", "small", "7b", "34b")

_TOP_EXAMPLES = """
examples:
  sfllava-fast demo                             the model that ships, at work
  sfllava-fast ask clip.mp4 "What happens?"     ask about your own video
  sfllava-fast watch - "What happens?"          answer as a stream goes on
  sfllava-fast batch FILE --out answers.jsonl   answer a file of questions
  sfllava-fast score answers.jsonl              see how many are right
  sfllava-fast inspect clip.mp4 --out clip.png  see what the layout keeps
  sfllava-fast layouts                          see which layouts there are
  sfllava-fast info                             see what runs here, and why

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
_WATCH_EXAMPLES = """
Times are those of the stream, from its first frame.

examples:
  a file, an answer for every 2 seconds of it:
    sfllava-fast watch clip.mp4 "what is there?" --every 2

  a camera; while an answer is made, the oldest frames that wait are dropped:
    sfllava-fast watch /dev/video0 "Who is at the door?" --every 5 --no-repeat --model DIR

  anything that ffmpeg reads, two questions, a JSON object a line:
    ffmpeg -i SOURCE -c copy -f matroska - | sfllava-fast watch - "Is it raining?" "How many cars?" --json --model DIR

  a day of a stream, the last minutes in full and what was before condensed:
    sfllava-fast watch rtsp://host/stream "What has happened?" --every 60 --mode memory --model DIR

exit code: 0 the stream has ended, 2 it could not go on, 130 interrupted; what was printed stays.
"""
_BATCH_EXAMPLES = """
questions.jsonl has a line for each question, and videos lie in one folder:
  {"id": 1, "video": "clip.mp4", "question": "Who sings?", "answer": "a bird"}
  {"id": 2, "video": "clip.mp4", "question": "Who?", "choices": ["Ada", "Bo"]}

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

exit code: 0 all is counted, 1 the judge gave no verdict on some answers, 2 it could not go on, 130 interrupted.
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

  another layout, with the frames and the grid that it was published with, or with yours:
    sfllava-fast inspect clip.mp4 --out clip.png --layout llava_video_slowfast-newline_grid
    sfllava-fast inspect clip.mp4 --out clip.png --layout pool:stride4,stride2,stride2,mean --frames 32 --grid 27x27
"""
_LAYOUTS_EXAMPLES = """
examples:
  what each would make of 64 frames of SigLIP's 27x27 patches:
    sfllava-fast layouts --frames 64 --grid 27x27

  options are written behind the name, in the order of the table; any other layout as pathways (docs/layouts.md):
    sfllava-fast layouts --layout llava_next_video-bilinear-newline_grid
    sfllava-fast layouts --layout pool:each,stride3,stride3,max
"""
_LAYOUT_HELP = "token layout: a name that `sfllava-fast layouts` lists, slowfast-..., or pathways"

_REDUCTION_HELP = (
    "fewer of the video's tokens in the language model: mixture:0.2 (some layers see a share of each frame's), "
    "prune:64 or prune:0.25 (so many, or a share, go in), compress (a few learned tokens see the rest); a scorer may "
    "follow, as in prune:64:similarity (default: none)"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    took_questions = False

    def error(self, message: str) -> None:
        if self.took_questions and "QUESTION" in message:
            message = "no question is left, --choices takes every text behind it: put the question before --choices"
        self.exit(2, f"{PROGRAM}: error: {one_line(message)} (`{self.prog} --help` shows how)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines stay as they are written, but for those that are too long; commands can still be pasted."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(self._fit(line, width) for line in text.strip("\n").splitlines())

    def _fit(self, line: str, width: int) -> str:
        indent = line[: len(line) - len(line.lstrip())]
        is_command = line.lstrip().startswith((f"{PROGRAM} ", "ffmpeg "))
        return fit(line, indent + 2 * " " * is_command, is_command * " \\", width)


class _Choices(argparse.Action):
    """Texts up to the next option: a question behind them would be one of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.took_questions = True
        if [text.rstrip().endswith("?") for text in values] == [False] * (len(values) - 1) + [True] and len(values) > 1:
            parser.error(f"--choices took {values[-1]!r}, which looks like a question: put questions before --choices")
        setattr(namespace, self.dest, values)


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="say more on stderr, the libraries' own messages included",
    )
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="print the traceback of an error, for a report"
    )
    style = {"parents": [common], "formatter_class": _Formatter}
    parser = _Parser(
        PROGRAM,
        description="Ask questions of videos with SlowFast-LLaVA, fast.",
        epilog=_TOP_EXAMPLES,
        **style,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    _add_ask(commands, style)
    _add_watch(commands, style)
    _add_batch(commands, style)
    _add_score(commands, style)
    _add_inspect(commands, style)
    _add_layouts(commands, style)
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
    parser.add_argument("--follow-up", action="store_true", help="each question after the first sees the earlier turns")
    parser.add_argument(
        "--choices",
        nargs="+",
        action=_Choices,
        metavar="CHOICE",
        help="make it multiple choice, of all texts up to the next option: questions come before",
    )
    _add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer alone")


def _add_watch(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "watch",
        help="answer again and again about a video as it comes",
        description="Answer questions about a video as it comes, again and again: a file, a pipe, a camera, a stream.",
        epilog=_WATCH_EXAMPLES,
        **style,
    )
    option = parser.add_argument
    option("video", metavar="VIDEO", help="a file, a named pipe, - for standard input, a device or a URL")
    option("questions", metavar="QUESTION", nargs="+")
    option("--every", type=_seconds, default=2.0, metavar="SECONDS", help="of the stream, to an answer (default: 2)")
    option("--rate", type=_rate, default=2.0, metavar="N", help="frames a second that are looked at (default: 2)")
    option(
        "--mode",
        default="slowfast",
        choices=MODES,
        help="slowfast: evenly spaced frames of all that was; memory: the last ones in full, older ones condensed; "
        "append: the last ones alone, each looked at once, so that answers come soonest (default: slowfast)",
    )
    option("--no-repeat", action="store_true", help="print an answer only where it is not the one before")
    option("--json", action="store_true", help="print an answer as one JSON object a line")
    _add_model_options(parser, frames="frames held at most (default: what suits model and mode)")


def _add_model_options(
    parser: argparse.ArgumentParser, frames: str = "frames to sample (default: the model's)"
) -> None:
    """The options of `ask`, `watch` and `batch` that say what answers, and how."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="LLaVA-1.5 or LLaVA-NeXT checkpoint, Hugging Face or original format (default: the one that ships)",
    )
    parser.add_argument("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the model's)")
    parser.add_argument("--frames", type=_count, metavar="N", help=frames)
    parser.add_argument("--reduction", metavar="TEXT", help=_REDUCTION_HELP)
    parser.add_argument(
        "--backend",
        default="auto",
        choices=BACKENDS,
        help="what aggregates the tokens (default: auto)",
    )
    parser.add_argument(
        "--projector",
        default="exact",
        choices=PROJECTORS,
        help="exact: the published order, bit for bit; commuted: its second layer runs on pooled tokens, several "
        "times less work and no less accurate; auto: commuted where it can serve (default: exact)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTIONS,
        metavar="NAME",
        help=f"{', '.join(ATTENTIONS)} (default: auto)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: what suits the device)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--max-new-tokens", type=_count, metavar="N", help="longest answer (default: the model's)")


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
    option("--upload-any", action="store_true", help="the same, also for videos that are not under --videos")
    option("--max-upload", type=_count, metavar="MIB", help="the largest video that is sent (default: 256)")
    option("--attempts", type=_count, default=3, metavar="N", help="before a question is an error (default: 3)")
    option("--timeout", type=_seconds, metavar="SECONDS", help="for one answer (default: none; of a server: 600)")
    option("--retry-errors", action="store_true", help="ask again what ended as an error")
    option("--retry-changed", action="store_true", help="ask again what was another question or video file then")
    option("--ray", action="store_true", help="workers are actors of a Ray cluster; needs the extra [ray]")
    _add_model_options(parser)
    _add_decoder(parser)


def _add_score(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "score",
        help="count the right answers of a batch",
        description="Count the right answers of a batch: multiple choice by an option rule, open-ended ones by a judge. "
        "Verdicts are kept: run it again to go on after any kill.",
        epilog=_SCORE_EXAMPLES,
        **style,
    )
    option = parser.add_argument
    option("answers", type=Path, metavar="ANSWERS.jsonl", help="what `sfllava-fast batch` wrote")
    option("--judge", metavar="URL", help="an OpenAI-compatible server that judges open-ended answers")
    option("--judge-model", metavar="NAME", help="(default: the first that the server has)")
    option("--out", type=Path, metavar="FILE.jsonl", help="verdicts (default: beside the answers, .judged.jsonl)")
    option("--workers", type=_count, default=4, metavar="N", help="requests at a time (default: 4)")
    option(
        "--rule",
        choices=("published", "own"),
        default="published",
        help="how options and verdicts are read: as published, or by our stricter rule (default: published)",
    )
    option("--by", metavar="FIELD", help="also by the values of this field, such as question_type")
    option("--retry-errors", action="store_true", help="ask the judge again where it gave no verdict")
    option("--retry-changed", action="store_true", help="ask it again where it judged another answer or truth")
    option("--json", action="store_true", help="print one JSON object")


def _add_inspect(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="draw which frames and patches a layout keeps",
        description="Draw which pathway reads which sampled frames, what each keeps of one, and the token budget.",
        epilog=_INSPECT_EXAMPLES,
        **style,
    )
    _add_video(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png|FILE.html", help="picture to write")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="take layout, frames and grid from this checkpoint")
    parser.add_argument("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the paper's)")
    parser.add_argument("--frames", type=_count, metavar="N", help="frames to sample (default: the layout's, else 50)")
    kept = "draw what a pruning keeps: prune:64, prune:0.25:SCORER; chosen by the model, if one is named"
    parser.add_argument("--reduction", metavar="TEXT", help=kept)
    grid = "patches of a frame (default: the layout's, else 24x24)"
    parser.add_argument("--grid", type=_grid, metavar="HxW", help=grid)


def _add_layouts(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "layouts",
        help="list the layouts that have names, with their tokens",
        description="List the layouts that have names: their tokens, where they pool, where they were published.",
        epilog=_LAYOUTS_EXAMPLES,
        **style,
    )
    parser.add_argument("--layout", metavar="TEXT", help="this one alone, whether it has a name or not")
    parser.add_argument("--frames", type=_count, metavar="N", help="count tokens of so many (default: as published)")
    parser.add_argument("--grid", type=_grid, metavar="HxW", help="patches of a frame (default: as published)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def _add_info(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "info",
        help="show what is built, loaded and used, and why not",
        description="Show what is built, loaded and used on this machine, and why not.",
        epilog="example:\n  sfllava-fast info --json",
        **style,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_demo(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser(
        "demo",
        help="the model that ships answers questions about its sample video",
        description="Ask the model that ships about its sample video, and draw what its layout keeps.",
        epilog="example:\n  sfllava-fast demo --out pictures",
        **style,
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of the picture (default: here)")


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


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sfllava-fast bench` and of `python -m bench pipeline`."""
    option = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR_OR_HUB_ID", help="a checkpoint (default: the one that ships)")
    which.add_argument("--config", choices=SHAPES, help="random weights of real shapes")
    option("--video", type=Path, metavar="FILE", help="(default: a clip of 1280x720 that is drawn for the run)")
    option("--question", action="append", metavar="TEXT", help="may be repeated; the first one is timed")
    option("--frames", type=_count, metavar="N", help="frames to sample (default: 50)")
    option("--layout", metavar="STRING", help=f"{_LAYOUT_HELP} (default: the model's)")
    option("--new-tokens", type=_count, metavar="N", help="longest answer (default: 32)")
    option("--rounds", type=_count, metavar="N", help="paired rounds (default: 9)")
    option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    option("--dtype", choices=DTYPES, help="(default: what suits the device)")
    option(
        "--attention",
        choices=ATTENTIONS,
        metavar="NAME",
        help=f"of both pipelines: {', '.join(ATTENTIONS)} (default: auto)",
    )
    option("--backend", choices=BACKENDS, help="of our aggregator (default: auto)")
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
        choices=DECODERS,
        help="what reads the video (default: pyav, exact on every container)",
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

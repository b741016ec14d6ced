"""The command line: ask a question, watch a stream, answer a file of questions, inspect a layout, show what runs here,
or see the demo.

Answers go to stdout; progress, summaries, warnings and errors to stderr. Exit codes: 0 done, 2 bad usage or
input (one line says what), 70 a bug of ours (one line; --debug has the traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, InputError, SfllavaError
from ..output_folder import check_folder, make_folder
from ..terminal import as_json, fit, one_line, shown
from .options import PROGRAM, build_parser

if TYPE_CHECKING:
    from ..engine.answer import Answer
    from ..engine.slowfast_llava import SlowFastLlava
    from ..video import Video

log = logging.getLogger("sfllava_fast")

_BUG = 70  # EX_SOFTWARE of sysexits.h
# What is installed under another name than it is imported by, or from some release on.
_INSTALLED_AS = {"PIL": "pillow", "av": "'av>=14.1'", "transformers": "'transformers>=5.17'"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale that lacks a character is no reason to stop
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # argparse has said why
        return int(done.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _run(args)
    except SfllavaError as error:
        return _refuse(args, error, str(error))
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left (`| head`): nothing to say, and nothing for Python to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _refuse(args, error, _say_why(error) or _say_bug(error), 2 if _say_why(error) else _BUG)


def _run(args: argparse.Namespace) -> int:
    with _messages(getattr(args, "verbose", False)):
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
    return code or 0


def _refuse(args: argparse.Namespace, error: Exception, line: str, code: int = 2) -> int:
    if getattr(args, "debug", False):
        print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"{PROGRAM}: error: {one_line(line)}", file=sys.stderr)
    return code


def _say_why(error: Exception) -> str | None:
    """What the machine lacks, where that is why; None for a bug of ours."""
    name = _missing_module(error)
    if name and name != __package__:
        return f"this needs {name}, which is not installed: pip install {_INSTALLED_AS.get(name, name)}"
    if isinstance(error, MemoryError):
        return "out of memory: take fewer frames, or a smaller model"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return None


def _missing_module(error: BaseException | None) -> str | None:
    """The package that could not be imported, which transformers tells only in the error behind its own."""
    while isinstance(error, ImportError):
        if error.name and isinstance(error, ModuleNotFoundError):
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return None


def _say_bug(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return f"a bug of {PROGRAM} ({what}: {error}): please report it, with what the same command prints under --debug"


def ask(args: argparse.Namespace) -> None:
    _check_questions(args.questions, args.choices)
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


def watch(args: argparse.Namespace) -> None:
    from ..engine.watch import time_stamp, watch_live
    from ..video import open_live

    _check_questions(args.questions)
    options = _model_options(args)
    layout = options.pop("layout")
    if args.projector == "commuted":
        raise InputError("--projector: a stream's frames are projected as they come; leave it out")
    if args.mode == "append" and args.reduction:
        raise InputError("--reduction: frames that are appended are not reduced; leave it out, or take another --mode")
    with open_live(args.video, args.rate) as live:
        with _progress() as say:
            say("loading the model")
            model = _load(args.model, **options)
        with model.open_stream(args.mode, args.frames, layout, live.name) as session:
            asked = args.every, args.max_new_tokens, args.no_repeat
            for seconds, answer in watch_live(live, session, args.questions, *asked):
                if args.json:
                    line = as_json({"time": seconds, **answer.to_json()})
                else:
                    question = f"{answer.question} | " if len(args.questions) > 1 else ""
                    stamp = time_stamp(seconds, decimals=not args.every.is_integer())
                    line = f"[{stamp}] {shown(question)}{one_line(answer.text)}"
                print(line, flush=True)


def _check_questions(questions: Sequence[str], choices: Sequence[str] | None = None) -> None:
    from ..model.prompts import format_options

    if not all(question.strip() for question in questions):
        raise InputError('the question is empty: ask something, such as "What happens in the video?"')
    if choices is not None:
        format_options(choices)


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `SlowFastLlava.from_pretrained` takes, beside the model; checked before anything is loaded or decoded."""
    from ..engine.slowfast_llava import check_settings

    names = ("layout", "dtype", "device", "backend", "attention", "projector", "reduction")
    options = {name: getattr(args, name) for name in names}
    check_settings(**options)
    return options


def _print_answer(answer: Answer, in_json: bool) -> None:
    if answer.choices and answer.choice is None:
        log.warning("the answer is none of the choices")
    if in_json:
        print(as_json(answer.to_json()))
        return
    print(shown(answer.text if answer.choice is None else answer.choice))
    sys.stdout.flush()
    print(shown(_summary(answer)), file=sys.stderr)


def batch(args: argparse.Namespace) -> int:
    from ..batch.questions import by_video, find_video, note_files, read_questions
    from ..batch.run import run
    from ..batch.workers import Worker
    from ..embedded import CAVEAT, is_sample
    from ..video.base import check_limits

    check_limits()  # a wrong setting is not every video's fault
    groups = by_video(read_questions(args.questions, args.truths))
    make, settings = _server_answerer(args) if args.server else _model_answerer(args)
    note_files(groups, args.videos)
    make_folder(args.out)
    limits = {name: getattr(args, name) for name in ("workers", "attempts", "retry_errors", "retry_changed")}
    if not args.server:  # a client keeps the time itself: waiting for a server is not the question's fault
        limits["timeout"] = args.timeout
    limits["start"] = Worker
    if args.ray:
        from ..batch.ray_workers import RayWorker

        limits["start"] = RayWorker
    is_embedded = not args.server and args.model is None
    if is_embedded and not all(is_sample(find_video(args.videos, group.name)) for group in groups):
        limits["start"] = _warning_once(CAVEAT, limits["start"])
    summary, complete = run(groups, args.out, settings, make, **limits)
    print(shown(summary), file=sys.stderr)
    return 0 if complete else 1


def _warning_once(text: str, start: Callable) -> Callable:
    """Starts workers, and before the first of them says what they, who are quiet, write into every line."""
    lines = iter([text])

    def started(*args: Any) -> Any:
        for line in lines:
            log.warning("%s", line)
        return start(*args)

    return started


def _model_answerer(args: argparse.Namespace) -> tuple[Callable, dict[str, Any]]:
    from ..batch.answerers import model_answerer
    from ..video import import_decoder

    if args.upload or args.upload_any or args.max_upload:
        raise InputError("--upload is for a server: name it with --server")
    import_decoder(args.decoder)  # rather than when every worker has loaded its model
    options = {name: getattr(args, name) for name in ("frames", "decoder", "max_new_tokens")}
    return model_answerer(args.model, args.videos, **_model_options(args), **options)


def _server_answerer(args: argparse.Namespace) -> tuple[Callable, dict[str, Any]]:
    from ..batch.answerers import server_answerer

    defaults = {"backend": "auto", "attention": "auto", "projector": "exact", "decoder": "pyav", "ray": False}
    given = [
        f"--{name}"
        for name in ("layout", "frames", "dtype", "device", "reduction", *defaults)
        if getattr(args, name) != defaults.get(name)
    ]
    if given:
        raise InputError(f"{', '.join(given)}: the server decides that; leave it out")
    if args.max_upload and not (args.upload or args.upload_any):
        raise InputError("--max-upload is for --upload: give that, or leave it out")
    names = ("model", "videos", "max_new_tokens", "timeout", "upload", "upload_any")
    limit = {"max_upload": args.max_upload} if args.max_upload else {}
    return server_answerer(args.server, **{name: getattr(args, name) for name in names}, **limit)


def score(args: argparse.Namespace) -> int:
    from ..batch.score import reasons, score, table

    options = ("judge", "judge_model", "out", "workers", "by", "retry_errors", "retry_changed", "rule")
    if args.out:
        make_folder(args.out)
    figures = score(args.answers, **{name: getattr(args, name) for name in options})
    if args.json:
        print(as_json({name: of.to_json() for name, of in figures.items()}))
    else:
        print(shown(table(figures)))
    if why := reasons(figures["all"]):
        sys.stdout.flush()
        print(shown(why), file=sys.stderr)
    return 1 if args.judge and why else 0


def inspect(args: argparse.Namespace) -> None:
    from ..inspect import render
    from ..layouts.presets import find_preset
    from ..layouts.slowfast import SlowFastLayout

    layout, frames, grid = _defaults_of(args.model) if args.model else (SlowFastLayout(), None, None)
    if args.layout is not None:
        # A layout that has a name brings its frames, as it does to `ask`.
        layout, frames = args.layout, None if find_preset(args.layout) else frames
    with _progress() as say:
        say("drawing")
        frames = args.frames or frames
        kept = args.reduction and _kept(args, layout, frames)
        out = render(args.video, args.out, layout, frames, args.grid or grid, args.decoder, kept)
    print(shown(out))


def _kept(args: argparse.Namespace, layout: Any, frames: int | None) -> Any:
    """What a pruning keeps, as the model chooses it where there is one; the pruning itself where there is none."""
    from ..reduction.pruning import Pruning
    from ..reduction.settings import parse_reduction

    pruning = parse_reduction(args.reduction)
    if not isinstance(pruning, Pruning) or pruning.needs_question:
        raise InputError(f"--reduction {args.reduction}: inspect draws a pruning that asks for no question")
    if not args.model:
        return pruning
    return _load(args.model, layout=layout, reduction=pruning).open(args.video, frames, args.decoder).kept_tokens()


def layouts(args: argparse.Namespace) -> None:
    from .layout_table import rows, table

    found = rows(args.layout, args.frames, args.grid)
    if args.json:
        print(as_json(found))
        return
    print(shown(table(found)))


def info(args: argparse.Namespace) -> None:
    from .info import report

    facts = report()
    if args.json:
        print(as_json(facts))
        return
    width = max(len(name) for section in facts.values() for name in section)
    for section, rows in facts.items():
        print(section)
        for name, value in rows.items():
            print(fit(shown(f"  {name:<{width}}  {value}"), " " * (width + 4)))


def demo(args: argparse.Namespace) -> None:
    from .. import embedded
    from ..inspect import render

    out = args.out / "sfllava_fast_demo.png"
    check_folder(out)
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
    print(shown(f"What each pathway took: {out}"))


def bench(args: argparse.Namespace) -> int:
    from ..installed_parts import import_part

    outputs = [out for out in (args.json, args.plot, args.trace) if out]
    for out in outputs:
        check_folder(out)
    try:
        import_part("_bench", "bench")
        from sfllava_fast._bench.pipeline.report import main
    except ImportError as error:
        needs = "pip install rich matplotlib 'transformers>=5.17' 'av>=14.1'"
        raise BackendError(f"the benchmark lacks something ({error}): {needs}") from error
    for out in outputs:
        make_folder(out)
    return main(args)


_COMMANDS = {command.__name__: command for command in (ask, watch, batch, score, inspect, layouts, info, demo, bench)}


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


def _summary(answer: Answer) -> str:
    """Three lines about an answer: frames and tokens, seconds by stage, what ran."""
    seconds = answer.seconds
    stages = "  ".join(f"{stage} {value:.3f}" for stage, value in seconds.items())
    rate = f"{answer.tokens_per_second:.1f} tokens/s, " if answer.tokens_per_second else ""
    kept = f", {answer.kept:,} kept by {answer.reduction}" if answer.reduction else ""
    slow = f", {len(set(answer.slow_frames))} of them slow" if answer.slow_frames else ""
    return "\n".join(
        [
            f"frames   {len(answer.frames)}{slow}; tokens: {_tokens(answer)}{kept}",
            f"seconds  {answer.ttft:.3f} to the first token: {stages}",
            f"ran      {rate}{answer.dtype} on {answer.device}, aggregator {answer.backend}, "
            f"attention {answer.attention}",
        ]
    )


def _tokens(answer: Answer) -> str:
    """The video's tokens by pathway and separator, and together."""
    parts = [f"{name} {count:,}" for name, count in answer.tokens.items() if count and name != "total"]
    return f"{' + '.join(parts)} = {answer.tokens['total']:,}"


def _load(path: str | None, **options: Any) -> SlowFastLlava:
    from ..engine.slowfast_llava import SlowFastLlava

    return SlowFastLlava.from_pretrained(path, **options)


def _open(path: str, decoder: str) -> tuple[Video, float]:
    """The opened video, and the seconds that took."""
    from ..video import import_decoder, open_video

    with contextlib.suppress(BackendError):  # open_video says it, where the decoder is needed at all
        import_decoder(decoder)
    start = time.perf_counter()
    return open_video(path, decoder), time.perf_counter() - start


def _defaults_of(model: str) -> tuple[str, int, tuple[int, int]]:
    """Layout, frames and grid of a checkpoint, from its config alone."""
    from ..layouts.slowfast import SlowFastLayout
    from ..model.checkpoint import config_grid, locate, read_config

    path = locate(model)
    config = read_config(path)
    options = config.get("sfllava_fast") or {}
    return options.get("layout", str(SlowFastLayout())), options.get("frames", 50), config_grid(path, config)


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
    """Our warnings on stderr, one line each; the libraries' only when asked for, by --verbose or Python's own -W."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    if not verbose:
        for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
            os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            if not verbose and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{PROGRAM}: {record.levelname.lower()}: {one_line(record.getMessage())}"

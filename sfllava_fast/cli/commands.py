"""The commands but `demo`: each takes the parsed command line, and returns an exit code or None for 0."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, InputError
from ..output_folder import check_folder, make_folder
from ..terminal import as_json, fit, one_line, shown
from .loading import check_questions, checkpoint_defaults, load_model, model_options, open_timed
from .progress import TokenCount, progress
from .summary import print_answer

if TYPE_CHECKING:
    from ..layouts.layout import Layout
    from ..reduction.pruning import Pruning

log = logging.getLogger("sfllava_fast")


def run_ask(args: argparse.Namespace) -> None:
    """Answer questions about a video."""
    check_questions(args.questions, args.choices)
    options = model_options(args)
    # Before the model, which may take long to load: a bad video fails at once.
    video, opened = open_timed(args.video, args.decoder)
    with progress() as show:
        show("loading the model")
        session = load_model(args.model, options).open(video, args.frames)
        for number, question in enumerate(args.questions):
            show("thinking" if number else "watching the video")
            answer = session.ask(
                question,
                args.choices,
                args.max_new_tokens,
                follow_up=args.follow_up and number > 0,
                on_token=TokenCount(show),
            )
            if not number:
                answer.seconds["decode"] += opened
            print_answer(answer, args.json)


def run_watch(args: argparse.Namespace) -> None:
    """Answer questions about a video as it comes."""
    from ..engine.slowfast_llava import check_stream
    from ..engine.watch import time_stamp, watch_live
    from ..layouts.presets import parse_layout
    from ..video import open_live

    check_questions(args.questions)
    options = model_options(args)
    if args.projector == "commuted":
        raise InputError("--projector: a stream's frames are projected as they come; leave it out")
    if args.mode == "append" and args.reduction:
        raise InputError("--reduction: frames that are appended are not reduced; leave it out, or take another --mode")
    check_stream(args.mode, None if args.layout is None else parse_layout(args.layout))
    with open_live(args.video, args.rate) as live:
        with progress() as show:
            show("loading the model")
            model = load_model(args.model, replace(options, layout=None))
        with model.open_stream(args.mode, args.frames, options.layout, live.name) as session:
            asked = args.every, args.max_new_tokens, args.no_repeat
            for seconds, answer in watch_live(live, session, args.questions, *asked):
                if args.json:
                    line = as_json({"time": seconds, **answer.to_json()})
                else:
                    question = f"{answer.question} | " if len(args.questions) > 1 else ""
                    stamp = time_stamp(seconds, decimals=not args.every.is_integer())
                    line = f"[{stamp}] {shown(question)}{one_line(answer.text)}"
                print(line, flush=True)


def run_batch(args: argparse.Namespace) -> int:
    """Answer a file of questions."""
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
    """Starts workers, and logs a warning before the first: they log nothing, and write it into every line."""
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
    import_decoder(args.decoder)  # before every worker has loaded its model
    options = model_options(args)
    return model_answerer(args.model, args.videos, options, args.frames, args.decoder, args.max_new_tokens)


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


def run_score(args: argparse.Namespace) -> int:
    """Count the right answers of a batch."""
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


def run_inspect(args: argparse.Namespace) -> None:
    """Draw what a layout takes from a video."""
    from ..inspect import render
    from ..layouts.presets import choose_layout

    if args.model:
        layout, frames, grid = checkpoint_defaults(args.model, args.layout)
    else:
        (layout, frames), grid = choose_layout(args.layout, None), None
    with progress() as show:
        show("drawing")
        frames = args.frames or frames
        kept = args.reduction and _kept_tokens(args, layout, frames)
        out = render(args.video, args.out, layout, frames, args.grid or grid, args.decoder, kept)
    print(shown(out))


def _kept_tokens(args: argparse.Namespace, layout: Layout | str, frames: int | None) -> list[int] | Pruning | None:
    """The tokens that pruning keeps, as a model chooses them; without a model the pruning itself."""
    from ..engine.options import ModelOptions
    from ..reduction.pruning import Pruning
    from ..reduction.settings import parse_reduction

    pruning = parse_reduction(args.reduction)
    if not isinstance(pruning, Pruning) or pruning.needs_question:
        raise InputError(f"--reduction {args.reduction}: inspect draws a pruning that needs no question")
    if not args.model:
        return pruning
    model = load_model(args.model, ModelOptions(layout=layout, reduction=pruning))
    return model.open(args.video, frames, args.decoder).kept_tokens()


def run_layouts(args: argparse.Namespace) -> None:
    """List the named layouts, or show one."""
    from .layout_table import rows, table

    found = rows(args.layout, args.frames, args.grid)
    print(as_json(found) if args.json else shown(table(found)))


def run_info(args: argparse.Namespace) -> None:
    """Show what is installed, built and usable."""
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


def run_bench(args: argparse.Namespace) -> int:
    """Measure the pipeline against the plain one."""
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

"""The command line.

Answers go to stdout; progress, summaries, warnings and errors to stderr. Exit codes:

- 0: done
- 1: done in part (`batch`, `score`, `bench`)
- 2: wrong usage or input; one line has the reason
- 70: a bug of this package; `--debug` prints the traceback
- 130: interrupted
- 141: the reader of stdout left
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..errors import SfllavaError
from ..terminal import one_line, shown
from . import commands
from .demo import run_demo
from .options import PROGRAM, build_parser
from .progress import messages

_BUG = 70  # EX_SOFTWARE of sysexits.h
# What is installed under another name than it is imported by, or needs a minimal version.
_INSTALLED_AS = {"PIL": "pillow", "av": "'av>=14.1'", "transformers": "'transformers>=5.17'"}
_COMMANDS = {
    "ask": commands.run_ask,
    "watch": commands.run_watch,
    "batch": commands.run_batch,
    "score": commands.run_score,
    "inspect": commands.run_inspect,
    "layouts": commands.run_layouts,
    "info": commands.run_info,
    "demo": run_demo,
    "bench": commands.run_bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale that lacks a character must not stop an answer
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # argparse has printed the reason
        return int(done.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _run(args)
    except SfllavaError as error:
        return _fail(args, error, str(error))
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left (`| head`): Python must not flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        reason = _reason(error)
        return _fail(args, error, reason or _bug(error), 2 if reason else _BUG)


def _run(args: argparse.Namespace) -> int:
    with messages(getattr(args, "verbose", False)):
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
    return code or 0


def _fail(args: argparse.Namespace, error: Exception, line: str, code: int = 2) -> int:
    if getattr(args, "debug", False):
        print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"{PROGRAM}: error: {one_line(line)}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str | None:
    """What the machine lacks, if that is the reason; None for a bug of ours."""
    name = _missing_module(error)
    if name and name != "sfllava_fast":
        return f"this needs {name}, which is not installed: pip install {_INSTALLED_AS.get(name, name)}"
    if isinstance(error, MemoryError):
        return "out of memory: take fewer frames, or a smaller model"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return None


def _missing_module(error: BaseException | None) -> str | None:
    """The package that could not be imported; transformers has it only in the cause of its own error."""
    while isinstance(error, ImportError):
        if error.name and isinstance(error, ModuleNotFoundError):
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return None


def _bug(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return f"a bug of {PROGRAM} ({what}: {error}): please report it, with what the same command prints under --debug"

"""Processes of their own for Triton: it reads TRITON_INTERPRET, or is given a target, once for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*command: str, **env: str) -> str:
    """Output of `python *command`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=HERE.parent, env=environment | env
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    return done.stdout


def interpret(tests: str) -> None:
    """A file of tests through the interpreter."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / tests))
    out = run(*command, TRITON_INTERPRET="1")
    assert re.search(r"\d+ passed", out) and "skipped" not in out

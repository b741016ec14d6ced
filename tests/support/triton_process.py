"""Processes of their own for Triton: it reads TRITON_INTERPRET, or is given a target, once for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Triton 3.8 and 3.9 compile what 3.6 and 3.7 compile to no local memory to a few bytes of it, and to more registers.
_LATER = bool(find_spec("triton")) and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
MOST_STACK = 64 if _LATER else 0  # bytes a thread
LEAST_OCCUPANCY = 0.625 if _LATER else 0.75  # of the warps that a multiprocessor has room for


def in_registers(kernel: dict) -> bool:
    """Whether a compiled kernel keeps to MOST_STACK."""
    spills = re.search(r"\b(LDL|STL)", kernel["sass"])
    return kernel["local"] == 0 and kernel["stack"] <= MOST_STACK and (bool(MOST_STACK) or not spills)


def run(*command: str, **env: str) -> str:
    """Output of `python *command`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = (sys.executable, "-W", "error:TRITON_DEFAULT", *command)  # 3.9's warning of a default that will change
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment | env)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    return done.stdout


def interpret(tests: str) -> None:
    """A file of tests through the interpreter."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / tests))
    out = run(*command, TRITON_INTERPRET="1")
    assert re.search(r"\d+ passed", out) and "skipped" not in out

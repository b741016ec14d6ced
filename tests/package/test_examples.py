"""The examples, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PRINTED = {
    "batch": "scored: 0",
    "drop_in_transformers": "answer: 60",
    "op": "[0, 2304, 4608]",
    "stream_opencv": "16 frames",
}


def run(*command: str, folder: Path) -> str:
    """What a Python process prints; a warning is an error."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_example_is_expected_to_print_something():
    assert {path.stem for path in EXAMPLES} == set(PRINTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    assert PRINTED[path.stem] in run(str(path), folder=tmp_path)

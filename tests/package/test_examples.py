"""The examples, and the Python blocks of README and docs that need nothing else, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = "README.md", "docs/op.md", "docs/layouts.md", "docs/engine.md", "docs/streams.md", "docs/videos.md"
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    )
]
SAMPLE = ROOT / "sfllava_fast" / "embedded" / "sample.mp4"
# Blocks that need something that is not here, by a text in them.
NEEDS = {"LlavaNextForConditionalGeneration": "a checkpoint from the hub", "rtsp://": "a camera"}
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


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block, tmp_path):
    for text, needed in NEEDS.items():
        if text in block:
            pytest.skip(f"needs {needed}")
    (tmp_path / "clip.mp4").symlink_to(SAMPLE)
    run("-c", block, folder=tmp_path)

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
SAMPLE = ROOT / "sfllava_fast" / "embedded" / "sample.mp4"
# Texts of blocks that need a checkpoint from the hub, or a camera.
NEEDS = "LlavaNextForConditionalGeneration", "rtsp://"
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


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path):
    """The Python blocks of a page, one after the other; those in NEEDS are left out."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    here = [block for block in blocks if not any(text in block for text in NEEDS)]
    assert here
    (tmp_path / "clip.mp4").symlink_to(SAMPLE)
    run("-c", "\n".join(here), folder=tmp_path)

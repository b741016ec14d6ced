"""Draws the sample clip and its questions: `python -m sfllava_fast.embedded.sample`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .questions import Question, ask_each
from .scenes import Scene, draw_scene, write_video

SCENE_SEED, QUESTION_SEED = 388, 6
FRAMES = 64


def draw_sample() -> tuple[Scene, list[Question]]:
    """A scene of combinations that training never drew, and a question of each type about it."""
    scene = draw_scene(f"sample/{SCENE_SEED}", "heldout")
    return scene, ask_each(scene, random.Random(QUESTION_SEED))


def write_sample(directory: str | Path) -> None:
    """Writes sample.mp4 and sample.json."""
    scene, questions = draw_sample()
    write_video(scene, Path(directory) / "sample.mp4", FRAMES)
    pairs = [{"question": question.text, "answer": question.answer} for question in questions]
    lines = ",\n ".join(json.dumps(pair) for pair in pairs)
    (Path(directory) / "sample.json").write_text(f"[{lines}]\n")


if __name__ == "__main__":
    write_sample(Path(__file__).parent)

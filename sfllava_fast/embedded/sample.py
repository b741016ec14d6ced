"""Draws the sample clip and its questions: `python -m sfllava_fast.embedded.sample`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .questions import Question, ask
from .scenes import Scene, draw_scene, write_video

# The first seeds that allow all types and of which the model answers all: a demonstration, not a measurement.
SCENE_SEED, QUESTION_SEED, FRAMES = 1, 1, 64
# What the card claims.
TYPES = ("number", "colour", "place", "relation", "direction", "first", "when", "exist", "unanswerable")


def draw_sample() -> tuple[Scene, list[Question]]:
    """A scene that training never drew, of combinations that it knows, and questions of the claimed types."""
    scene, rng, asked = draw_scene(f"sample/{SCENE_SEED}"), random.Random(QUESTION_SEED), []
    for kind in TYPES:
        question = ask(scene, kind, rng)
        if question is not None and question.text not in [other.text for other in asked]:
            asked.append(question)
    return scene, asked


def write_sample(directory: str | Path) -> None:
    """Writes sample.mp4 and sample.json."""
    scene, questions = draw_sample()
    write_video(scene, Path(directory) / "sample.mp4", FRAMES)
    pairs = [{"question": question.text, "answer": question.answer} for question in questions]
    lines = ",\n ".join(json.dumps(pair) for pair in pairs)
    (Path(directory) / "sample.json").write_text(f"[{lines}]\n")


if __name__ == "__main__":
    write_sample(Path(__file__).parent)

"""Draws the sample clip and its questions: `python -m sfllava_fast.embedded.sample`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .questions import SceneQuestion, ask
from .scenes import Scene, draw_scene, write_video

# The first seeds whose scene allows all types and whose questions the model answers: a demonstration, not a test.
SCENE_SEED, QUESTION_SEED, FRAMES = 1, 1, 64
# The types of questions that the model card lists.
TYPES = ("number", "colour", "place", "relation", "direction", "first", "when", "exist", "unanswerable")


def draw_sample() -> tuple[Scene, list[SceneQuestion]]:
    """A scene that training never drew, of combinations of colour and shape that it did, and questions about it."""
    scene, rng = draw_scene(f"sample/{SCENE_SEED}"), random.Random(QUESTION_SEED)
    asked: list[SceneQuestion] = []
    for kind in TYPES:
        question = ask(scene, kind, rng)
        if question is not None and question.text not in [other.text for other in asked]:
            asked.append(question)
    return scene, asked


def write_sample(directory: str | Path) -> None:
    """Write sample.mp4 and sample.json."""
    scene, questions = draw_sample()
    write_video(scene, Path(directory) / "sample.mp4", FRAMES)
    pairs = [{"question": question.text, "answer": question.answer} for question in questions]
    lines = ",\n ".join(json.dumps(pair) for pair in pairs)
    (Path(directory) / "sample.json").write_text(f"[{lines}]\n")


if __name__ == "__main__":
    write_sample(Path(__file__).parent)

"""Accuracy of the embedded model on new clips: `python -m sfllava_fast.embedded.training.evaluate`.

Every clip is encoded to an .mp4 file and goes through the whole pipeline, decoding included. An answer is right only if
it equals the reference word for word.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SfllavaError
from ...layouts.plan import Plan
from ...layouts.sampling import sample_frames
from ...layouts.slowfast import SlowFastLayout
from ..model import build_tokenizer
from ..questions import PHRASINGS, TYPES, UNKNOWN_WORDS, SceneQuestion, ask_each
from ..scenes import GRID, SPLITS, Scene, draw_scene, frame_times, render, write_video
from .batches import IGNORE, encode_questions, normalise
from .packing import encode_frames, packed_logits

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from ...engine.slowfast_llava import SlowFastLlava

VIDEO_LENGTHS = (48, 64, 80, 96)
MAX_NEW_TOKENS = 8
Scores = dict[str, list[int]]  # by question type: right, asked


def draw_exam(
    clips: int, seed: int, split: str = "heldout", new_phrasings: bool = False
) -> Iterator[tuple[Scene, int, list[SceneQuestion]]]:
    """Draw the clips and questions of an evaluation.

    Args:
        clips: Number of clips.
        seed: Of clips and questions.
        split: One of SPLITS.
        new_phrasings: Use held-out phrasings.

    Yields:
        A scene, the number of frames of its video, and one question of each type that it allows.
    """
    for index in range(clips):
        name = f"exam/{seed}/{index}"
        rng = random.Random(f"{name}/{split}")
        scene = draw_scene(name, split)
        yield scene, rng.choice(VIDEO_LENGTHS), ask_each(scene, rng, split, new_phrasings)


def kind_of(question: SceneQuestion) -> str:
    """The question's type; for unanswerable ones with the reason."""
    if question.type != "unanswerable":
        return question.type
    if question.phrasing in PHRASINGS["off topic"]:
        return "unanswerable: off topic"
    if question.phrasing in PHRASINGS["number"]:
        return "unanswerable: no sign"
    if any(word in question.text for word in UNKNOWN_WORDS):
        return "unanswerable: unknown word"
    return "unanswerable: not there"


_WHY = ("not there", "no sign", "unknown word", "off topic")
KINDS = (*TYPES[:-1], *(f"unanswerable: {why}" for why in _WHY))


def answer_all(
    model: SlowFastLlava, video: Path, questions: list[SceneQuestion], frames: int | None = None
) -> list[str]:
    """Answers to questions about one video, which is decoded and encoded once; frames: to sample."""
    with model.open(video, frames) as session:
        return [session.ask(question.text, max_new_tokens=MAX_NEW_TOKENS).text for question in questions]


def examine(
    models: dict[str, SlowFastLlava],
    clips: int,
    seed: int,
    split: str = "heldout",
    new_phrasings: bool = False,
    frames: int | None = None,
) -> dict[str, Scores]:
    """Evaluate models on the same files and questions.

    Args:
        models: By name.
        clips, seed, split, new_phrasings: As in `draw_exam`.
        frames: To sample from each clip (default: the model's).

    Returns:
        By model and kind of question, the numbers of right and of all answers.
    """
    from rich.console import Console
    from rich.progress import track

    scores: dict[str, Scores] = {name: defaultdict(lambda: [0, 0]) for name in models}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        exam = draw_exam(clips, seed, split, new_phrasings)
        quiet = not console.is_terminal
        for scene, total, questions in track(exam, "clips", clips, console=console, disable=quiet):
            write_video(scene, video, total)
            for name, model in models.items():
                for question, answer in zip(questions, answer_all(model, video, questions, frames)):
                    score = scores[name][kind_of(question)]
                    score[0] += answer == question.answer
                    score[1] += 1
    return {name: dict(score) for name, score in scores.items()}


def examine_packed(
    model: LlavaForConditionalGeneration,
    clips: int,
    seed: int,
    split: str = "train",
    around: Callable[[Plan], AbstractContextManager] = nullcontext,
    **packed: Any,
) -> Scores:
    """Evaluate a model on drawn frames without video files, each clip in one forward pass.

    An answer is right if each of its tokens is the most likely one after the right tokens before it, which is what
    greedy decoding gives.

    Args:
        model: After `use_packed_attention`.
        clips, seed, split: As in `draw_exam`.
        around: Makes the context of a clip's forward pass from its plan.
        packed: Further arguments of `packed_logits`.

    Returns:
        By kind of question, the numbers of right and of all answers.
    """
    tokenizer, frames = build_tokenizer(), model.config.sfllava_fast["frames"]
    layout = SlowFastLayout.parse(model.config.sfllava_fast["layout"])
    scores: Scores = defaultdict(lambda: [0, 0])
    for scene, total, questions in draw_exam(clips, seed, split):
        pictures = render(scene, frame_times(sample_frames(total, frames), total), half=True)
        ids, targets = encode_questions(tokenizer, [questions])
        where = targets != IGNORE
        with torch.inference_mode(), around(layout.plan(frames, (GRID, GRID))):
            features = encode_frames(model, normalise(pictures))[None]
            logits = packed_logits(model, features, ids, where, layout.slow_frames, **packed)
        wrong = torch.zeros_like(where)
        wrong[where] = logits.argmax(-1) != targets[where]
        for question, missed in zip(questions, wrong[0].any(-1).tolist()):
            scores[kind_of(question)][0] += not missed
            scores[kind_of(question)][1] += 1
    return dict(scores)


def load_models(directory: str | None, ablation: bool, reduction: str | None = None) -> dict[str, SlowFastLlava]:
    """Load the model and its variants.

    Args:
        directory: As `export` writes it; None is the model that ships.
        ablation: Also with each pathway alone.
        reduction: Also with this reduction.
    """
    from ...engine.slowfast_llava import SlowFastLlava

    both = SlowFastLlava.from_pretrained(directory)
    models = {"both": both}
    if ablation:
        layout = SlowFastLayout.parse(str(both.layout))
        for name in ("slow", "fast"):
            models[f"{name} only"] = SlowFastLlava.from_pretrained(directory, layout=layout.only(name))
    if reduction:
        models[reduction] = SlowFastLlava.from_pretrained(directory, reduction=reduction)
    return models


def total_of(scores: Scores) -> list[int]:
    """The numbers of right and of all answers."""
    return [sum(pair[i] for pair in scores.values()) for i in range(2)]


def table(scores: dict[str, Scores]) -> str:
    """Per cent of right answers by question kind (rows) and model (columns), as Markdown."""
    names = list(scores)
    lines = ["| question | asked | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    kinds = [kind for kind in KINDS if kind in scores[names[0]]]
    rows = {kind: [scores[name][kind] for name in names] for kind in kinds}
    rows["**all**"] = [total_of(scores[name]) for name in names]
    for kind, pairs in rows.items():
        cells = " | ".join(f"{100 * right / asked:.1f}" for right, asked in pairs)
        lines.append(f"| {kind} | {pairs[0][1]} | {cells} |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m sfllava_fast.embedded.training.evaluate",
        description=__doc__.split("\n\n")[0],
        epilog="example: python -m sfllava_fast.embedded.training.evaluate --clips 100 --seed 1 --ablation",
    )
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the clips and their questions")
    parser.add_argument(
        "--split",
        choices=tuple(SPLITS),
        default="heldout",
        help="heldout (default): clips and questions with pairs of colour and shape that training never drew; train: "
        "only known pairs",
    )
    parser.add_argument("--new-phrasings", action="store_true", help="use only phrasings held out of training")
    parser.add_argument("--frames", type=int, help="frames to sample from each clip (default: the model's)")
    parser.add_argument("--ablation", action="store_true", help="also evaluate the slow and the fast pathway alone")
    parser.add_argument(
        "--reduction",
        help="also evaluate a reduction, such as mixture:0.2 or compress",
    )
    parser.add_argument("--model", help="a directory (default: the model that ships)")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to a file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print a table; returns the exit code."""
    args = parse(argv)
    try:
        models = load_models(args.model, args.ablation, args.reduction)
        scores = examine(models, args.clips, args.seed, args.split, args.new_phrasings, args.frames)
    except SfllavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    asked = "phrasings held out of training" if args.new_phrasings else "phrasings of training"
    frames = args.frames or models["both"].frames
    print(f"{args.clips} encoded clips, seed {args.seed}, split {args.split}, {asked}, {frames} frames\n")
    print(table(scores))
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "scores": scores}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    logging.getLogger("sfllava_fast").setLevel(
        logging.ERROR
    )  # it would warn of unknown words, which are asked on purpose
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")

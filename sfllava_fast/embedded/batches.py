"""Training data: every batch is a function of its stage and step alone, so runs resume and repeat exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ..config import sample_frames
from .model import ASSISTANT, EOS, USER, answer_ids, image_processor
from .questions import (
    FIND_WEIGHTS, LATE_WEIGHTS, LOOKUP_WEIGHTS, SPOT_WEIGHTS, TIME_WEIGHTS, TYPES, WEIGHTS, Question,
    ask_many, things_asked,
)
from .scenes import (
    CANVAS, COLOURS, GRID, SHAPES, draw_scene, frame_times, patch_labels, place_name, render,
    thing_patches,
)

QUESTIONS_PER_CLIP = 16
LOOKUP_QUESTIONS = 24
STAGE_WEIGHTS = {
    "language": WEIGHTS, "lookup": LOOKUP_WEIGHTS, "find": FIND_WEIGHTS, "time": TIME_WEIGHTS,
    "spots": SPOT_WEIGHTS,
}
LONGEST_VIDEO = 96
MOST_THINGS = 8
IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """What one step shows the language model: frames a clip, slow frames, which pathways."""

    frames: int
    slow: int
    mode: str  # "both", "slow" or "fast"

    @property
    def clips(self) -> int:
        """Clips per rank, fewer where they are long."""
        return 4 if self.frames <= 20 else 2 if self.frames <= 40 else 1


FIXED_LAYOUTS = {
    "lookup": Layout(8, 4, "both"), "find": Layout(8, 4, "both"), "time": Layout(16, 4, "both"),
    "spots": Layout(8, 4, "both"),
}


def draw_layout(stage: str, step: int) -> Layout:
    """Mostly 16 frames of which 4 slow; else 5 to 64 frames, 2 to 8 slow ones, or a single pathway.

    The stages of FIXED_LAYOUTS have theirs throughout.
    """
    if stage in FIXED_LAYOUTS:
        return FIXED_LAYOUTS[stage]
    rng = random.Random(f"layout/{stage}/{step}")
    frames = rng.choices((16, 8, 32, 64, rng.randint(5, 40)), (60, 14, 10, 4, 12))[0]
    slow = rng.choices((4, 2, 3, 6, 8), (62, 10, 6, 10, 12))[0]
    mode = rng.choices(("both", "slow", "fast"), (78, 11, 11))[0]
    return Layout(frames, min(slow, frames), mode)


def normalise(frames: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] -> pixel values float32 [N, 3, H, W]."""
    processor = image_processor()
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    pixels = torch.from_numpy(frames).flatten(0, -4).permute(0, 3, 1, 2)
    return pixels.float().div_(255).sub_(mean).div_(std)


def image_batch(
    stage: str, step: int, first: int, count: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`count` single frames and their patch labels [count, 8, 8, ...]."""
    frames, labels = [], []
    for index in range(first, first + count):
        scene = draw_scene(f"{stage}/{step}/{index}")
        time = random.Random(f"time/{stage}/{step}/{index}").random()
        frames.append(render(scene, [time], half=True)[0])
        labels.append(patch_labels(scene, time))
    stacked = {key: torch.from_numpy(np.stack([label[key] for label in labels])) for key in labels[0]}
    return normalise(np.stack(frames)), stacked


def patch_words(tokenizer, labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which words say what a patch shows, and where: shares [N, 64, vocab]; and which show anything [N, 64].

    The pad token stands for nothing.
    """
    values = {
        "shape": SHAPES, "colour": tuple(COLOURS),
        "tens": "0123456789", "units": [f"##{d}" for d in range(10)],
    }
    vocab = tokenizer.get_vocab()
    shown = (labels["shape"] > 0) | (labels["tens"] > 0) | (labels["units"] > 0)
    words = torch.zeros(*shown.shape, len(vocab), device=shown.device)
    for key, names in values.items():
        ids = torch.tensor([0, *(vocab[name] for name in names)], device=shown.device)[labels[key]]
        words.scatter_add_(-1, ids[..., None], (labels[key] > 0)[..., None].float())
    side = CANVAS // GRID
    for row, column in product(range(GRID), repeat=2):
        for word in place_name((column * side + side // 2, row * side + side // 2)).split():
            words[:, row, column, vocab[word]] = shown[:, row, column].float()
    words[..., tokenizer.pad_token_id] = (~shown).float()
    return (words / words.sum(-1, keepdim=True)).flatten(1, 2), shown.flatten(1)


@dataclass
class ClipBatch:
    """Pixel values [B * T, 3, 96, 96], questions with answers and targets [B, Q, L], types [B, Q].

    For guidance: which patches show which thing, float32 [B, T, 64, MOST_THINGS], and which things each
    question is about, float32 [B, Q, MOST_THINGS].
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor  # the next token where it belongs to the answer, else IGNORE
    types: torch.Tensor
    shown: torch.Tensor
    about: torch.Tensor


def clip_batch(tokenizer, stage: str, step: int, first: int, count: int, frames: int) -> ClipBatch:
    """`count` clips of `frames` frames, each with QUESTIONS_PER_CLIP (or LOOKUP_QUESTIONS) questions."""
    clips, asked = [], []
    shown = torch.zeros(count, frames, GRID * GRID, MOST_THINGS)
    about = torch.zeros(count, LOOKUP_QUESTIONS, MOST_THINGS)
    for clip, index in enumerate(range(first, first + count)):
        rng = random.Random(f"clip/{stage}/{step}/{index}")
        scene = draw_scene(f"{stage}/{step}/{index}")
        total = rng.randint(max(frames, 24), LONGEST_VIDEO)
        times = frame_times(sample_frames(total, frames), total)
        clips.append(render(scene, times, half=True))
        questions = LOOKUP_QUESTIONS if stage in ("lookup", "find", "spots") else QUESTIONS_PER_CLIP
        asked.append(ask_many(scene, questions, rng, weights=STAGE_WEIGHTS.get(stage, LATE_WEIGHTS)))
        shown[clip, ..., : len(scene.things)] = torch.from_numpy(thing_patches(scene, times))
        for row, question in enumerate(asked[-1]):
            about[clip, row, things_asked(scene, question)] = 1.0
    ids, targets = encode_questions(tokenizer, asked)
    types = torch.tensor([[TYPES.index(question.type) for question in questions] for questions in asked])
    return ClipBatch(normalise(np.stack(clips)), ids, targets, types, shown, about[:, : ids.shape[1]])


def encode_questions(tokenizer, asked: list[list[Question]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and next-token targets int64 [B, Q, L], padded on the right."""
    flat = [question for questions in asked for question in questions]
    user, assistant, end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, EOS])
    texts = tokenizer([question.text for question in flat], add_special_tokens=False).input_ids
    rows = []
    for question, text in zip(flat, texts):
        prompt, answer = [user, *text, assistant], answer_ids(tokenizer, question.answer)
        rows.append((prompt + answer, [IGNORE] * (len(prompt) - 1) + answer + [end]))
    length = max(len(row) for row, _ in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in rows])
    targets = torch.tensor([row + [IGNORE] * (length - len(row)) for _, row in rows])
    shape = (len(asked), -1, length)
    return ids.view(shape), targets.view(shape)

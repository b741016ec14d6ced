"""Training data: every batch is a function of its stage and step alone, so runs resume and repeat exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ...layouts.sampling import sample_frames
from ..model import ASSISTANT, EOS, USER, answer_ids, image_processor
from ..questions import TYPES, WHEN, Question, ask_many, mentioned, when
from ..scenes import (
    CANVAS,
    COLOURS,
    DIRECTIONS,
    GRID,
    PASSING,
    PLACES,
    SHAPES,
    STILLS,
    Scene,
    Thing,
    draw_scene,
    frame_times,
    patch_labels,
    render,
    sign_patches,
    thing_patches,
    tint,
)

QUESTIONS_PER_CLIP = 16
LONGEST_VIDEO = 96
MOST_THINGS = STILLS[1] + PASSING[1] + 1  # the sign is the last
# What can be true of a thing, or of the sign, and how many values each has, besides 0 for nothing.
FACTS = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "column": 3,
    "row": 3,
    "direction": len(DIRECTIONS) + 1,
    "when": len(WHEN),
    "tens": 10,
    "units": 10,
}
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


@dataclass(frozen=True)
class Diet:
    """What a stage draws: how many shapes stand still and pass, least to most, and how many frames show them.

    `frames` 0: frames, slow frames and pathways are drawn anew each step. `short_names`: as in `ask`. `tinted`:
    which share of the things have a colour without a name, so that a shape is read by its form; in clips, of the
    things whose shape alone names them.
    """

    stills: tuple[int, int] = STILLS
    passing: tuple[int, int] = PASSING
    frames: int = 0
    short_names: bool = False
    tinted: float = 0.0

    def layout(self, stage: str, step: int) -> Layout:
        """Mostly 16 frames of which 4 slow; else 5 to 64 frames, 2 to 8 slow ones, or a single pathway."""
        if self.frames:
            return Layout(self.frames, 4, "both")
        rng = random.Random(f"layout/{stage}/{step}")
        frames = rng.choices((16, 8, 32, 64, rng.randint(5, 40)), (58, 12, 14, 6, 10))[0]
        slow = rng.choices((4, 2, 3, 6, 8), (68, 8, 6, 8, 10))[0]
        mode = rng.choices(("both", "slow", "fast"), (78, 11, 11))[0]
        return Layout(frames, min(slow, frames), mode)


def normalise(frames: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] -> pixel values float32 [N, 3, H, W]."""
    processor = image_processor()
    mean, std = (
        torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    pixels = torch.from_numpy(frames).flatten(0, -4).permute(0, 3, 1, 2)
    return pixels.float().div_(255).sub_(mean).div_(std)


def image_batch(
    stage: str, step: int, first: int, count: int, tinted: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`count` single frames and their patch labels [count, 8, 8, ...]."""
    frames, labels = [], []
    for index in range(first, first + count):
        scene = draw_scene(f"{stage}/{step}/{index}")
        scene = tint(scene, random.Random(f"tint/{stage}/{step}/{index}"), tinted)
        time = random.Random(f"time/{stage}/{step}/{index}").random()
        frames.append(render(scene, [time], half=True)[0])
        labels.append(patch_labels(scene, time))
    stacked = {key: torch.from_numpy(np.stack([label[key] for label in labels])) for key in labels[0]}
    return normalise(np.stack(frames)), stacked


def patch_words(tokenizer, labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which words say what a patch shows, and where: shares [N, 64, vocab]; and which show anything [N, 64].

    The pad token stands for nothing. The place is that of the shape's centre, not of the patch.
    """
    vocab = tokenizer.get_vocab()
    values = {
        "shape": SHAPES,
        "colour": tuple(COLOURS),
        "tens": "0123456789",
        "units": [f"##{d}" for d in range(10)],
    }
    shown = (labels["shape"] > 0) | (labels["tens"] > 0) | (labels["units"] > 0)
    words = torch.zeros(*shown.shape, len(vocab), device=shown.device)
    for key, names in values.items():
        ids = torch.tensor([0, *(vocab[name] for name in names)], device=shown.device)[labels[key]]
        words.scatter_add_(-1, ids[..., None], (labels[key] > 0)[..., None].float())
    for row, column in product(range(3), repeat=2):
        here = ((labels["down"] == row + 1) & (labels["across"] == column + 1)).float()
        for word in PLACES[row][column].split():
            words[..., vocab[word]] += here
    words[..., tokenizer.pad_token_id] = (~shown).float()
    return (words / words.sum(-1, keepdim=True)).flatten(1, 2), shown.flatten(1)


@dataclass
class ClipBatch:
    """Pixel values [B * T, 3, 96, 96], questions with answers and targets [B, Q, L], types [B, Q].

    For guidance: which patches show which thing, float32 [B, T, 64, MOST_THINGS]; where a question names
    things, bool [B, Q, L]; which ones, and at the start of an answer that is a thing, that thing, float32
    [B, Q, L, MOST_THINGS]; and what is true of each thing, int64 [B, MOST_THINGS, len(FACTS)], 0 = nothing.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor  # the next token where it belongs to the answer, else IGNORE
    types: torch.Tensor
    shown: torch.Tensor
    naming: torch.Tensor
    named: torch.Tensor
    answered: torch.Tensor
    facts: torch.Tensor


def clip_batch(tokenizer, stage: str, step: int, first: int, count: int, frames: int, diet: Diet = Diet()) -> ClipBatch:
    """`count` clips of `frames` frames, each with QUESTIONS_PER_CLIP questions."""
    scenes, clips, asked = [], [], []
    shown = torch.zeros(count, frames, GRID * GRID, MOST_THINGS)
    for clip, index in enumerate(range(first, first + count)):
        rng = random.Random(f"clip/{stage}/{step}/{index}")
        scene = draw_scene(f"{stage}/{step}/{index}", "train", diet.stills, diet.passing)
        scene = tint(scene, rng, diet.tinted, lone=True)
        total = rng.randint(max(frames, 24), LONGEST_VIDEO)
        times = frame_times(sample_frames(total, frames), total)
        scenes.append(scene)
        clips.append(render(scene, times, half=True))
        asked.append(ask_many(scene, QUESTIONS_PER_CLIP, rng, short_names=diet.short_names))
        shown[clip, ..., : len(scene.things)] = torch.from_numpy(thing_patches(scene, times))
        shown[clip, ..., -1] = torch.from_numpy(sign_patches(scene))
    ids, targets = encode_questions(tokenizer, asked)
    types = torch.tensor([[TYPES.index(question.type) for question in questions] for questions in asked])
    subjects = _subjects(tokenizer, scenes, asked, ids)
    return ClipBatch(normalise(np.stack(clips)), ids, targets, types, shown, *subjects, _facts(scenes))


def _subjects(
    tokenizer, scenes: list[Scene], asked: list[list[Question]], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`naming`, `named` and `answered` of a ClipBatch."""
    naming, (named, answered) = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(2, *ids.shape, MOST_THINGS)
    for clip, (scene, questions) in enumerate(zip(scenes, asked)):
        names = [thing.name for thing in scene.things]
        for row, question in enumerate(questions):
            words = tokenizer.convert_ids_to_tokens(ids[clip, row].tolist())
            start = words.index(ASSISTANT)
            for place, things in mentioned(words[:start], scene).items():
                naming[clip, row, place] = True
                named[clip, row, place, things] = 1.0
            if question.answer in names:
                answered[clip, row, start, names.index(question.answer)] = 1.0
    return naming, named, answered


def _facts(scenes: list[Scene]) -> torch.Tensor:
    facts = torch.zeros(len(scenes), MOST_THINGS, len(FACTS), dtype=torch.long)
    for clip, scene in enumerate(scenes):
        for index, thing in enumerate(scene.things):
            facts[clip, index] = torch.tensor(_facts_of(thing))
        if scene.sign:
            facts[clip, -1, -2:] = 1 + torch.tensor(divmod(scene.sign.number, 10))
    return facts


def _facts_of(thing: Thing) -> list[int]:
    column, row = (1 + 3 * centre // CANVAS if thing.kind == "still" else 0 for centre in thing.begin)
    passes = thing.kind != "still"
    return [
        0 if thing.tint else 1 + list(COLOURS).index(thing.colour),
        1 + SHAPES.index(thing.shape),
        column,
        row,
        1 + (DIRECTIONS.index(thing.direction) if thing.direction else len(DIRECTIONS)),
        1 + WHEN.index(when(thing)) if passes and when(thing) else 0,
        0,
        0,
    ]


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

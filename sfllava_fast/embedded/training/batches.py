"""Training data. Every batch is a function of its stage and step, so that runs can be resumed and repeated exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch

from ...layouts.sampling import sample_frames
from ..model import ASSISTANT, EOS, USER, answer_ids, image_processor
from ..questions import TYPES, WHEN, SceneQuestion, ask_many, mentioned, when
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
# Attributes of things and of the sign, and the number of their values; 0 means none.
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
Mode = Literal["both", "slow", "fast"]


@dataclass(frozen=True)
class StepLayout:
    """The layout of one training step: frames per clip, slow frames, pathways."""

    frames: int
    slow: int
    mode: Mode

    @property
    def clips(self) -> int:
        """Clips per share of the batch, fewer if they are long."""
        return 4 if self.frames <= 20 else 2 if self.frames <= 40 else 1


@dataclass(frozen=True)
class Diet:
    """The distribution of a stage's data.

    Attributes:
        stills, passing: As in `draw_scene`.
        frames: Per clip; 0 draws frames, slow frames and pathways for each step.
        short_names: As in `ask`.
        tinted: The share of things with a colour without a name, so that shapes are learned independently of colours;
            in clips, of the things whose shape alone identifies them.
    """

    stills: tuple[int, int] = STILLS
    passing: tuple[int, int] = PASSING
    frames: int = 0
    short_names: bool = False
    tinted: float = 0.0

    def layout(self, stage: str, step: int) -> StepLayout:
        """Mostly 16 frames with 4 slow ones; else 5 to 64 frames, 2 to 8 slow ones, or a single pathway."""
        if self.frames:
            return StepLayout(self.frames, 4, "both")
        rng = random.Random(f"layout/{stage}/{step}")
        frames = rng.choices((16, 8, 32, 64, rng.randint(5, 40)), (58, 12, 14, 6, 10))[0]
        slow = rng.choices((4, 2, 3, 6, 8), (68, 8, 6, 8, 10))[0]
        modes: tuple[Mode, ...] = ("both", "slow", "fast")
        mode = rng.choices(modes, (78, 11, 11))[0]
        return StepLayout(frames, min(slow, frames), mode)


def normalise(frames: np.ndarray) -> torch.Tensor:
    """Pixel values, float32 [N, 3, H, W], of frames, uint8 [..., H, W, 3]."""
    processor = image_processor()
    mean, std = (
        torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    pixels = torch.from_numpy(frames).flatten(0, -4).permute(0, 3, 1, 2)
    return pixels.float().div_(255).sub_(mean).div_(std)


def image_batch(
    stage: str, step: int, first: int, count: int, tinted: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw single frames.

    Args:
        stage, step: Of the training.
        first, count: The range of frames in the step's batch.
        tinted: As in `Diet`.

    Returns:
        Pixel values [count, 3, 96, 96], and `patch_labels` of each frame, stacked.
    """
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
    """Targets of the stage that aligns projected patches with word embeddings.

    Args:
        tokenizer: The model's.
        labels: As `image_batch` gives them.

    Returns:
        Target distributions [N, 64, vocab] over the words for a patch's shape, colour, digits and the place of the
        shape's centre, or the pad token for an empty patch; and whether a patch shows anything, bool [N, 64].
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
    """B clips of T frames with Q questions each.

    Attributes:
        pixels: [B * T, 3, 96, 96].
        ids: Questions with their answers, int64 [B, Q, L].
        targets: The next token if it belongs to the answer, else IGNORE, int64 [B, Q, L].
        types: Indices into TYPES, int64 [B, Q].
        shown: Whether a patch shows a thing, float32 [B, T, 64, MOST_THINGS].
        naming: Words that name things, bool [B, Q, L].
        named: The things that they name, float32 [B, Q, L, MOST_THINGS].
        answered: At the start of an answer that is a thing's name, this thing, float32 [B, Q, L, MOST_THINGS].
        facts: Attributes of each thing, 0 for none, int64 [B, MOST_THINGS, len(FACTS)].
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    types: torch.Tensor
    shown: torch.Tensor
    naming: torch.Tensor
    named: torch.Tensor
    answered: torch.Tensor
    facts: torch.Tensor


def clip_batch(tokenizer, stage: str, step: int, first: int, count: int, frames: int, diet: Diet = Diet()) -> ClipBatch:
    """Draw clips, each with QUESTIONS_PER_CLIP questions.

    Args:
        tokenizer: The model's.
        stage, step: Of the training.
        first, count: The range of clips in the step's batch.
        frames: Per clip.
        diet: The distribution of the data.
    """
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
    tokenizer, scenes: list[Scene], asked: list[list[SceneQuestion]], ids: torch.Tensor
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


def encode_questions(tokenizer, asked: list[list[SceneQuestion]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and next-token targets, int64 [B, Q, L], padded on the right; targets as in `ClipBatch`."""
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

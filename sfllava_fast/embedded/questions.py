"""Questions about drawn clips, each type in ten phrasings, with the right answer.

The last two phrasings of each type are held out of training.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .scenes import COLOURS, HELD_OUT, SHAPES, TRAINED, Scene, Thing, place_name

UNANSWERABLE = "I cannot answer that"
STILL = "it does not move"
WHEN = ("at the beginning", "in the middle", "at the end")
NUMBER_OF_HELD_OUT_PHRASINGS = 2

PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "what colour is the {s}?",
        "what color is the {s}?",
        "which colour does the {s} have?",
        "tell me the colour of the {s}.",
        "the {s} has what colour?",
        "what is the colour of the {s}?",
        "what is the color of the {s}?",
        "name the colour of the {s}.",
        "which color is the {s}?",
        "tell me what colour the {s} is.",
    ),
    "shape": (
        "what shape is the {c} one?",
        "what shape is the {c} object?",
        "which shape is {c}?",
        "what is the shape of the {c} object?",
        "tell me the shape of the {c} object.",
        "name the {c} shape.",
        "the {c} object has what shape?",
        "what is the {c} object?",
        "which shape does the {c} one have?",
        "tell me what shape the {c} object is.",
    ),
    "count": (
        "how many {n} are there?",
        "how many {n} are in the video?",
        "how many {n} do you see?",
        "count the {n}.",
        "what is the number of {n}?",
        "tell me how many {n} there are.",
        "how many {n} can you see?",
        "how many {n} does the video show?",
        "how many {n} are in the clip?",
        "count the {n} in the video.",
    ),
    "place": (
        "where is the {x}?",
        "where in the picture is the {x}?",
        "in which place is the {x}?",
        "what is the position of the {x}?",
        "tell me where the {x} is.",
        "at which place is the {x}?",
        "where can you see the {x}?",
        "name the place of the {x}.",
        "what is the place of the {x}?",
        "where do you see the {x}?",
    ),
    "relation": (
        "is the {x} {r} the {y}?",
        "does the {x} stand {r} the {y}?",
        "tell me if the {x} is {r} the {y}.",
        "{r} the {y}: where is the {x}?",
        "is the position of the {x} {r} the {y}?",
        "do you see the {x} {r} the {y}?",
        "the {x}: is it {r} the {y}?",
        "the {x} is {r} the {y}?",
        "can you see the {x} {r} the {y}?",
        "tell me: is the {x} {r} the {y}?",
    ),
    "number": (
        "what number is on the sign?",
        "which number is on the sign?",
        "what does the sign say?",
        "read the sign.",
        "what number does the sign show?",
        "tell me the number on the sign.",
        "what is written on the sign?",
        "what is the number on the sign?",
        "which number does the sign show?",
        "read the number on the sign.",
    ),
    "direction": (
        "which way does the {x} move?",
        "in which direction does the {x} move?",
        "where does the {x} move to?",
        "what is the direction of the {x}?",
        "which way does the {x} go?",
        "tell me which way the {x} moves.",
        "the {x} moves in which direction?",
        "which way is the {x} moving?",
        "in which direction does the {x} go?",
        "in which direction is the {x} moving?",
    ),
    "first": (
        "what appears first?",
        "which object appears first?",
        "what comes first?",
        "which shape comes first?",
        "what shows up first?",
        "tell me what appears first.",
        "name the first object to appear.",
        "what is the first object to show up?",
        "which object comes first?",
        "tell me what comes first.",
    ),
    "last": (
        "what appears last?",
        "which object appears last?",
        "what comes last?",
        "which shape comes last?",
        "what shows up last?",
        "tell me what appears last.",
        "name the last object to appear.",
        "what is the last object to show up?",
        "which object comes last?",
        "tell me what comes last.",
    ),
    "when": (
        "when does the {x} appear?",
        "when do you see the {x}?",
        "when does the {x} come?",
        "when is the {x} in the video?",
        "tell me when the {x} appears.",
        "when does the {x} show up?",
        "in which part of the video is the {x}?",
        "at the beginning or at the end: when is the {x}?",
        "when can you see the {x}?",
        "tell me when you see the {x}.",
    ),
    "exist": (
        "is there a {x}?",
        "do you see a {x}?",
        "does a {x} appear?",
        "can you see a {x}?",
        "is a {x} in the video?",
        "does the video show a {x}?",
        "is there a {x} in the clip?",
        "tell me if there is a {x}.",
        "is a {x} in the clip?",
        "can you see a {x} in the video?",
    ),
    "off topic": (
        "what is your name?",
        "who are you?",
        "what is the weather like?",
        "what sound is there?",
        "who made this video?",
        "why does it move?",
        "is the {s} happy?",
        "what does the {s} think?",
        "how old is the {s}?",
        "how much does the {x} cost?",
        "what is the capital of france?",
        "what is the name of the person?",
        "what does the person say?",
        "is there a person in the video?",
        "how fast is the {x}?",
        "who is in the video?",
        "where was the video made?",
        "can you help me?",
        "write a poem about the {s}.",
        "what is two plus two?",
        "which animal do you see?",
        "how heavy is the {x}?",
        "what colour is the animal?",
        "where is the person?",
        "how many people are there?",
        "do you like the {s}?",
        "what is the person doing?",
        "who wins?",
        "tell me a story.",
        "hello.",
        "what does the {x} think?",
        "how old is the person?",
    ),
}

# Relative frequency of each type in training. "total" counts all shapes, in the phrasings of "count".
WEIGHTS = {
    "colour": 6,
    "shape": 6,
    "count": 10,
    "total": 4,
    "place": 12,
    "relation": 10,
    "number": 6,
    "direction": 12,
    "first": 8,
    "last": 8,
    "when": 12,
    "exist": 10,
    "unanswerable": 9,
}
TYPES = tuple(WEIGHTS)

# Words that the tokenizer does not have: the model learns that questions with <unk> are unanswerable.
UNKNOWN_WORDS = (
    "dog",
    "cat",
    "car",
    "house",
    "tree",
    "hexagon",
    "banana",
    "phone",
    "river",
    "ball",
    "teacher",
    "cup",
)


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene, its answer, its type (one of TYPES) and its phrasing."""

    type: str
    text: str
    answer: str
    phrasing: str


def phrasings(kind: str, held_out: bool) -> tuple[str, ...]:
    """The phrasings of one type, those of training or the held-out ones."""
    every = PHRASINGS[kind]
    return every[-NUMBER_OF_HELD_OUT_PHRASINGS:] if held_out else every[:-NUMBER_OF_HELD_OUT_PHRASINGS]


def ask(
    scene: Scene,
    kind: str,
    rng: random.Random,
    split: str = "train",
    held_out_phrasing: bool = False,
    short_names: bool = False,
) -> SceneQuestion | None:
    """Draw a question of a type.

    Args:
        scene: The scene.
        kind: One of TYPES.
        rng: Draws the question.
        split: "heldout" prefers things of HELD_OUT pairs.
        held_out_phrasing: Use the phrasings that training does not.
        short_names: Call about half of the things by shape or colour alone if that identifies them: "the circle",
            "the red object".

    Returns:
        The question; None if the scene allows none.
    """
    return _MAKERS[kind](scene, rng, _QuestionMaker(kind, rng, split, held_out_phrasing, short_names))


def ask_many(
    scene: Scene,
    count: int,
    rng: random.Random,
    split: str = "train",
    held_out_phrasing: bool = False,
    short_names: bool = False,
) -> list[SceneQuestion]:
    """Draw `count` questions, their types by WEIGHTS; the other arguments as in `ask`."""
    questions: list[SceneQuestion] = []
    while len(questions) < count:
        kind = rng.choices(TYPES, list(WEIGHTS.values()))[0]
        question = ask(scene, kind, rng, split, held_out_phrasing, short_names)
        if question is not None:
            questions.append(question)
    return questions


def ask_each(
    scene: Scene, rng: random.Random, split: str = "heldout", held_out_phrasing: bool = False
) -> list[SceneQuestion]:
    """Draw one question of every type that the scene allows; the arguments as in `ask`."""
    asked = [ask(scene, kind, rng, split, held_out_phrasing) for kind in TYPES]
    return [question for question in asked if question is not None]


class _QuestionMaker:
    """Fills random phrasings of one type."""

    def __init__(self, kind: str, rng: random.Random, split: str, held_out: bool, short_names: bool):
        self.kind, self.rng, self.split, self.held_out = kind, rng, split, held_out
        self.short_names = short_names

    def __call__(self, answer: str, phrasing_of: str | None = None, **slots: str) -> SceneQuestion:
        phrasing = self.rng.choice(phrasings(phrasing_of or self.kind, self.held_out))
        text = phrasing.format(**slots).replace("a orange", "an orange")
        return SceneQuestion(self.kind, text, answer, phrasing)

    def pick(self, things: Sequence[Thing]) -> Thing | None:
        """One of the things, in the split "heldout" of a held-out pair if there is one; None if there are no things."""
        if self.split == "heldout":
            things = [thing for thing in things if (thing.colour, thing.shape) in HELD_OUT] or things
        return self.rng.choice(things) if things else None

    def name(self, scene: Scene, thing: Thing) -> str:
        if not self.short_names or self.rng.random() < 0.5:
            return thing.name
        short = []
        if thing in _unique(scene, "shape"):
            short.append(thing.shape)
        if thing in _unique(scene, "colour") and thing.tint is None:
            short.append(f"{thing.colour} object")
        return self.rng.choice(short) if short else thing.name

    def absent(self, scene: Scene) -> str:
        """The name of a thing of the split that is not in the scene; for half, its colour and its shape both are."""
        present = {(thing.colour, thing.shape) for thing in scene.things}
        if self.short_names and self.rng.random() < 0.4:
            shapes, colours = ({getattr(thing, key) for thing in scene.things} for key in ("shape", "colour"))
            return self.rng.choice(
                [shape for shape in SHAPES if shape not in shapes]
                + [f"{colour} object" for colour in COLOURS if colour not in colours]
            )
        pairs = TRAINED + HELD_OUT if self.split == "heldout" else TRAINED
        missing = [pair for pair in pairs if pair not in present]
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        near = [pair for pair in missing if pair[0] in colours and pair[1] in shapes]
        return " ".join(self.rng.choice(near if near and self.rng.random() < 0.5 else missing))


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    counts = Counter(getattr(thing, attribute) for thing in scene.things)
    return [thing for thing in scene.things if counts[getattr(thing, attribute)] == 1]


def _colour(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    thing = make.pick([thing for thing in _unique(scene, "shape") if thing.colour])
    return make(thing.colour, s=thing.shape) if thing else None


def _shape(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    thing = make.pick([thing for thing in _unique(scene, "colour") if thing.colour])
    return make(thing.shape, c=thing.colour) if thing else None


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def _count(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion:
    by_colour = rng.random() < 0.5
    values = list(COLOURS) if by_colour else list(SHAPES)
    attribute = "colour" if by_colour else "shape"
    present = [getattr(thing, attribute) for thing in scene.things]
    named = [value for value in present if value]
    value = rng.choice(named if named and rng.random() < 0.8 else values)
    noun = f"{value} {rng.choice(('shapes', 'objects'))}" if by_colour else plural(value)
    return make(str(present.count(value)), n=noun)


def _total(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion:
    return make(str(len(scene.things)), "count", n=rng.choice(("shapes", "objects")))


def _place(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    thing = make.pick(scene.of_kind("still"))
    return make(place_name(thing.begin), x=make.name(scene, thing)) if thing else None


def _relation(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    first = make.pick(scene.of_kind("still"))
    second = make.pick([thing for thing in scene.of_kind("still") if thing is not first])
    if first is None or second is None:
        return None
    axis = rng.randrange(2)
    gap = first.begin[axis] - second.begin[axis]
    if abs(gap) < 20:
        return None
    words = (("left", "right"), ("above", "below"))[axis]
    offered = f"{words[0]} or {words[1]}" if rng.random() < 0.5 else f"{words[1]} or {words[0]}"
    x, y = make.name(scene, first), make.name(scene, second)
    answer = words[1] if gap > 0 else words[0]
    return make(answer, x=x, y=y, r=f"{offered} of" if axis == 0 else offered)


def _number(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    return make(str(scene.sign.number)) if scene.sign else None


def _direction(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    kinds = ("still", "visit") if rng.random() < 0.15 else ("cross",)
    thing = make.pick(scene.of_kind(*kinds))
    return make(thing.direction or STILL, x=make.name(scene, thing)) if thing else None


def _passing(scene: Scene) -> list[Thing]:
    return sorted(scene.of_kind("visit", "cross"), key=lambda thing: thing.start)


def _first(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    return make(_passing(scene)[0].name) if _passing(scene) else None


def _last(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    return make(_passing(scene)[-1].name) if _passing(scene) else None


def when(thing: Thing) -> str | None:
    """The third of the clip (WHEN) that contains the middle of a visit; None within 0.04 of a border."""
    moment = (thing.start + thing.end) / 2
    if min(abs(moment - 1 / 3), abs(moment - 2 / 3)) < 0.04:
        return None
    return WHEN[int(moment * 3)]


def _when(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    thing = make.pick([thing for thing in _passing(scene) if when(thing)])
    answer = when(thing) if thing else None
    return make(answer, x=make.name(scene, thing)) if thing and answer else None


def _exist(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    if rng.random() < 0.5:
        thing = make.pick(scene.things)
        return make("yes", x=make.name(scene, thing)) if thing else None
    return make("no", x=make.absent(scene))


def _unanswerable(scene: Scene, rng: random.Random, make: _QuestionMaker) -> SceneQuestion | None:
    """A question off topic, about a thing that is not there, or with an unknown word."""
    if rng.random() < 0.35:
        thing = rng.choice(scene.things)
        return make(UNANSWERABLE, "off topic", x=thing.name, s=thing.shape)
    if scene.sign is None and rng.random() < 0.5:
        return make(UNANSWERABLE, "number")
    if not make.held_out and rng.random() < 0.35:
        word = rng.choice(UNKNOWN_WORDS)
        kind = rng.choice(("colour", "place", "direction", "when", "exist", "count"))
        return make(UNANSWERABLE, kind, x=word, s=word, n=word)
    kind = rng.choice(("colour", "shape", "place", "direction", "when"))
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    if len(colours) == len(COLOURS) or len(shapes) == len(SHAPES):
        return None
    colour = rng.choice([c for c in COLOURS if c not in colours])
    shape = rng.choice([s for s in SHAPES if s not in shapes])
    return make(UNANSWERABLE, kind, x=make.absent(scene), s=shape, c=colour)


_MAKERS: dict[str, Callable[[Scene, random.Random, _QuestionMaker], SceneQuestion | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "total": _total,
    "place": _place,
    "relation": _relation,
    "number": _number,
    "direction": _direction,
    "first": _first,
    "last": _last,
    "when": _when,
    "exist": _exist,
    "unanswerable": _unanswerable,
}


def mentioned(words: list[str], scene: Scene) -> dict[int, list[int]]:
    """Find the things that a question names.

    "where is the red circle?" names red circles at "circle"; "the red one" names red things at "red".

    Args:
        words: Of the question.
        scene: The scene.

    Returns:
        By the position of the last word of a name, the indices of the scene's things with that name: -1 for the sign,
        an empty list if no thing has it.
    """
    found: dict[int, list[int]] = {}
    shapes = {**{shape: shape for shape in SHAPES}, **{plural(shape): shape for shape in SHAPES}}
    for place, word in enumerate(words):
        before = words[place - 1] if place and word in shapes else word
        colour = before if before in COLOURS else None
        if word in COLOURS and place + 1 < len(words) and words[place + 1] in shapes:
            continue
        if word == "sign":
            found[place] = [-1] if scene.sign else []
        elif word in COLOURS or word in shapes:
            found[place] = [
                index
                for index, thing in enumerate(scene.things)
                if colour in (None, thing.colour) and shapes.get(word) in (None, thing.shape)
            ]
    return found


def vocabulary() -> list[str]:
    """Every word and punctuation mark of the phrasings and answers, sorted, without digits."""
    texts = [text for group in PHRASINGS.values() for text in group]
    texts += ["an above below left right or of shapes objects yes no", UNANSWERABLE, STILL]
    texts += [*WHEN, *COLOURS, *SHAPES, *map(plural, SHAPES), "up down top bottom middle left right"]
    words: set[str] = set()
    for text in texts:
        for mark in "?.,:":
            text = text.replace(mark, f" {mark} ")
        words.update(word for word in text.split() if "{" not in word)
    return sorted(words)

"""Draws short clips of coloured shapes with their exact ground truth.

The canvas has 192 x 192 pixels. A scene has shapes that stand still ("still"), shapes that appear, stay and vanish
("visit"), shapes that move from one side to the other ("cross"), and often a sign with a two-digit number. Time runs
from 0 to 1. Clips are drawn at 192 px for video files, or at 96 px for training, from cached sprites.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

CANVAS = 192
TOWER_SIZE = 96
PATCH = 12
GRID = TOWER_SIZE // PATCH
FPS = 8

COLOURS = {
    "red": (225, 40, 40),
    "orange": (250, 135, 20),
    "yellow": (240, 225, 50),
    "green": (40, 175, 60),
    "cyan": (60, 220, 225),
    "blue": (45, 85, 235),
    "purple": (145, 55, 190),
    "pink": (250, 150, 200),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = (28, 36)
DIRECTIONS = ("left", "right", "up", "down")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)

SPLITS = ("train", "heldout")
# Pairs of colour and shape that only held-out clips show.
HELD_OUT = (("red", "star"), ("yellow", "ring"), ("blue", "triangle"), ("pink", "cross"))
TRAINED = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
NO_NAME = -1
NAMELESS = 60  # least RGB distance of a colour without a name from every named one
STILLS, PASSING = (3, 5), (2, 3)  # least and most shapes that stand still, and that visit or cross

# Least distances of a centre, in pixels: from the border, from other centres, from the lines between the nine places.
EDGE, SPACING, THIRD_MARGIN = 20, 38, 6
DIGIT_WIDTH, DIGIT_HEIGHT, DIGIT_PIXEL, DIGIT_GAP = 20, 28, 4, 6
SIGN_WIDTH, SIGN_HEIGHT = 64, 40
SIGN_PAPER, SIGN_INK = (245, 242, 230), (20, 20, 25)

_DIGITS = (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ...#. ..#.. .#... #####",
    "####. ....# ....# .###. ....# ....# ####.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)


@dataclass(frozen=True)
class Thing:
    """One shape.

    Attributes:
        colour: A name in COLOURS, or "" with a `tint`.
        shape: One of SHAPES.
        size: In pixels of the canvas.
        kind: "still", "visit" or "cross".
        begin, finish: Its centre (x, y) at the start and at the end, in pixels of the canvas.
        start, end: When it is visible, 0 to 1.
        tint: A colour without a name.
    """

    colour: str
    shape: str
    size: int
    kind: str
    begin: tuple[int, int]
    finish: tuple[int, int]
    start: float = 0.0
    end: float = 1.0
    tint: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """Colour and shape, or the shape alone."""
        return f"{self.colour} {self.shape}".lstrip()

    def visible(self, time: float) -> bool:
        """Whether the thing is on the canvas."""
        return self.kind == "still" or self.start <= time < self.end

    def centre(self, time: float) -> tuple[int, int]:
        """Centre (x, y) in pixels of the canvas, at a time when the thing is visible."""
        way = (time - self.start) / (self.end - self.start) if self.kind == "cross" else 0.0
        (x, y), (to_x, to_y) = self.begin, self.finish
        return round(x + (to_x - x) * way), round(y + (to_y - y) * way)

    @property
    def direction(self) -> str | None:
        """One of DIRECTIONS for a shape that crosses, else None."""
        if self.kind != "cross":
            return None
        dx, dy = self.finish[0] - self.begin[0], self.finish[1] - self.begin[1]
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")


@dataclass(frozen=True)
class Sign:
    """A board with a two-digit number; its centre in pixels of the canvas."""

    centre: tuple[int, int]
    number: int


@dataclass(frozen=True)
class Scene:
    """The content of a clip."""

    things: tuple[Thing, ...]
    sign: Sign | None
    background: tuple[int, int, int]

    def of_kind(self, *kinds: str) -> list[Thing]:
        """The things of some kinds, in the scene's order."""
        return [thing for thing in self.things if thing.kind in kinds]


def frame_times(indices: list[int], total: int) -> list[float]:
    """Times in (0, 1) of the frames `indices` of a video with `total` frames."""
    return [(index + 0.5) / total for index in indices]


def place_name(centre: tuple[int, int]) -> str:
    """The name of the ninth of the canvas that contains (x, y)."""
    x, y = centre
    return PLACES[min(2, 3 * y // CANVAS)][min(2, 3 * x // CANVAS)]


def draw_scene(
    seed: int | str, split: str = "train", stills: tuple[int, int] = STILLS, passing: tuple[int, int] = PASSING
) -> Scene:
    """A random scene; four of five have a sign.

    Args:
        seed: The scene is a function of seed and split.
        split: "heldout" shows two or three pairs of HELD_OUT among others, "train" none.
        stills: Least and most shapes that stand still.
        passing: Least and most shapes that visit or cross.
    """
    rng = random.Random(f"{split}/{seed}")
    while True:
        scene = _try_scene(rng, split, rng.randint(*stills), rng.randint(*passing))
        if scene is not None:
            return scene


def tint(scene: Scene, rng: random.Random, share: float, lone: bool = False) -> Scene:
    """The scene with some things in colours without a name.

    Args:
        scene: The scene.
        rng: Draws the things and colours.
        share: Probability for each thing.
        lone: Only things whose shape no other thing has, so that the shape alone identifies them.
    """
    shapes = [thing.shape for thing in scene.things]
    return replace(
        scene,
        things=tuple(
            replace(thing, colour="", tint=_nameless(rng))
            if not (lone and shapes.count(thing.shape) > 1) and rng.random() < share
            else thing
            for thing in scene.things
        ),
    )


def _nameless(rng: random.Random) -> tuple[int, int, int]:
    while True:
        colour = rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)
        near = min(sum((a - b) ** 2 for a, b in zip(colour, named)) for named in COLOURS.values())
        if near > NAMELESS**2 and max(colour) > 90:  # brighter than any background
            return colour


def _try_scene(rng: random.Random, split: str, stills: int, passing: int) -> Scene | None:
    names = _choose_names(rng, split, stills + passing)
    sign = _draw_sign(rng) if rng.random() < 0.8 else None
    taken: list[tuple[int, int]] = []
    things = []
    for colour, shape in names[:stills]:
        centre = _free_centre(rng, taken, sign)
        if centre is None:
            return None
        things.append(Thing(colour, shape, rng.choice(SIZES), "still", centre, centre))
    for (colour, shape), start in zip(names[stills:], _start_times(rng, passing)):
        thing = _draw_passing(rng, colour, shape, start, taken, sign)
        if thing is None:
            return None
        things.append(thing)
    return Scene(tuple(things), sign, (rng.randint(12, 60), rng.randint(12, 60), rng.randint(12, 60)))


def _choose_names(rng: random.Random, split: str, count: int) -> list[tuple[str, str]]:
    """Distinct (colour, shape) pairs; in half of the scenes of four colours only, so that colours repeat."""
    colours = list(COLOURS)
    if rng.random() < 0.5:
        colours = rng.sample(colours, 4)
    new = rng.sample(HELD_OUT, min(count, rng.randint(2, 3))) if split == "heldout" else []
    known = rng.sample([pair for pair in TRAINED if pair[0] in colours], count - len(new))
    return rng.sample(new + known, count)


def _draw_sign(rng: random.Random) -> Sign:
    x = 8 * rng.randint(5, (CANVAS - 40) // 8)
    y = 8 * rng.randint(3, (CANVAS - 24) // 8)
    return Sign((x, y), rng.randint(10, 99))


def _free_centre(rng: random.Random, taken: list[tuple[int, int]], sign: Sign | None) -> tuple[int, int] | None:
    for _ in range(40):
        x, y = rng.randint(EDGE, CANVAS - EDGE), rng.randint(EDGE, CANVAS - EDGE)
        if min(abs(v - line) for v in (x, y) for line in (CANVAS // 3, 2 * CANVAS // 3)) < THIRD_MARGIN:
            continue
        if any((x - a) ** 2 + (y - b) ** 2 < SPACING**2 for a, b in taken):
            continue
        if sign and _near_sign(x, y, sign):
            continue
        taken.append((x, y))
        return x, y
    return None


def _near_sign(x: int, y: int, sign: Sign) -> bool:
    reach_x, reach_y = SIGN_WIDTH // 2 + 19, SIGN_HEIGHT // 2 + 19
    return abs(x - sign.centre[0]) < reach_x and abs(y - sign.centre[1]) < reach_y


def _start_times(rng: random.Random, count: int) -> list[float]:
    """Times of appearance, at least 0.14 apart."""
    slack = 0.64 - 0.14 * (count - 1)
    cuts = sorted(rng.random() * slack for _ in range(count))
    times = [0.06 + cut + 0.14 * i for i, cut in enumerate(cuts)]
    rng.shuffle(times)
    return times


def _draw_passing(
    rng: random.Random, colour: str, shape: str, start: float, taken: list[tuple[int, int]], sign: Sign | None
) -> Thing | None:
    size = rng.choice(SIZES)
    if rng.random() < 0.6:
        begin, finish = _crossing(rng)
        end = start + min(rng.uniform(0.25, 0.36), 0.98 - start)
        return Thing(colour, shape, size, "cross", begin, finish, start, end)
    centre = _free_centre(rng, taken, sign)
    if centre is None:
        return None
    end = start + min(rng.uniform(0.16, 0.30), 0.98 - start)
    return Thing(colour, shape, size, "visit", centre, centre, start, end)


def _crossing(rng: random.Random) -> tuple[tuple[int, int], tuple[int, int]]:
    lane = rng.randint(EDGE, CANVAS - EDGE)
    low, high = EDGE, CANVAS - EDGE
    ends = {
        "left": ((high, lane), (low, lane)),
        "right": ((low, lane), (high, lane)),
        "up": ((lane, high), (lane, low)),
        "down": ((lane, low), (lane, high)),
    }
    return ends[rng.choice(DIRECTIONS)]


def _polygon(points: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd test of every (x, y) against a polygon."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / ((y1 - y0) or 1e-9) + x0)
    return inside


def _mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the shape covers each point in [-1, 1] x [-1, 1]; y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 0.95
    if shape == "ring":
        return (radius <= 1.0) & (radius >= 0.52)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85
    if shape == "diamond":
        return abs(x) * 1.25 + abs(y) <= 1.0
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.98)
    if shape == "triangle":
        return _polygon([(0.0, -0.95), (0.98, 0.85), (-0.98, 0.85)], x, y)
    if shape == "star":
        angles = [np.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
        return _polygon([(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles)], x, y)
    a, b = 1.2 * x, -1.2 * y + 0.15
    return (a * a + b * b - 1) ** 3 - a * a * b**3 <= 0


@cache
def _shape_alpha(shape: str, size: int) -> np.ndarray:
    """Antialiased coverage, float32 [size, size], at canvas scale from 8 x 8 samples per pixel."""
    axis = (np.arange(size * 8) + 0.5) / (size * 4) - 1
    x, y = np.meshgrid(axis, axis)
    return _mask(shape, x, y).reshape(size, 8, size, 8).mean((1, 3)).astype(np.float32)


def _sign_image(number: int) -> np.ndarray:
    """The board, float32 [SIGN_HEIGHT, SIGN_WIDTH, 3]."""
    board = np.empty((SIGN_HEIGHT, SIGN_WIDTH, 3), np.float32)
    board[:] = SIGN_INK
    board[2:-2, 2:-2] = SIGN_PAPER
    for digit, left in zip(f"{number:02d}", digit_lefts()):
        rows = np.array([[c == "#" for c in row] for row in _DIGITS[int(digit)].split()])
        ink = np.kron(rows, np.ones((DIGIT_PIXEL, DIGIT_PIXEL), bool))
        top = (SIGN_HEIGHT - DIGIT_HEIGHT) // 2
        board[top : top + DIGIT_HEIGHT, left : left + DIGIT_WIDTH][ink] = SIGN_INK
    return board


def digit_lefts() -> tuple[int, int]:
    """Left edges of the two digits within the board, in pixels of the canvas."""
    left = (SIGN_WIDTH - 2 * DIGIT_WIDTH - DIGIT_GAP) // 2
    return left, left + DIGIT_WIDTH + DIGIT_GAP


def _halve(image: np.ndarray, phase: tuple[int, int], border: int = 4) -> np.ndarray:
    """Half-size bicubic copy of [h, w, c], after a shift of `phase` (x, y) pixels."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * border + height % 2, width + 2 * border + width % 2, channels), np.float32)
    padded[border + phase[1] :, border + phase[0] :][:height, :width] = image
    half = torch.nn.functional.interpolate(
        torch.from_numpy(padded).permute(2, 0, 1)[None],
        size=(padded.shape[0] // 2, padded.shape[1] // 2),
        mode="bicubic",
        antialias=True,
    )
    return half[0].permute(1, 2, 0).numpy().copy()


@cache
def _shape_sprite(shape: str, size: int, phase: tuple[int, int] | None) -> tuple[np.ndarray, int]:
    """Coverage [h, w, 1] and its border; at canvas scale if phase is None, else at half scale with that phase."""
    alpha = _shape_alpha(shape, size)[:, :, None]
    return (alpha, 0) if phase is None else (_halve(alpha, phase), 2)


@cache
def _sign_sprite(number: int, phase: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Coverage, colours and border; as `_shape_sprite`."""
    board = _sign_image(number)
    if phase is None:
        return np.ones_like(board[:, :, :1]), board, 0
    stacked = _halve(np.concatenate([np.ones_like(board[:, :, :1]), board], 2), phase)
    return stacked[:, :, :1], stacked[:, :, 1:], 2


def _paste(frame: np.ndarray, alpha: np.ndarray, colours: np.ndarray, corner: tuple[int, int]) -> None:
    """Blend premultiplied colours [h, w, 3] into a float frame at (x, y), in place."""
    x, y = corner
    top, left = max(0, -y), max(0, -x)
    region = frame[y + top : y + alpha.shape[0], x + left : x + alpha.shape[1]]
    window = (slice(top, top + region.shape[0]), slice(left, left + region.shape[1]))
    region *= 1 - alpha[window]
    region += colours[window]


def _at(corner: tuple[int, int], border: int, half: bool) -> tuple[int, int]:
    x, y = corner
    return (x // 2 - border, y // 2 - border) if half else corner


def _phase(corner: tuple[int, int], half: bool) -> tuple[int, int] | None:
    return (corner[0] % 2, corner[1] % 2) if half else None


def _paste_thing(frame: np.ndarray, thing: Thing, time: float, half: bool) -> None:
    x, y = thing.centre(time)
    corner = x - thing.size // 2, y - thing.size // 2
    alpha, border = _shape_sprite(thing.shape, thing.size, _phase(corner, half))
    colour = np.array(thing.tint or COLOURS[thing.colour], np.float32)
    _paste(frame, alpha, alpha * colour, _at(corner, border, half))


def _paste_sign(frame: np.ndarray, sign: Sign, half: bool) -> None:
    x, y = sign.centre
    corner = x - SIGN_WIDTH // 2, y - SIGN_HEIGHT // 2
    alpha, colours, border = _sign_sprite(sign.number, _phase(corner, half))
    _paste(frame, alpha, colours, _at(corner, border, half))


def render(scene: Scene, times: list[float], half: bool = False) -> np.ndarray:
    """Draw frames of a scene.

    Args:
        scene: The scene.
        times: Of the frames, 0 to 1.
        half: At the tower's size, as preprocessing would resize them.

    Returns:
        uint8 [T, 192, 192, 3]; with `half`, [T, 96, 96, 3].
    """
    edge = TOWER_SIZE if half else CANVAS
    shade = np.linspace(0.85, 1.15, edge, dtype=np.float32)[:, None, None]
    still = np.broadcast_to(shade * np.array(scene.background, np.float32), (edge, edge, 3)).copy()
    for thing in scene.of_kind("still"):
        _paste_thing(still, thing, 0.0, half)
    if scene.sign:
        _paste_sign(still, scene.sign, half)
    frames = np.repeat(still[None], len(times), axis=0)
    for frame, time in zip(frames, times):
        for thing in scene.of_kind("visit", "cross"):
            if thing.visible(time):
                _paste_thing(frame, thing, time, half)
    return (frames.clip(0, 255) + 0.5).astype(np.uint8)


def patch_labels(scene: Scene, time: float) -> dict[str, np.ndarray]:
    """Labels of what each 12 px patch of a frame shows, for the tower's stage of training.

    Args:
        scene: The scene.
        time: Of the frame, 0 to 1.

    Returns:
        int64 [8, 8], 0 for nothing: `shape`, `colour` (NO_NAME for a tint), `across` and `down` (the column and row of
        PLACES with the shape's centre), `tens`, `units`. float32 [8, 8, 2]: `offset`, from the patch's centre to the
        shape's, in patches.
    """
    shape, colour, across, down = (np.zeros((GRID, GRID), np.int64) for _ in range(4))
    offset, best = np.zeros((GRID, GRID, 2), np.float32), np.full((GRID, GRID), 0.15, np.float32)
    middle, side = np.arange(GRID) + 0.5, 2 * PATCH
    for thing in scene.things:
        if not thing.visible(time):
            continue
        x, y = thing.centre(time)
        rows, columns, cover = _patch_cover(thing, x, y)
        mine = cover > best[rows, columns]
        best[rows, columns][mine] = cover[mine]
        shape[rows, columns][mine] = 1 + SHAPES.index(thing.shape)
        colour[rows, columns][mine] = NO_NAME if thing.tint else 1 + list(COLOURS).index(thing.colour)
        across[rows, columns][mine], down[rows, columns][mine] = 1 + 3 * x // CANVAS, 1 + 3 * y // CANVAS
        offset[rows, columns][mine] = np.stack(np.meshgrid(x / side - middle[columns], y / side - middle[rows]), 2)[
            mine
        ]
    tens, units = _digit_labels(scene.sign)
    return {
        "shape": shape,
        "colour": colour,
        "across": across,
        "down": down,
        "tens": tens,
        "units": units,
        "offset": offset,
    }


def _patch_cover(thing: Thing, x: int, y: int) -> tuple[slice, slice, np.ndarray]:
    """The 3 x 3 patches (rows, columns) around a thing, and the share of each that it covers."""
    side, left, top = 2 * PATCH, x - thing.size // 2, y - thing.size // 2
    column, row = min(left // side, GRID - 3), min(top // side, GRID - 3)
    window = np.zeros((3 * side, 3 * side), np.float32)
    corner = window[top - row * side :, left - column * side :]
    corner[: thing.size, : thing.size] = _shape_alpha(thing.shape, thing.size)
    cover = window.reshape(3, side, 3, side).mean((1, 3))
    return slice(row, row + 3), slice(column, column + 3), cover


def thing_patches(scene: Scene, times: list[float]) -> np.ndarray:
    """Whether a patch shows a thing, bool [T, 64, things]."""
    shown = np.zeros((len(times), GRID, GRID, len(scene.things)), bool)
    for index, thing in enumerate(scene.things):
        for frame, time in enumerate(times):
            if frame and thing.kind == "still":
                shown[frame, ..., index] = shown[0, ..., index]
            elif thing.visible(time):
                rows, columns, cover = _patch_cover(thing, *thing.centre(time))
                shown[frame, rows, columns, index] = cover > 0.15
    return shown.reshape(len(times), GRID * GRID, -1)


def sign_patches(scene: Scene) -> np.ndarray:
    """Whether a patch shows a digit, bool [64]."""
    tens, units = _digit_labels(scene.sign)
    return ((tens > 0) | (units > 0)).reshape(-1)


def _digit_labels(sign: Sign | None) -> list[np.ndarray]:
    labels = [np.zeros((GRID, GRID), np.int64) for _ in range(2)]
    if sign is None:
        return labels
    for label, digit, left in zip(labels, divmod(sign.number, 10), digit_lefts()):
        x, y = sign.centre[0] - SIGN_WIDTH // 2 + left, sign.centre[1] - DIGIT_HEIGHT // 2
        edges = np.arange(GRID) * 2 * PATCH
        across = (np.minimum(edges + 2 * PATCH, x + DIGIT_WIDTH) - np.maximum(edges, x)).clip(0)
        down = (np.minimum(edges + 2 * PATCH, y + DIGIT_HEIGHT) - np.maximum(edges, y)).clip(0)
        label[np.outer(down, across) > 0.2 * DIGIT_WIDTH * DIGIT_HEIGHT] = 1 + digit
    return labels


def write_video(scene: Scene, path: str | Path, total: int = 64) -> None:
    """Encode a scene as H.264 of 192 x 192 pixels, yuv420p, at 8 frames per second.

    Args:
        scene: The scene.
        path: An .mp4 file.
        total: Number of frames.
    """
    import av

    frames = render(scene, frame_times(list(range(total)), total))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18"})
        stream.width = stream.height = CANVAS
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))

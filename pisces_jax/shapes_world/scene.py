"""The scenes of the shapes world: what they may hold, how they are sampled, and how they become pixels.

A scene is one to four coloured shapes on a grey ground. Sizes and places are continuous, in units of a canvas of 32 by
32 whatever the picture's size. Some combinations never occur in training (`HELD_OUT_*`), to test composition.
"""

import dataclasses
import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Float, UInt8

from pisces_jax.evaluation import geneval
from pisces_jax.evaluation.relations import CONVERSE, Box, relations

CANVAS = 32.0
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {  # in sRGB
    "red": (214, 28, 34),
    "orange": (245, 138, 16),
    "yellow": (246, 224, 40),
    "green": (32, 156, 52),
    "blue": (32, 84, 222),
    "purple": (124, 36, 172),
    "pink": (252, 134, 196),
    "brown": (122, 70, 24),
    "black": (14, 14, 14),
    "white": (241, 241, 241),
}
assert tuple(COLORS) == geneval.COLORS  # also the order, which random choices depend on
COLOR_SPREAD = 12  # an object's colour differs from its name's by at most this, per channel
GROUND_LEVEL = (112.0, 144.0)
GROUND_TINT = 5.0
MAX_OBJECTS = 4
SIZES = (10.0, 14.0)  # least and largest side of the bounding box, which is square for every shape
GAP = 1.5  # two bounding boxes are at least this far apart along one axis
RING_HOLE = 0.5  # inner radius over outer radius
CROSS_BAR = 0.36  # width of a bar over its length

HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "blue"),
        ("diamond", "red"),
        ("cross", "white"),
        ("ring", "green"),
    }
)
_ONE_WAY = (
    ("left of", "circle", "square"),
    ("right of", "triangle", "ring"),
    ("above", "cross", "diamond"),
    ("below", "square", "cross"),
)
HELD_OUT_RELATIONS = frozenset(  # with their converses: A left of B is B right of A
    _ONE_WAY + tuple((CONVERSE[relation], b, a) for relation, a, b in _ONE_WAY)
)
HELD_OUT_COUNTS = frozenset({(2, "diamond"), (3, "circle"), (4, "triangle")})

ALLOWED_COLORS = {s: tuple(c for c in COLORS if (s, c) not in HELD_OUT_PAIRS) for s in SHAPES}
ALLOWED_SHAPES = {c: tuple(s for s in SHAPES if (s, c) not in HELD_OUT_PAIRS) for c in COLORS}
SPLITS = ("train", "val", "held_out")

_SPREAD = tuple(range(-COLOR_SPREAD, COLOR_SPREAD + 1))
Name = tuple[str, str]
"""shape, colour"""


@dataclasses.dataclass(frozen=True, slots=True)
class Object:
    """One shape: centre `x`, `y` and bounding-box side `size` in canvas units, `rgb` in 0..255."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    rgb: tuple[int, int, int]

    @property
    def box(self) -> Box:
        half = self.size / 2
        return (self.x - half, self.y - half, self.x + half, self.y + half)


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Objects in no particular order, on a ground of one colour (0..255)."""

    objects: tuple[Object, ...]
    background: tuple[float, float, float]


def violates(scene: Scene) -> bool:
    """Whether the scene holds a combination that is held out of training."""
    return any((o.shape, o.color) in HELD_OUT_PAIRS for o in scene.objects) or (
        holds_held_out_count([(o.shape, o.color) for o in scene.objects]) or holds_held_out_relation(scene.objects)
    )


def holds_held_out_count(names: Sequence[Name]) -> bool:
    """Whether a shape occurs exactly as often as is held out, overall or in one colour ("two red diamonds")."""
    counts = [*Counter(shape for shape, _ in names).items()]
    counts += [(shape, count) for (shape, _), count in Counter(names).items()]
    return any((count, shape) in HELD_OUT_COUNTS for shape, count in counts)


def holds_held_out_relation(objects: Sequence[Object]) -> bool:
    return any(
        (relation, a.shape, b.shape) in HELD_OUT_RELATIONS
        for a, b in combinations(objects, 2)
        if (a.shape, b.shape) in _RELATED_SHAPES
        for relation in relations(a.box, b.box)
    )


_RELATED_SHAPES = frozenset((a, b) for _, a, b in HELD_OUT_RELATIONS)  # most pairs need no further check


# Sampling


def sample_scene(rng: random.Random, split: str = "train", most: int = MAX_OBJECTS) -> Scene:
    """A random scene of up to `most` objects.

    Scenes of "train" and "val" hold nothing that is held out; every scene of "held_out" holds something that is.
    """
    if split == "held_out":
        while True:
            scene = arrange(rng, sample_names(rng, allowed_only=False, most=most))
            if violates(scene):
                return scene
    while True:
        names = sample_names(rng, most=most)
        if len(names) == 1 or not holds_held_out_count(names):
            return arrange(rng, names, keep_allowed=True)


def sample_names(rng: random.Random, allowed_only: bool = True, most: int = MAX_OBJECTS) -> list[Name]:
    """Shapes and colours of one to `most` objects.

    They are a mixture, so that each kind of prompt and question fits many scenes: all of one shape (counting), all of
    one colour, all of different shapes (position, attributes), or anything.
    """
    count = rng.choices((1, 2, 3, 4)[:most], (1, 2, 2, 2)[:most])[0]
    colors = ALLOWED_COLORS if allowed_only else dict.fromkeys(SHAPES, tuple(COLORS))
    kind = rng.random()
    if kind < 0.3:
        shapes = [rng.choice(SHAPES)] * count
    elif kind < 0.4:
        color = rng.choice(tuple(COLORS))
        shapes = rng.choices(ALLOWED_SHAPES[color] if allowed_only else SHAPES, k=count)
        return [(shape, color) for shape in shapes]
    elif kind < 0.8:
        shapes = rng.sample(SHAPES, count)
    else:
        shapes = rng.choices(SHAPES, k=count)
    return [(shape, rng.choice(colors[shape])) for shape in shapes]


def arrange(
    rng: random.Random,
    names: Sequence[Name],
    keep_allowed: bool = False,
    accept: Callable[[tuple[Object, ...]], bool] = lambda objects: True,
) -> Scene:
    """Gives the named objects sizes, places and exact colours; tries again until `accept` returns True.

    With `keep_allowed` no held-out relation occurs. Boxes stay `GAP` apart and inside the canvas; each object's place
    is uniform over the room that the objects before it leave.
    """
    low, high = SIZES
    while True:
        boxes: list[tuple[float, float, float]] = []
        for _ in names:
            size = low + (high - low) * rng.random()
            place = free_place(rng, boxes, size)
            if place is None:
                break
            boxes.append((*place, size))
        else:
            objects = tuple(
                Object(shape, color, x, y, size, _vary(rng, COLORS[color]))
                for (shape, color), (x, y, size) in zip(names, boxes, strict=True)
            )
            if not (keep_allowed and holds_held_out_relation(objects)) and accept(objects):
                return Scene(objects, _sample_ground(rng))


def free_place(
    rng: random.Random, boxes: Sequence[tuple[float, float, float]], size: float
) -> tuple[float, float] | None:
    """A centre, uniform over where a box of side `size` fits beside `boxes` (x, y, size); None if it fits nowhere."""
    low, high = size / 2, CANVAS - size / 2
    if not boxes:
        return low + (high - low) * rng.random(), low + (high - low) * rng.random()
    blocked = []  # squares that the centre must avoid, sorted by their upper edge
    for x, y, other in boxes:
        reach = (size + other) / 2 + GAP
        blocked.append((y - reach, y + reach, x - reach, x + reach))
    blocked.sort()
    cuts = sorted([low, high] + [x for _, _, x0, x1 in blocked for x in (x0, x1) if low < x < high])
    free, areas, total = [], [], 0.0  # rectangles x0, x1, y0, y1 that tile the free room, and their summed areas
    for x0, x1 in pairwise(cuts):
        middle, top = (x0 + x1) / 2, low
        for y0, y1, left, right in blocked:
            if left < middle < right:
                if y0 > top:
                    free.append((x0, x1, top, y0))
                    areas.append(total := total + (x1 - x0) * (y0 - top))
                top = max(top, y1)
        if top < high:
            free.append((x0, x1, top, high))
            areas.append(total := total + (x1 - x0) * (high - top))
    if not free:
        return None
    x0, x1, y0, y1 = rng.choices(free, cum_weights=areas)[0]
    return x0 + (x1 - x0) * rng.random(), y0 + (y1 - y0) * rng.random()


def _vary(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple([min(255, max(0, c + rng.choice(_SPREAD))) for c in rgb])  # type: ignore[return-value]


def _sample_ground(rng: random.Random) -> tuple[float, float, float]:
    level = rng.uniform(*GROUND_LEVEL)
    r, g, b = (level + rng.uniform(-GROUND_TINT, GROUND_TINT) for _ in range(3))
    return r, g, b


# Rendering


def render(scene: Scene, size: int = 32) -> UInt8[np.ndarray, "S S 3"]:
    """The scene's picture, anti-aliased. Objects never overlap, so each is added on its own."""
    scale = size / CANVAS
    centres = _pixel_centres(size)
    background = np.array(scene.background, np.float32)
    image = np.empty((size, size, 3), np.float32)
    image[:] = background + 0.5  # half a level, so that truncation below rounds
    for o in scene.objects:
        x, y, side = o.x * scale, o.y * scale, o.size * scale
        x0, x1 = max(math.floor(x - side / 2), 0), min(math.ceil(x + side / 2), size)
        y0, y1 = max(math.floor(y - side / 2), 0), min(math.ceil(y + side / 2), size)
        covered = coverage(o.shape, centres[x0:x1] - x, centres[y0:y1] - y, side)
        image[y0:y1, x0:x1] += covered[:, :, None] * (np.array(o.rgb, np.float32) - background)
    return image.astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _pixel_centres(size: int) -> Float[np.ndarray, " S"]:
    return np.arange(size, dtype=np.float32) + np.float32(0.5)


def coverage(
    shape: str, x: Float[np.ndarray, "*B W"], y: Float[np.ndarray, "*B H"], size: float | Float[np.ndarray, "*B 1 1"]
) -> Float[np.ndarray, "*B H W"]:
    """How much of each pixel (a unit square) a shape of side `size` at the origin covers, in 0..1.

    `x`, `y` are pixel centres, in pixels. The result is exact for squares and crosses. For the others it comes from the
    distance to the outline and is right to a few hundredths, except in pixels that hold a sharp tip.
    """
    half = size / 2
    x, y = x[..., None, :], y[..., :, None]
    if shape == "square":
        return _bar(y, half) * _bar(x, half)
    if shape == "cross":
        thin = half * CROSS_BAR
        thin_x, thin_y = _bar(x, thin), _bar(y, thin)
        return _bar(y, half) * thin_x + thin_y * (_bar(x, half) - thin_x)
    if shape == "diamond":
        slant = math.sqrt(0.5)  # two bands that cross at right angles
        return _inside((np.abs(x + y) - half) * slant) * _inside((np.abs(x - y) - half) * slant)
    if shape == "triangle":  # apex at the top, base and height both `size`
        # Near the apex a pixel may lie outside both sides.
        slant, across = 1 / math.sqrt(5), (y + half) / math.sqrt(5)
        sides = _inside(2 * slant * x - across) + _inside(-2 * slant * x - across) - 1
        return np.maximum(sides, 0) * _inside(y - half)
    radius = np.sqrt(y * y + x * x)
    if shape == "circle":
        return _inside(radius - half)
    if shape == "ring":
        return _inside(radius - half) - _inside(radius - half * RING_HOLE)
    raise ValueError(f"no shape is called {shape!r}; the shapes are {', '.join(SHAPES)}")


def _inside(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel whose centre lies `distance` (pixels) outside a straight edge."""
    return np.minimum(np.maximum(0.5 - distance, 0), 1)


def _bar(x: np.ndarray, half: float | np.ndarray) -> np.ndarray:
    """Overlap of the unit intervals about `x` with [-half, half]."""
    return np.maximum(np.minimum(x + 0.5, half) - np.maximum(x - 0.5, -half), 0)

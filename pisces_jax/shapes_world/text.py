"""Captions and GenEval prompts of the shapes world, in plain English.

There are two captions: the short one names what is there; the detailed one gives size, colour, shape and place of every
object. Prompts follow GenEval's wording and metadata, and are true of their scene under GenEval's rules.
"""

import functools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pisces_jax.evaluation.geneval import TAGS, Metadata
from pisces_jax.evaluation.relations import RELATIONS, relations
from pisces_jax.shapes_world.scene import (
    ALLOWED_COLORS,
    CANVAS,
    COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    arrange,
    holds_held_out_count,
)
from pisces_jax.shapes_world.wordings import PROMPT

NUMBERS = ("zero", "one", "two", "three", "four")
SIZE_WORDS = ("small", "medium", "large")  # equal parts of SIZES
# Rows and columns have no word in common, so an object's words mean the same in any order.
_HEIGHTS = ("barely", "slightly", "fairly", "clearly", "very", "extremely")
_SIDES = ("just", "somewhat", "rather", "well", "far", "furthest")
# Twelve equal parts of where centres can be, each about a quarter of a cell of the small configs' pooled grid. The best
# that a regression can do is the mean of all pictures that fit a caption; with 7 parts that mean is judged right for
# only 60 % of scenes.
ROW_WORDS = (*[f"{w} high" for w in reversed(_HEIGHTS)], *[f"{w} low" for w in _HEIGHTS])
COLUMN_WORDS = (*[f"{w} left" for w in reversed(_SIDES)], *[f"{w} right" for w in _SIDES])
HELD_OUT_TAGS = TAGS[2:]  # the other two name no combination that could be held out


# Captions


def size_word(size: float) -> str:
    return SIZE_WORDS[_part(size, *SIZES, len(SIZE_WORDS))]


def cell(o: Object) -> tuple[int, int]:
    """Row and column of the object's centre in the table of places."""
    low, high = SIZES[0] / 2, CANVAS - SIZES[0] / 2
    return _part(o.y, low, high, len(ROW_WORDS)), _part(o.x, low, high, len(COLUMN_WORDS))


def _part(value: float, low: float, high: float, parts: int) -> int:
    return min(max(int((value - low) / (high - low) * parts), 0), parts - 1)


def detailed_caption(scene: Scene, objects: Sequence[Object] = ()) -> str:
    """Like "a small red circle very high just left, a large blue ring fairly low far right".

    The order is that of `objects`, the scene's, or else the reading order of their places. No two objects share a
    place: a cell is smaller than the least distance between objects.
    """

    def phrase(o: Object) -> str:
        row, column = cell(o)
        return f"a {size_word(o.size)} {o.color} {o.shape} {ROW_WORDS[row]} {COLUMN_WORDS[column]}"

    return ", ".join(map(phrase, objects or sorted(scene.objects, key=cell)))


def short_caption(scene: Scene, rng: random.Random, colors: bool = True) -> str:
    """Like "a red circle and two blue squares", in random order; without `colors` like "a circle and two squares"."""
    groups = list(Counter(f"{o.color} {o.shape}" if colors else o.shape for o in scene.objects).items())
    rng.shuffle(groups)
    return join([with_article(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}" for name, count in groups])


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# GenEval's prompts. Inside this module a prompt is (tag, arguments); `metadata` makes its line.


def metadata(tag: str, *arguments: Any) -> Metadata:
    """GenEval's line for one prompt.

    Arguments: single_object (shape); two_object (shape, shape); counting (shape, count); colors (shape, colour);
    position (subject, relation, reference); color_attr (shape, colour, shape, colour).
    """
    if tag == "single_object":
        (a,) = arguments
        return _line(tag, [_clause(a)], with_article(a))
    if tag == "two_object":
        a, b = arguments
        return _line(tag, [_clause(a), _clause(b)], f"{with_article(a)} and {with_article(b)}")
    if tag == "counting":
        a, count = arguments
        line = _line(tag, [_clause(a, count)], f"{NUMBERS[count]} {plural(a)}")
        prompt = line.pop("prompt")
        return {**line, "exclude": [_clause(a, count + 1)], "prompt": prompt}
    if tag == "colors":
        a, color = arguments
        return _line(tag, [_clause(a, color=color)], with_article(f"{color} {a}"))
    if tag == "position":  # the reference is clause 0, the subject clause 1
        a, relation, b = arguments
        include = [_clause(b), _clause(a, position=[relation, 0])]
        return _line(tag, include, f"{with_article(a)} {relation} {with_article(b)}")
    if tag == "color_attr":
        a, color, b, other = arguments
        what = f"{with_article(f'{color} {a}')} and {with_article(f'{other} {b}')}"
        return _line(tag, [_clause(a, color=color), _clause(b, color=other)], what)
    raise ValueError(f"{tag!r} is not a kind of prompt; the kinds are {', '.join(TAGS)}")


def _clause(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": shape, "count": count, **more}


def _line(tag: str, include: list[dict[str, Any]], what: str) -> Metadata:
    return {"tag": tag, "include": include, "prompt": PROMPT.standard.format(what=what)}


def named(line: Metadata) -> str:
    """What the prompt of a line of `metadata` asks for: "a red circle"."""
    return line["prompt"].removeprefix(PROMPT.standard.format(what=""))


@functools.cache
def prompt_space(tag: str, held_out: bool) -> tuple[tuple, ...]:
    """The arguments of all prompts of this kind that name a held-out combination, or else of all that do not."""
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    couples = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    every: dict[str, list[tuple]] = {
        "single_object": [(shape,) for shape in SHAPES],
        "two_object": couples,
        "counting": [(shape, count) for shape in SHAPES for count in range(2, MAX_OBJECTS + 1)],
        "colors": pairs,
        "position": [(a, relation, b) for a, b in couples for relation in RELATIONS],
        "color_attr": [(a, ca, b, cb) for a, ca in pairs for b, cb in pairs if a != b and ca != cb],
    }
    return tuple(arguments for arguments in every[tag] if _names_held_out(tag, arguments) == held_out)


def _names_held_out(tag: str, arguments: tuple) -> bool:
    if tag == "counting":
        return arguments[::-1] in HELD_OUT_COUNTS
    if tag == "position":
        a, relation, b = arguments
        return (relation, a, b) in HELD_OUT_RELATIONS
    if tag in ("colors", "color_attr"):
        return arguments[:2] in HELD_OUT_PAIRS or arguments[2:] in HELD_OUT_PAIRS
    return False


def geneval_prompts(per_task: int, seed: int = 0, held_out: bool = False) -> list[Metadata]:
    """`per_task` lines of each of GenEval's kinds, in GenEval's order of kinds.

    A prompt repeats only when all of its kind are used up. With `held_out` every prompt names something held out of
    training, and the kinds are `HELD_OUT_TAGS`; otherwise none does.
    """
    lines = []
    for tag in HELD_OUT_TAGS if held_out else TAGS:
        rng = random.Random(f"prompts/{seed}/{held_out}/{tag}")
        space = prompt_space(tag, held_out)
        chosen: list[tuple] = []
        while len(chosen) < per_task:
            chosen += rng.sample(space, min(len(space), per_task - len(chosen)))
        lines += [metadata(tag, *arguments) for arguments in chosen]
    return lines


def sample_for_prompt(rng: random.Random, split: str, tag: str | None = None) -> tuple[Metadata, Scene]:
    """A random prompt, of any kind unless `tag` is given, and a scene of exactly the objects that it names.

    What the prompt leaves open is random. In "train" and "val" neither holds anything held out; in "held_out" the
    prompt names something that is.
    """
    held_out = split == "held_out"
    tag = tag or rng.choice(HELD_OUT_TAGS if held_out else TAGS)
    arguments = rng.choice(prompt_space(tag, held_out))
    return metadata(tag, *arguments), scene_for(rng, tag, arguments, keep_allowed=not held_out)


def scene_for(rng: random.Random, tag: str, arguments: tuple, keep_allowed: bool = True) -> Scene:
    """A scene of exactly the objects that the prompt names, in which the prompt is true."""

    def paint(*shapes: str) -> list[tuple[str, str]]:
        return [(shape, rng.choice(ALLOWED_COLORS[shape])) for shape in shapes]

    if tag == "counting":
        shape, count = arguments
        names = paint(*[shape] * count)
    elif tag == "position":
        names = paint(arguments[0], arguments[2])
    elif tag in ("colors", "color_attr"):
        names = [arguments[i : i + 2] for i in range(0, len(arguments), 2)]
    else:
        names = paint(*arguments)

    def accept(objects: tuple[Object, ...]) -> bool:
        return tag != "position" or arguments[1] in relations(objects[0].box, objects[1].box)

    while keep_allowed and holds_held_out_count(names):  # two alike among three diamonds
        names = paint(*[shape for shape, _ in names])
    return arrange(rng, names, keep_allowed, accept)

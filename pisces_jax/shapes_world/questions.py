"""Questions about scenes of the shapes world, with short answers.

Yes and no come equally often within a kind, and a "no" is hard: something similar is there.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from pisces_jax.evaluation.relations import CONVERSE, RELATIONS, relations
from pisces_jax.shapes_world.scene import (
    ALLOWED_COLORS,
    ALLOWED_SHAPES,
    COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    SHAPES,
    Name,
    Object,
    Scene,
    arrange,
    holds_held_out_count,
    sample_scene,
)
from pisces_jax.shapes_world.text import NUMBERS, plural, with_article
from pisces_jax.shapes_world.wordings import (
    COLOUR,
    COMPARISON,
    COUNT,
    EXISTENCE,
    WHAT_IS_RELATED,
    WHETHER_RELATED,
    Wordings,
)

QUESTION_KINDS = ("colour", "count", "relation", "existence", "comparison")
KINDS_OF_ONE_OBJECT = ("colour", "count", "existence")
HELD_OUT_QUESTION_KINDS = ("colour", "count", "relation", "existence")  # a comparison cannot name what is held out
LARGER_BY = 1.25  # least ratio of two sizes that are compared


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, in no wording yet, and the right answer."""

    wordings: Wordings
    names: Mapping[str, str]
    answer: str

    @property
    def standard(self) -> str:
        """The question in its standard wording; equal for two that ask the same."""
        return self.wordings.standard.format(**self.names)

    def sample(self, rng: random.Random, others: float) -> str:
        """The question in a wording that training uses, as `Wordings.sample`."""
        return self.wordings.sample(rng, others).format(**self.names)

    def unseen(self, number: int) -> str:
        """The question in one of the wordings that training never uses, these in turn."""
        return self.wordings.unseen_one(number).format(**self.names)


def possible_kinds(split: str, most_objects: int, among: Sequence[str] = QUESTION_KINDS) -> tuple[str, ...]:
    """The kinds that can be asked in a split of scenes of up to `most_objects` objects."""
    possible: tuple[str, ...] = QUESTION_KINDS if most_objects > 1 else KINDS_OF_ONE_OBJECT
    if split == "held_out":
        possible = HELD_OUT_QUESTION_KINDS
    return tuple(kind for kind in among if kind in possible)


def sample_question(
    rng: random.Random, split: str, kind: str | None = None, most_objects: int = MAX_OBJECTS
) -> tuple[Scene, str, Question]:
    """(scene, kind, question): a random kind unless given, then a scene that permits it.

    Scenes of "train" and "val" have up to `most_objects` objects, and nothing held out is shown or named. In "held_out"
    the question or its answer names what is held out.
    """
    kind = kind or rng.choice(possible_kinds(split, most_objects))
    if split == "held_out":
        return _HELD_OUT_ASKERS[kind](rng)
    while True:
        scene = sample_scene(rng, split, most_objects)
        if question := ask(kind, scene, rng):
            return scene, kind, question


def sample_conversation(
    rng: random.Random,
    split: str,
    most_objects: int = MAX_OBJECTS,
    most: int = 6,
    among: Sequence[str] = QUESTION_KINDS,
) -> tuple[Scene, list[Question]]:
    """A scene of up to `most_objects` objects, and up to `most` different questions about it.

    The questions are of the kinds `among` that the scene permits, in equal shares.
    """
    kind = rng.choice(possible_kinds(split, most_objects, among))
    scene, _, first = sample_question(rng, split, kind, most_objects)
    asked = {first.standard: first}
    kinds: list[str] = []
    for _ in range(2 * most):  # not until there are `most`: a scene of one object has few questions
        kinds = kinds or rng.sample(among, len(among))
        if len(asked) < most and (question := ask(kinds.pop(), scene, rng)):
            asked.setdefault(question.standard, question)
    return scene, list(asked.values())


def questions(
    per_kind: int, seed: int = 0, held_out: bool = False, other_words: bool = False
) -> list[tuple[Scene, str, str, str]]:
    """`per_kind` times (scene, kind, question, answer) for each kind, never those of a `ShapesSource`.

    With `held_out` each question or answer names something held out, and the kinds are `HELD_OUT_QUESTION_KINDS`.
    With `other_words` the same questions about the same scenes are in wordings that training never uses.
    """
    split = "held_out" if held_out else "val"
    asked = []
    for kind in HELD_OUT_QUESTION_KINDS if held_out else QUESTION_KINDS:
        for i in range(per_kind):
            scene, _, question = sample_question(random.Random(f"questions/{seed}/{split}/{kind}/{i}"), split, kind)
            asked.append((scene, kind, question.unseen(i) if other_words else question.standard, question.answer))
    return asked


def ask(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of this kind that names nothing held out, or None if the scene permits none."""
    return _ASKERS[kind](scene, rng)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _names(scene: Scene) -> dict[int, str]:
    """The shortest name of each object that has a unique one, by index: "circle", else "red circle"."""
    shapes = Counter(o.shape for o in scene.objects)
    full = Counter((o.color, o.shape) for o in scene.objects)
    return {
        i: o.shape if shapes[o.shape] == 1 else f"{o.color} {o.shape}"
        for i, o in enumerate(scene.objects)
        if shapes[o.shape] == 1 or full[o.color, o.shape] == 1
    }


# Colour


def _ask_colour(scene: Scene, rng: random.Random) -> Question | None:
    shapes = Counter(o.shape for o in scene.objects)
    lone = [o for o in scene.objects if shapes[o.shape] == 1]
    return _colour_question(rng.choice(lone)) if lone else None


def _colour_question(o: Object) -> Question:
    return Question(COLOUR, {"shape": o.shape}, o.color)


# Count


def _ask_count(scene: Scene, rng: random.Random) -> Question | None:
    """About a shape or a colour; one time in eight, about one that is not there."""
    by_shape = rng.random() < 0.5
    counts = Counter(o.shape if by_shape else o.color for o in scene.objects)
    if rng.random() < 1 / 8:
        what = rng.choice([w for w in (SHAPES if by_shape else COLORS) if w not in counts])
    else:  # larger counts are likelier; otherwise nearly every answer would be "one"
        what = rng.choices(list(counts), [n * n for n in counts.values()])[0]
    return _count_question(plural(what) if by_shape else f"{what} objects", counts[what])


def _count_question(things: str, count: int) -> Question:
    return Question(COUNT, {"things": things}, NUMBERS[count])


# Relation


def _ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """Half of them are answered by yes or no, half by an object."""
    return (_ask_whether_related if rng.random() < 0.5 else _ask_what_is_related)(scene, rng)


def _ask_whether_related(scene: Scene, rng: random.Random) -> Question | None:
    truth = rng.random() < 0.5
    asked = []
    for i, j, held in _related(scene):
        a, b = scene.objects[i].shape, scene.objects[j].shape
        asked += [
            (i, relation, j)
            for relation in (held if truth else RELATIONS)
            if (relation in held) == truth and (relation, a, b) not in HELD_OUT_RELATIONS
        ]
    return _whether_question(_names(scene), rng.choice(asked), truth) if asked else None


def _whether_question(names: dict[int, str], asked: tuple[int, str, int], truth: bool) -> Question:
    i, relation, j = asked
    told = {"first": names[i], "second": names[j], **_relation_words(relation)}
    return Question(WHETHER_RELATED, told, _yes(truth))


def _relation_words(relation: str) -> dict[str, str]:
    return {"relation": relation, "to": f"to the {relation}" if relation.endswith(" of") else relation}


def _ask_what_is_related(scene: Scene, rng: random.Random) -> Question | None:
    asked = _unique_relations(scene)
    if not asked:
        return None
    i, relation, j = rng.choice(asked)
    return _what_question(scene, i, relation, j)


def _what_question(scene: Scene, i: int, relation: str, j: int) -> Question:
    found = scene.objects[i]
    told = {"second": _names(scene)[j], **_relation_words(relation)}
    return Question(WHAT_IS_RELATED, told, f"{found.color} {found.shape}")


def _related(scene: Scene) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(i, j, relations) of objects with unique names that stand in some relation."""
    names = _names(scene)
    for i in names:
        for j in names:
            if i != j and (held := relations(scene.objects[i].box, scene.objects[j].box)):
                yield i, j, held


def _unique_relations(scene: Scene) -> list[tuple[int, str, int]]:
    """(i, relation, j) where j has a unique name and i is the only object in that relation to it."""
    found = []
    for j in _names(scene):
        standing: dict[str, list[int]] = {}
        for i, o in enumerate(scene.objects):
            for relation in relations(o.box, scene.objects[j].box) if i != j else ():
                standing.setdefault(relation, []).append(i)
        found += [(members[0], relation, j) for relation, members in standing.items() if len(members) == 1]
    return found


# Existence


def _ask_existence(scene: Scene, rng: random.Random) -> Question | None:
    there = {(o.shape, o.color) for o in scene.objects}
    truth = rng.random() < 0.5
    return _existence_question(rng.choice(sorted(there) if truth else _near_misses(there, rng)), truth)


def _near_misses(there: set[Name], rng: random.Random) -> list[Name]:
    """Pairs that are not there but whose shape and colour are; without any, pairs of which one of the two is there."""
    shapes, colors = {s for s, _ in there}, {c for _, c in there}
    both = [(s, c) for s in shapes for c in colors if c in ALLOWED_COLORS[s] and (s, c) not in there]
    if both:
        return sorted(both)
    if rng.random() < 0.5:
        some = [(s, c) for s in shapes for c in ALLOWED_COLORS[s]]
    else:
        some = [(s, c) for c in colors for s in ALLOWED_SHAPES[c]]
    return sorted(set(some) - there)


def _existence_question(name: Name, truth: bool) -> Question:
    shape, color = name
    return Question(EXISTENCE, {"thing": with_article(f"{color} {shape}")}, _yes(truth))


# Comparison


def _ask_comparison(scene: Scene, rng: random.Random) -> Question | None:
    names = _names(scene)
    pairs = [
        (i, j) for i in names for j in names if i != j and scene.objects[i].size >= LARGER_BY * scene.objects[j].size
    ]
    if not pairs:
        return None
    larger, smaller = (names[i] for i in rng.choice(pairs))
    first, second = (larger, smaller) if rng.random() < 0.5 else (smaller, larger)
    return Question(COMPARISON, {"first": first, "second": second}, larger)


_ASKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": _ask_colour,
    "count": _ask_count,
    "relation": _ask_relation,
    "existence": _ask_existence,
    "comparison": _ask_comparison,
}


# Questions that name what is held out. Names and counts of the scene's other objects are allowed ones.


def _held_out_colour(rng: random.Random) -> tuple[Scene, str, Question]:
    pair = rng.choice(sorted(HELD_OUT_PAIRS))
    scene = arrange(rng, [pair, *_others(rng, pair[0])])
    return scene, "colour", _colour_question(scene.objects[0])


def _held_out_count(rng: random.Random) -> tuple[Scene, str, Question]:
    count, shape = rng.choice(sorted(HELD_OUT_COUNTS))
    names = [(shape, rng.choice(ALLOWED_COLORS[shape])) for _ in range(count)]
    scene = arrange(rng, [*names, *_others(rng, shape, MAX_OBJECTS - count)])
    return scene, "count", _count_question(plural(shape), count)


def _held_out_relation(rng: random.Random) -> tuple[Scene, str, Question]:
    """Half of them are answered by yes or no ("no" where the converse holds), half by an object."""
    relation, a, b = rng.choice(sorted(HELD_OUT_RELATIONS))
    names = [(shape, rng.choice(ALLOWED_COLORS[shape])) for shape in (a, b)]
    whether, truth = rng.random() < 0.5, rng.random() < 0.5
    wanted = relation if truth or not whether else CONVERSE[relation]
    scene = arrange(rng, names, accept=lambda objects: wanted in relations(objects[0].box, objects[1].box))
    if whether:
        return scene, "relation", _whether_question(_names(scene), (0, relation, 1), truth)
    return scene, "relation", _what_question(scene, 0, relation, 1)


def _held_out_existence(rng: random.Random) -> tuple[Scene, str, Question]:
    """Where the answer is "no", the shape is there in another colour and the colour in another shape."""
    shape, color = pair = rng.choice(sorted(HELD_OUT_PAIRS))
    truth = rng.random() < 0.5
    if truth:
        names = [pair, *_others(rng, shape)]
    else:
        other_shape = rng.choice([s for s in SHAPES if s != shape])
        names = [(shape, rng.choice(ALLOWED_COLORS[shape])), (other_shape, color)]
    return arrange(rng, names), "existence", _existence_question(pair, truth)


def _others(rng: random.Random, shape: str, most: int = 2) -> list[Name]:
    """Names of up to `most` objects: allowed ones, none of this shape."""
    while True:
        shapes = [rng.choice([s for s in SHAPES if s != shape]) for _ in range(rng.randint(0, most))]
        names = [(s, rng.choice(ALLOWED_COLORS[s])) for s in shapes]
        if not holds_held_out_count(names):
            return names


_HELD_OUT_ASKERS: dict[str, Callable[[random.Random], tuple[Scene, str, Question]]] = {
    "colour": _held_out_colour,
    "count": _held_out_count,
    "relation": _held_out_relation,
    "existence": _held_out_existence,
}

"""The shapes world: its texts are true, its pictures right, and what is held out never gets into training."""

import collections
import itertools
import os
import random
import re
import time

import numpy as np
import pytest

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.data.tokenizers import train_sentencepiece
from pisces_jax.evaluation.geneval import TAGS, Detection, judge
from pisces_jax.evaluation.relations import relations
from pisces_jax.shapes_world.questions import (
    HELD_OUT_QUESTION_KINDS,
    QUESTION_KINDS,
    ask,
    questions,
)
from pisces_jax.shapes_world.scene import (
    CANVAS,
    COLORS,
    GAP,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    SHAPES,
    SIZES,
    coverage,
    render,
    sample_scene,
    violates,
)
from pisces_jax.shapes_world.source import TASKS, ShapesSource, corpus
from pisces_jax.shapes_world.text import (
    HELD_OUT_TAGS,
    detailed_caption,
    geneval_prompts,
    sample_for_prompt,
    short_caption,
)
from pisces_jax.shapes_world.wordings import EVERY, PROMPT, made_up_word
from pisces_jax.utils.errors import UserError

SIZE_WORDS = ["small", "medium", "large"]
ROWS = [
    "extremely high", "very high", "clearly high", "fairly high", "slightly high", "barely high",
    "barely low", "slightly low", "fairly low", "clearly low", "very low", "extremely low",
]  # fmt: skip
COLUMNS = [
    "furthest left", "far left", "well left", "rather left", "somewhat left", "just left",
    "just right", "somewhat right", "rather right", "well right", "far right", "furthest right",
]  # fmt: skip
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
EXAMPLES = 1_000_000 if os.environ.get("PISCES_LONG_TESTS") else 20_000


def scenes(n, split="train", name="test"):
    return [sample_scene(random.Random(f"{name}/{i}"), split) for i in range(n)]


def detections(scene):
    return [Detection(o.shape, o.box, 0.91 + 0.01 * i, o.color) for i, o in enumerate(scene.objects)]


def texts(example):
    return [part.text for part in example.parts if isinstance(part, Text)]


# Scenes


def test_boxes_stay_apart_and_inside():
    for scene in scenes(2000) + scenes(500, "held_out"):
        for o in scene.objects:
            assert SIZES[0] <= o.size <= SIZES[1]
            assert min(o.box) >= -1e-9 and max(o.box) <= CANVAS + 1e-9
        for a, b in itertools.combinations([o.box for o in scene.objects], 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= GAP - 1e-9


def test_lone_objects_are_uniform():
    lone = [s.objects[0] for s in scenes(8000) if len(s.objects) == 1]
    for at in ("x", "y"):
        places = np.sort([(getattr(o, at) - o.size / 2) / (CANVAS - o.size) for o in lone])
        deviation = np.abs(places - np.linspace(0, 1, len(places))).max()
        assert deviation < 1.95 / len(places) ** 0.5  # Kolmogorov-Smirnov, 0.1 %


def test_all_numbers_shapes_and_allowed_colours_come():
    sampled = scenes(4000)
    assert {len(s.objects) for s in sampled} == {1, 2, 3, 4}
    pairs = {(o.shape, o.color) for s in sampled for o in s.objects}
    every = set(itertools.product(SHAPES, COLORS))
    assert pairs == every - HELD_OUT_PAIRS


def test_colours_are_never_confused():
    anchors = np.array(list(COLORS.values()), float)
    for scene in scenes(1000):
        for o in scene.objects:
            nearest = np.abs(anchors - o.rgb).sum(1).argmin()
            assert list(COLORS)[nearest] == o.color
            assert np.linalg.norm(np.array(o.rgb) - scene.background) > 75


# Pictures


@pytest.mark.parametrize("size", [32, 48, 64])
def test_picture_is_near_a_supersampled_one(size):
    """Against 16 x 16 point samples a pixel, of the shapes' definitions."""
    scale, fine = size / 32, 16
    inside = {
        "circle": lambda x, y: x * x + y * y < 1,
        "square": lambda x, y: np.maximum(abs(x), abs(y)) < 1,
        "triangle": lambda x, y: (abs(x) < (y + 1) / 2) & (y < 1),
        "diamond": lambda x, y: abs(x) + abs(y) < 1,
        "cross": lambda x, y: (np.maximum(abs(x), abs(y)) < 1) & (np.minimum(abs(x), abs(y)) < 0.36),
        "ring": lambda x, y: (x * x + y * y < 1) & (x * x + y * y > 0.25),
    }
    at = (np.arange(size * fine) + 0.5) / fine / scale
    for scene in scenes(30, name=f"render {size}"):
        expected = np.tile(np.array(scene.background), (size, size, 1))
        for o in scene.objects:
            mask = inside[o.shape]((at[None] - o.x) * 2 / o.size, (at[:, None] - o.y) * 2 / o.size)
            covered = mask.reshape(size, fine, size, fine).mean((1, 3))[..., None]
            expected += covered * (np.array(o.rgb) - scene.background)
        picture = render(scene, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        contrast = 226  # the most between an object and the ground
        assert np.abs(picture - expected).max() <= 0.14 * contrast + 1
        assert np.abs(picture - expected).mean() < 1


@pytest.mark.parametrize("shape, area", [("square", 1), ("circle", np.pi / 4), ("triangle", 0.5), ("diamond", 0.5),
                                         ("cross", 2 * 0.36 - 0.36**2), ("ring", np.pi * 3 / 16)])  # fmt: skip
def test_coverage_adds_up_to_the_area(shape, area):
    for i in range(20):
        rng = random.Random(i)
        at = np.arange(16) - 8 + rng.random()
        size = rng.uniform(6.5, 11.5)
        assert coverage(shape, at, at + 0.3, size).sum() == pytest.approx(area * size**2, rel=0.02)


# Captions


def read_details(caption):
    """(size word, colour, shape, row, column) of each object, by a grammar of its own."""
    pattern = rf"an? ({'|'.join(SIZE_WORDS)}) (\w+) (\w+) ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})"
    found = [re.fullmatch(pattern, piece) for piece in caption.split(", ")]
    assert all(found), caption
    return [match.groups() for match in found]


def test_detailed_caption_is_true_and_in_reading_order():
    for scene in scenes(2000):
        told = read_details(detailed_caption(scene))
        places = [(ROWS.index(row), COLUMNS.index(column)) for *_, row, column in told]
        assert places == sorted(set(places)) and len(told) == len(scene.objects)
        step = (CANVAS - SIZES[0]) / 12
        for size, color, shape, row, column in told:
            (o,) = [
                o
                for o in scene.objects
                if abs(o.y - SIZES[0] / 2 - (ROWS.index(row) + 0.5) * step) <= step / 2 + 1e-6
                and abs(o.x - SIZES[0] / 2 - (COLUMNS.index(column) + 0.5) * step) <= step / 2 + 1e-6
            ]
            assert (o.shape, o.color) == (shape, color)
            assert SIZE_WORDS.index(size) == min(int((o.size - SIZES[0]) / ((SIZES[1] - SIZES[0]) / 3)), 2)


@pytest.mark.parametrize("prompts", [0, 1])
def test_what_is_drawn_is_described_in_the_order_of_its_prompt(prompts):
    """So that a description is written from left to right beside the prompt; nothing draws from one order alone."""
    source = ShapesSource("draw_described", num_examples=400, prompts=prompts)
    reading_order = 0
    for example in map(source.__getitem__, range(400)):
        (scene,) = [part.image.args[0] for part in example.parts if isinstance(part, Picture)]
        prompt, description = texts(example)
        named = [(color, shape) for _, color, shape, *_ in read_details(description)]
        assert collections.Counter(named) == collections.Counter((o.color, o.shape) for o in scene.objects)
        assert ", ".join(sorted(description.split(", "))) == ", ".join(sorted(detailed_caption(scene).split(", ")))
        reading_order += description == detailed_caption(scene) and len(named) > 1
        # Where each object's words stand in the prompt: a shape with its colour where that is told, or alone.
        told = [f"{color} {shape}" if f"{color} {shape}" in prompt else shape for color, shape in named]
        places = [prompt.index(name) for name in told]
        assert places == sorted(places), (prompt, description)
    assert 20 < reading_order < 250
    drawn = ShapesSource("draw_details", num_examples=200)
    orders = set()
    for example in map(drawn.__getitem__, range(200)):
        (scene,) = [part.image.args[0] for part in example.parts if isinstance(part, Picture)]
        if len(scene.objects) > 1:
            orders.add(texts(example)[0] == f"draw: {detailed_caption(scene)}")
    assert orders == {True, False}


def read_groups(text):
    """Count of each (colour, shape) in a short caption."""
    counts = collections.Counter()
    for piece in re.split(r", | and ", text):
        number, color, noun = piece.split()
        count = 1 if number in ("a", "an") else NUMBERS[number]
        assert number != ("a" if color == "orange" else "an")
        shape = noun if count == 1 else {"crosses": "cross"}.get(noun, noun[:-1])
        counts[color, shape] += count
    return counts


def test_short_caption_is_true():
    orders = set()
    for i, scene in enumerate(scenes(2000)):
        caption = short_caption(scene, random.Random(i))
        assert read_groups(caption) == collections.Counter((o.color, o.shape) for o in scene.objects)
        orders.add(caption.split()[1] < caption.split()[-2])
        bare = short_caption(scene, random.Random(i), colors=False).replace(" and ", ", ").split(", ")
        said = collections.Counter(o.shape for o in scene.objects).items()
        number, plural = ("", "a", "two", "three", "four"), {"cross": "crosses"}
        assert sorted(bare) == sorted(f"{number[n]} {s if n == 1 else plural.get(s, s + 's')}" for s, n in said)
    assert orders == {True, False}


# Prompts


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("tag", TAGS)
def test_scene_for_a_prompt_holds_just_what_it_names(tag, split):
    if split == "held_out" and tag not in HELD_OUT_TAGS:
        return
    for i in range(300):
        line, scene = sample_for_prompt(random.Random(i), split, tag)
        assert judge(detections(scene), line).correct, (line, scene)
        assert len(scene.objects) == sum(clause["count"] for clause in line["include"])
        assert violates(scene) == (split == "held_out")


def test_evaluation_prompts_do_not_repeat_where_they_need_not():
    lines = geneval_prompts(15)
    counts = collections.Counter(line["tag"] for line in lines)
    assert counts == dict.fromkeys(TAGS, 15)
    for tag, least in {"single_object": 6, "two_object": 15, "counting": 15, "colors": 15}.items():
        assert len({line["prompt"] for line in lines if line["tag"] == tag}) == least
    assert lines == geneval_prompts(15) != geneval_prompts(15, seed=1)
    held_out = {line["prompt"] for line in geneval_prompts(60, held_out=True)}
    allowed = {line["prompt"] for line in geneval_prompts(3000)}
    assert not held_out & allowed


def test_wording_is_genevals():
    lines = {line["prompt"]: line for line in geneval_prompts(3000)}
    assert lines["a photo of a cross"]["include"] == [{"class": "cross", "count": 1}]
    assert lines["a photo of two crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 2}],
        "exclude": [{"class": "cross", "count": 3}],
        "prompt": "a photo of two crosses",
    }
    assert lines["a photo of a ring above a square"]["include"] == [
        {"class": "square", "count": 1},
        {"class": "ring", "count": 1, "position": ["above", 0]},
    ]
    assert lines["a photo of an orange ring and a black square"]["tag"] == "color_attr"


# Questions


NOUNS = {s: s for s in SHAPES} | {s + "s": s for s in SHAPES} | {"crosses": "cross"}
RELATION = re.compile("left of|right of|above|below")


def names(text):
    """(colour or None, shape, whether in the plural) of every shape that a text names."""
    words = re.findall(r"\w+", text)
    return [
        (before if before in COLORS else None, NOUNS[word], word not in SHAPES)
        for before, word in zip(["", *words], words, strict=False)
        if word in NOUNS
    ]


def kind_of(question):
    """The kind of a question in any words, by those that it needs."""
    named = names(question)
    if RELATION.search(question):
        return "relation"
    if re.search("larger|bigger", question):
        return "comparison"
    if not named or named[0][2]:
        return "count"
    return "existence" if named[0][0] else "colour"


def answer(scene, question):
    """The answer by a reader of its own, of what the question names in its order."""

    def like(name):
        return [o for o in scene.objects if o.shape == name[1] and name[0] in (None, o.color)]

    def only(name):
        (o,) = like(name)
        return o

    kind, named = kind_of(question), names(question)
    yes = {True: "yes", False: "no"}
    number = {v: k for k, v in NUMBERS.items()}
    if kind == "colour":
        (name,) = named
        assert re.search("colou?r", question)
        return only(name).color
    if kind == "count":
        if named:
            return number[len(like(*named))]
        (color,) = re.findall(r"(\w+) objects", question)
        return number[sum(o.color == color for o in scene.objects)]
    if kind == "existence":
        (name,) = named
        assert not re.search("colou?r|many|number|count", question)
        return yes[bool(like(name))]
    if kind == "relation":
        (relation,) = RELATION.findall(question)
        assert RELATION.search(question).start() > question.index(named[0][1]) or len(named) == 1
        target = only(named[-1])
        if len(named) == 2:
            return yes[relation in relations(only(named[0]).box, target.box)]
        (o,) = [o for o in scene.objects if o is not target and relation in relations(o.box, target.box)]
        return f"{o.color} {o.shape}"
    (a, size), (b, other) = (((name, only(name).size)) for name in named)
    assert max(size, other) >= 1.25 * min(size, other)
    return " ".join(filter(None, (a if size > other else b)[:2]))


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("other_words", [False, True])
def test_questions_are_answered_truly_and_balanced(held_out, other_words):
    per_kind = 400
    asked = questions(per_kind, 3, held_out, other_words)
    kinds = HELD_OUT_QUESTION_KINDS if held_out else QUESTION_KINDS
    assert collections.Counter(kind for _, kind, *_ in asked) == dict.fromkeys(kinds, per_kind)
    for scene, kind, question, told in asked:
        assert kind_of(question) == kind and answer(scene, question) == told, (kind, question, scene)
        assert held_out or not holds_held_out(question)
        assert bool(UNSEEN.fullmatch(question)) == other_words, question
    for kind in ("existence", "relation"):
        answers = collections.Counter(told for _, k, _, told in asked if k == kind and told in ("yes", "no"))
        assert answers.total() == per_kind if kind == "existence" else answers.total() > per_kind / 3
        assert abs(answers["yes"] / answers.total() - 0.5) < 0.13  # 5 sigma of 400, 3.5 of 200


@pytest.mark.parametrize("task", ["question", "conversation"])
def test_questions_are_of_the_kinds_that_they_are_to_be(task):
    """All five kinds unless given."""

    def kinds(**settings):
        source = ShapesSource(task, num_examples=200, **settings)
        return {kind_of(part.text) for i in range(200) for part in source[i].parts[1::2]}

    assert kinds() == set(QUESTION_KINDS)
    assert kinds(question_kinds=["existence", "colour"]) == {"existence", "colour"}
    assert kinds(most_objects=1, question_kinds=("relation", "count")) == {"count"}


@pytest.mark.parametrize("other_words", [0, 1])
def test_conversations_are_true_and_of_different_questions(other_words):
    kinds, source = collections.Counter(), ShapesSource("conversation", num_examples=400, other_words=other_words)
    for i in range(400):
        picture, *turns = source[i].parts
        asked, told = ([part.text for part in turns[k::2]] for k in (0, 1))
        assert len({(kind_of(q), *names(q), *RELATION.findall(q)) for q in asked}) >= len(set(asked)) - 1
        assert len(set(asked)) == len(asked) and 1 <= len(asked) <= 6
        assert [answer(picture.image.args[0], question) for question in asked] == told
        kinds.update(map(kind_of, asked))
    assert min(kinds[kind] for kind in QUESTION_KINDS) > 0.07 * kinds.total()


def test_pictures_to_ask_about_hold_no_more_than_they_should():
    for task, most in itertools.product(("question", "conversation"), (1, 2)):
        source = ShapesSource(task, num_examples=60, most_objects=most)
        scenes = [part.image.args[0] for i in range(60) for part in source[i].parts if isinstance(part, Picture)]
        assert {len(scene.objects) for scene in scenes} == set(range(1, most + 1))


def test_a_no_is_hard():
    for scene in scenes(500):
        question = ask("existence", scene, random.Random(1))
        if question and question.answer == "no":
            ((color, shape, _),) = names(question.standard)
            assert color in {o.color for o in scene.objects} or shape in {o.shape for o in scene.objects}


# Wordings


def pattern(template):
    """Of all texts of a template."""
    return re.sub(r"\\{\w+\\}", ".+", re.escape(template))


UNSEEN = re.compile("|".join(pattern(template) for wordings in EVERY for template in wordings.unseen))


@pytest.mark.parametrize("wordings", EVERY, ids=lambda wordings: wordings.standard)
def test_a_wording_is_used_in_training_or_held_out_of_it(wordings):
    used = {wordings.sample(random.Random(i), 0.5) for i in range(400)}
    known = {wordings.standard, *wordings.others}
    made_up = [text for text in used if text not in known]
    assert known < used and len(known) > 4 and 10 < len(made_up) < 60
    for words in map(str.split, made_up):  # without one of its words it is one of the wordings
        assert any(" ".join(words[:i] + words[i + 1 :]) in known for i in range(len(words)))
    held_out = {wordings.unseen_one(i) for i in range(9)}
    assert held_out == set(wordings.unseen) and not any(UNSEEN.fullmatch(template) for template in used)
    assert {wordings.sample(random.Random(i), 0) for i in range(9)} == {wordings.standard}
    rest = [re.sub(r"\{\w+\}", "", template) for template in (*known, *held_out)]
    assert all(re.fullmatch("[a-z ,.:?]*", text) for text in rest)
    # Nothing but the names tells what is asked for.
    assert not {*NOUNS, *COLORS, *NUMBERS} & {*re.findall(r"\w+", " ".join(rest))} - {"one"}
    words = {made_up_word(random.Random(i)) for i in range(3000)}
    assert len(words) > 1000 and not {*NOUNS, *COLORS, "left", "right", "of", "above", "below", "larger"} & words


@pytest.mark.parametrize("task", ["question", "draw_caption", "draw_prompt", "draw_described"])
def test_other_words_say_the_same_about_the_same_picture(task):
    standard, mixed, others = (ShapesSource(task, num_examples=300, other_words=share) for share in (0, 0.5, 1))
    assert len({source.fingerprint for source in (standard, mixed, others)}) == 3
    for i in range(0, 300, 10):
        (a, picture), (b, again) = (
            (texts(source[i])[0], [p for p in source[i].parts if isinstance(p, Picture)][0])
            for source in (standard, others)
        )
        assert names(a) == names(b) and picture.image.args[0] == again.image.args[0]
        assert texts(standard[i])[1:] == texts(others[i])[1:] and a != b
    same = [texts(mixed[i])[0] == texts(standard[i])[0] for i in range(300)]
    assert 90 < sum(same) < 210
    assert {"draw_caption": "draw: a ", "draw_prompt": "draw: a photo of "}.get(task, "") in texts(standard[0])[0]


def test_unseen_wordings_are_written_without_bytes_for_unknown_letters(tmp_path):
    tokenizer = train_sentencepiece(corpus(4000), tmp_path / "t.model", 512)
    processor = tokenizer._processor
    unseen = [question for _, _, question, _ in questions(10, other_words=True)]
    unseen += [draw_instruction(wording.format(what="two red rings")) for wording in PROMPT.unseen]
    for text in [*unseen, *"abcdefghijklmnopqrstuvwxy"]:
        ids = [int(i) for i in tokenizer.encode(text)]
        assert tokenizer.decode(ids) == text
        assert not any(processor.is_byte(i) or processor.is_unknown(i) for i in ids), text


# What is held out


def holds_held_out(text):
    """Whether a text names a held-out combination, found by its words alone."""
    words = re.findall(r"\w+", text)
    for i, word in enumerate(words):
        shape = NOUNS.get(word)
        before = words[max(i - 2, 0) : i]
        if (shape, before[-1] if before else "") in HELD_OUT_PAIRS:
            return True
        if shape and any((NUMBERS.get(b), shape) in HELD_OUT_COUNTS for b in before):
            return True
    for match in RELATION.finditer(text):
        before, after = names(text[: match.start()]), names(text[match.end() :])
        if before and after and (match[0], before[-1][1], after[0][1]) in HELD_OUT_RELATIONS:
            return True
    return False


def test_the_word_search_finds_what_is_held_out():
    assert holds_held_out("draw: a photo of a purple circle")
    assert holds_held_out("two red crosses and three black circles")
    assert holds_held_out("a photo of four triangles")
    assert holds_held_out("a photo of a circle left of a square")
    assert holds_held_out("is the square right of the red circle?")
    assert holds_held_out("is the blue circle to the left of the square")
    assert holds_held_out("tell me if the cross lies below the square.") is False
    assert holds_held_out("tell me if the square lies below the cross.")
    assert not holds_held_out("a purple square, two circles and a circle")
    found = {line["prompt"]: holds_held_out(line["prompt"]) for line in geneval_prompts(40, held_out=True)}
    assert all(found.values()), [prompt for prompt, held in found.items() if not held]


def test_nothing_held_out_is_trained_on():
    """Each example's scene, by `violates`' definition written again, and each text by its words."""
    each = EXAMPLES // len(TASKS)
    for task, split in itertools.product(TASKS, ("train", "val")):
        source = ShapesSource(task, split, each)
        for i in range(each // 2):
            example = source[i]
            (scene,) = [part.image.args[0] for part in example.parts if isinstance(part, Picture)]
            assert not held_out_by_hand(scene) and not violates(scene), example
            assert not any(
                holds_held_out(text) or UNSEEN.fullmatch(text.removeprefix("draw: ")) for text in texts(example)
            ), example


def held_out_by_hand(scene):
    if any((o.shape, o.color) in HELD_OUT_PAIRS for o in scene.objects):
        return True
    for count, shape in HELD_OUT_COUNTS:
        if sum(o.shape == shape for o in scene.objects) == count:
            return True
    return any(
        (relation, a.shape, b.shape) in HELD_OUT_RELATIONS
        for a, b in itertools.combinations(scene.objects, 2)
        if a.shape != b.shape
        for relation in relations(a.box, b.box)
    )


def test_held_out_is_spread_and_closed_under_converses():
    assert len(HELD_OUT_PAIRS) == 6
    assert len({s for s, _ in HELD_OUT_PAIRS}) == len({c for _, c in HELD_OUT_PAIRS}) == 6
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {(opposite[r], b, a) for r, a, b in HELD_OUT_RELATIONS} == HELD_OUT_RELATIONS
    assert all(violates(scene) for scene in scenes(300, "held_out"))


# The source


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_the_same_anywhere(task):
    source, again = (ShapesSource(task, "train", 50, seed=2, size=16) for _ in range(2))
    assert len(source) == 50 and len({str(texts(source[i])) for i in range(50)}) > 20
    for i in (7, 3):
        example, twin = source[i], again[np.int64(i)]
        assert example.key == twin.key == f"shapes/train/2/{task}/{i}"
        assert texts(example) == texts(twin)
        (picture,), (other,) = ([p for p in e.parts if isinstance(p, Picture)] for e in (example, twin))
        assert picture.array().shape == (16, 16, 3) and (picture.array() == other.array()).all()
        assert picture.role == ("draw" if task.startswith("draw") else "read")
    for other in (ShapesSource(task, "val", 50, 2), ShapesSource(task, "train", 50, 3)):
        assert [texts(other[i]) for i in range(9)] != [texts(source[i]) for i in range(9)]
    with pytest.raises(IndexError):
        source[50]


def test_parts_of_each_task():
    def parts(task):
        example = ShapesSource(task)[0]
        return [p.role if isinstance(p, Picture) else "learn" if p.learn else "text" for p in example.parts]

    assert parts("caption") == parts("describe") == parts("question") == ["read", "text", "learn"]
    assert parts("draw_caption") == parts("draw_details") == parts("draw_prompt") == ["text", "draw"]
    assert set(zip(*[iter(parts("conversation")[1:])] * 2, strict=True)) == {("text", "learn")}
    assert parts("draw_described") == ["text", "learn", "draw"]
    assert parts("pair") == parts("pair_shapes") == ["read", "text"]
    assert texts(ShapesSource("describe")[0])[0] == "describe:"
    assert texts(ShapesSource("draw_details")[0])[0].startswith("draw: a")


def test_unknown_names_are_the_users_mistake():
    with pytest.raises(UserError, match="no task 'draw'"):
        ShapesSource("draw")
    with pytest.raises(UserError, match="no split 'test'"):
        ShapesSource("caption", "test")
    with pytest.raises(UserError, match="1 to 4 objects, not of 5"):
        ShapesSource("describe", most_objects=5)
    with pytest.raises(UserError, match="0 to 1, not 2"):
        ShapesSource("draw_described", prompts=2)
    with pytest.raises(UserError, match="0 to 1, not -1"):
        ShapesSource("question", other_words=-1)
    with pytest.raises(UserError, match="question_kinds: 'color' is none of colour, count"):
        ShapesSource("conversation", question_kinds=("color",))
    with pytest.raises(UserError, match="'train' with up to 1 objects needs at least one of colour, count, existence"):
        ShapesSource("conversation", most_objects=1, question_kinds=("relation",))
    with pytest.raises(UserError, match="'held_out' with up to 4 objects needs at least one of colour"):
        ShapesSource("conversation", "held_out", question_kinds=("comparison",))


def test_corpus_has_every_word():
    def vocabulary(lines):
        return {word for line in lines for word in re.findall(r"\w+|[^\w\s]", line)}

    lines = list(corpus(4000))
    assert len(lines) == 4000
    used = vocabulary(line["prompt"] for held_out in (0, 1) for line in geneval_prompts(50, 1, held_out))
    used |= vocabulary(re.sub(r"\{\w+\}", "", template) for wordings in EVERY for template in wordings.others)
    for held_out in (False, True):
        used |= vocabulary(t for _, _, *qa in questions(200, 1, held_out) for t in qa)
    for task in TASKS:
        used |= vocabulary(t for i in range(200) for t in texts(ShapesSource(task, "held_out", other_words=0)[i]))
    assert used <= vocabulary(lines)


def test_examples_are_made_fast_enough():
    """Loosely, since test machines are slow and shared: docs give real times."""
    source = ShapesSource("draw_details")
    start = time.process_time()
    examples = [source[i] for i in range(300)]
    assert (time.process_time() - start) / 300 < 1e-3
    start = time.process_time()
    for example in examples:
        example.parts[1].array()
    assert (time.process_time() - start) / 300 < 2e-3

"""Scores: perfect fake models get 1, wrong ones 0, and what lies between is counted by hand."""

import base64
import dataclasses
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from pisces_jax.data.example import Example, Picture, Text
from pisces_jax.data.images import png
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation import answers, charts, geneval, grids, pictures, report, suite
from pisces_jax.evaluation.geneval import TAGS, Detection
from pisces_jax.evaluation.task import Amount, Outcome, Task
from pisces_jax.shapes_world import drawing, reading, reconstruction, spread
from pisces_jax.shapes_world.questions import HELD_OUT_QUESTION_KINDS, QUESTION_KINDS, questions
from pisces_jax.shapes_world.scene import Object, Scene, render
from pisces_jax.shapes_world.scores import TASKS
from pisces_jax.shapes_world.text import (
    HELD_OUT_TAGS,
    detailed_caption,
    geneval_prompts,
    metadata,
    prompt_space,
    scene_for,
)
from pisces_jax.shapes_world.wordings import PROMPT
from pisces_jax.utils.errors import UserError

SIZE = 32


@dataclasses.dataclass
class Drawing:
    image: np.ndarray
    description: str = "as it should be"


def in_other_words(line):
    return [wording.format(what=line["prompt"].removeprefix("a photo of ")) for wording in PROMPT.unseen]


class Oracle:
    """Draws what is asked for, answers rightly, and loses nothing between vectors and pictures.

    `wrong(i)` says whether picture or answer i comes out wrong.
    """

    read_size = drawn_size = SIZE

    def __init__(self, wrong=lambda i: False):
        self.wrong = wrong
        self.blank = np.full((SIZE, SIZE, 3), 128, np.uint8)
        self.calls = []

    def draw(self, prompts, *, describe, seed=0, **how):
        self.calls.append({"number": len(prompts), "describe": describe, **how})
        return [
            Drawing(self.blank if self.wrong(i) else self._picture(prompt[0].text, seed))
            for i, prompt in enumerate(prompts)
        ]

    def _picture(self, instruction, seed):
        for line in geneval_prompts(40, seed) + geneval_prompts(40, seed, held_out=True):
            if instruction in map(draw_instruction, (line["prompt"], *in_other_words(line))):
                return drawing.true_picture(line, SIZE)
        for scene in reconstruction.scenes(40, seed):
            if draw_instruction(detailed_caption(scene)) == instruction:
                return render(scene, SIZE)
        raise AssertionError(instruction)

    def answer(self, asked, *, max_tokens=32):
        known = {}
        for held_out, other_words in ((False, False), (False, True), (True, False)):
            for scene, _, question, answer in questions(40, 0, held_out, other_words):
                known[question, render(scene, SIZE).tobytes()] = answer
        answers = [known[parts[1].text, parts[0].array().tobytes()] for parts in asked]
        return ["nothing" if self.wrong(i) else f" {a.upper()}. " for i, a in enumerate(answers)]

    def features(self, images):
        return images.reshape(len(images), 1, -1)

    def decode(self, vectors, *, seed=0):
        images = vectors.reshape(-1, SIZE, SIZE, 3)
        return np.stack([self.blank if self.wrong(i) else image for i, image in enumerate(images)])


AMOUNT = Amount(per_task=3, images=2, per_kind=3, held_out=2, spread=0, pictures=6)
HOW = dict(describe=True, max_tokens=8, temperature=1.0, guidance=None)


def test_a_perfect_model_scores_one_in_everything():
    results = suite.evaluate(Oracle(), TASKS, dataclasses.replace(AMOUNT, both=True), HOW)
    geneval, read = results.scores["geneval"], results.scores["reading"]
    assert {tag: geneval[tag] for tag in TAGS} == dict.fromkeys(TAGS, 1.0)
    assert geneval["overall"] == geneval["held_out"] == geneval["direct"]["overall"] == 1
    assert geneval["pictures"] == 6 * 3 * 2 and geneval["held_out_pictures"] == 4 * 2 * 2
    assert {kind: read[kind] for kind in QUESTION_KINDS} == dict.fromkeys(QUESTION_KINDS, 1.0)
    assert read["overall"] == read["held_out"] == 1 and set(read["held_out_by_kind"]) == set(HELD_OUT_QUESTION_KINDS)
    assert geneval["other_words"] == read["other_words"] == 1
    assert geneval["other_words_pictures"] == 6 * 3 * 2 and read["other_words_questions"] == 5 * 3
    rebuilt = results.scores["reconstruction"]
    assert rebuilt["true_vectors"] == rebuilt["predicted_vectors"] == 1 and rebuilt["true_vectors_pixel_error"] == 0


def test_a_model_that_is_always_wrong_scores_nothing():
    scores = suite.evaluate(Oracle(lambda i: True), TASKS, AMOUNT, HOW).scores
    names = ("overall", "held_out", "other_words")
    assert [scores[task][name] for task in ("geneval", "reading") for name in names] == [0] * 6
    assert scores["reconstruction"]["true_vectors"] == scores["reconstruction"]["predicted_vectors"] == 0


def test_scores_are_means_over_kinds_of_shares_within_them():
    # Wrong: the first 3 of the 6 pictures of the first task, nothing else.
    judged = drawing.draw(Oracle(lambda i: i < 3), per_task=3, images=2, describe=False)
    scores = geneval.score(judged)
    assert scores["single_object"] == 0.5 and scores["overall"] == pytest.approx((0.5 + 5) / 6)
    assert [j.correct for j in judged[:6]] == [False] * 3 + [True] * 3 and "found 0" in judged[0].reason
    # Wrong: both questions of the first kind.
    asked = reading.ask(Oracle(lambda i: i < 2), per_kind=2, size=SIZE)
    assert answers.score(asked)["overall"] == pytest.approx(0.8) and answers.score(asked)["colour"] == 0


def test_held_out_scores_stand_beside_those_of_the_same_tasks():
    judged = drawing.draw(Oracle(lambda i: i < 2), per_task=1, images=2, describe=False)
    held_out = drawing.draw(Oracle(lambda i: i == 0), per_task=1, images=2, describe=False, held_out=True)
    scores = geneval.score(judged, held_out)
    assert set(scores["held_out_by_task"]) == set(HELD_OUT_TAGS)
    assert scores["held_out"] == pytest.approx(3.5 / 4) and scores["same_tasks"] == 1 > scores["overall"]


def test_other_words_are_asked_about_the_same_and_scored_apart():
    class Literal(Oracle):
        """Understands the standard wordings and no others."""

        def draw(self, prompts, **how):
            known = [prompt[0].text.startswith("draw: a photo of ") for prompt in prompts]
            drawn = super().draw(prompts, **how)
            return [d if k else Drawing(self.blank) for d, k in zip(drawn, known, strict=True)]

        def answer(self, asked, **how):
            standard = {question for _, _, question, _ in questions(3)}
            answers = super().answer(asked, **how)
            return [a if q[1].text in standard else "" for q, a in zip(asked, answers, strict=True)]

    amount = dataclasses.replace(AMOUNT, held_out=0, other_words=2)
    tasks = {name: TASKS[name] for name in ("geneval", "reading")}
    results = suite.evaluate(Literal(), tasks, amount, HOW)
    for name, number in ("geneval", "pictures"), ("reading", "questions"):
        scores = results.scores[name]
        assert scores["overall"] == 1 and scores["other_words"] == 0
        assert scores[f"other_words_{number}"] == scores[number] * 2 // 3
    drawn = results.outcomes["geneval"].drawn
    prompts = [[j.metadata["prompt"] for j in drawn[way] if j.metadata["tag"] == "position"] for way in drawn]
    assert [p in in_other_words({"prompt": q}) for q, p in zip(*prompts, strict=False)] == [True] * 4
    for asked, other in zip(questions(3), questions(3, other_words=True), strict=True):
        assert asked[:2] == other[:2] and asked[3] == other[3] and asked[2] != other[2]
    without = suite.evaluate(Literal(), tasks, dataclasses.replace(amount, other_words=0), HOW).scores
    assert not any("other_words" in name for name in (*without["geneval"], *without["reading"]))


def test_how_to_draw_reaches_the_model():
    model = Oracle()
    amount = dataclasses.replace(AMOUNT, held_out=0, other_words=0, both=True)
    suite.evaluate(model, {"geneval": TASKS["geneval"]}, amount, HOW)
    assert [call["describe"] for call in model.calls] == [True, False] and model.calls[0]["max_tokens"] == 8


def test_a_task_of_ones_own_runs_beside_the_others():
    def run(model, amount, how):
        return Outcome({"seed": amount.seed}) if amount.pictures else None

    known = {**TASKS, "own": Task(lambda kinds: "parquet" in kinds, run)}

    def config(*kinds):
        return SimpleNamespace(data=SimpleNamespace(evaluate={k: SimpleNamespace(kind=k) for k in kinds}, train={}))

    assert list(suite.tasks_for("all", known, config("shapes"))) == list(TASKS)
    assert list(suite.tasks_for("all", known, config("parquet"))) == ["own"]
    assert list(suite.tasks_for("own", known, config("parquet", "shapes"))) == ["own"]
    with pytest.raises(UserError, match="--task=own does not fit this run, which saw shapes: try geneval"):
        suite.tasks_for("own", known, config("shapes"))
    with pytest.raises(UserError, match="--task=mine is none of geneval, spread, reading, reconstruction, own, all"):
        suite.check_name("mine", known)
    own = {"own": known["own"]}
    assert suite.evaluate(Oracle(), own, Amount(seed=4), HOW).scores["own"] == {"seed": 4}
    assert suite.evaluate(Oracle(), own, Amount(pictures=0), HOW).scores == {"seconds": {}}


def test_spread_of_a_model_that_draws_one_picture_and_of_one_that_draws_as_the_world_does():
    class Same(Oracle):
        def draw(self, prompts, **how):
            return [Drawing(self._picture(prompt[0].text, 0), "a red circle") for prompt in prompts]

        def _picture(self, instruction, seed):
            return render(one, SIZE)

    class World(Same):
        def draw(self, prompts, **how):
            made = [self._scene(prompt[0].text, random.Random(f"any/{i}")) for i, prompt in enumerate(prompts)]
            return [Drawing(render(scene, SIZE), detailed_caption(scene)) for scene in made]

        def _scene(self, instruction, rng):
            for tag in spread.OPEN_TAGS:
                for arguments in prompt_space(tag, held_out=False):
                    if draw_instruction(metadata(tag, *arguments)["prompt"]) == instruction:
                        return scene_for(rng, tag, arguments)
            raise AssertionError(instruction)

    one = Scene((Object("circle", "red", 12.0, 20.0, 9.0, (214, 28, 34)),), (128.0, 128.0, 128.0))
    same = spread.spread(Same(), prompts=4, images=3, size=SIZE, **HOW)
    none = dict(descriptions=0.0, places=0.0, colours=0.0, pixels=0.0)
    assert same["model"] == pytest.approx(none, abs=1e-9)
    varied = spread.spread(World(), prompts=12, images=16, size=SIZE, **HOW)
    for name, of_world in varied["world"].items():
        assert varied["model"][name] == pytest.approx(of_world, rel=0.12), name
    # One object's place is uniform over a length of 18 to 22 (its size is 10 to 14), whose deviation is that over √12;
    # several keep apart and lie further out.
    assert 20 / 12**0.5 < varied["world"]["places"] < 30 / 12**0.5
    blank = spread.spread(Oracle(lambda i: True), prompts=4, images=3, size=SIZE, **HOW)["model"]
    assert blank["places"] is None and blank["colours"] is None and blank["pixels"] == 0


def test_a_reconstruction_must_hold_just_the_same_objects():
    scene = reconstruction.scenes(1)[0]
    found = [Detection(o.shape, o.box, 0.99, o.color) for o in scene.objects]
    detector = SimpleNamespace(detect=lambda image: found)
    image = render(scene, SIZE)
    assert reconstruction.holds(image, scene, detector)
    assert not reconstruction.holds(image, Scene(scene.objects * 2, scene.background), detector)
    found.append(dataclasses.replace(found[0], color="pink" if found[0].color != "pink" else "red"))
    assert not reconstruction.holds(image, scene, detector)
    found[-1] = dataclasses.replace(found[-1], score=0.2)  # not sure enough to count
    assert reconstruction.holds(image, scene, detector)


@pytest.mark.parametrize("held_out", [False, True])
def test_true_pictures_satisfy_their_prompts(held_out):
    lines = geneval_prompts(12, seed=3, held_out=held_out)
    oracle = {line["prompt"]: drawing.true_picture(line, SIZE) for line in lines}
    model = SimpleNamespace(
        draw=lambda prompts, **_: [Drawing(oracle[p[0].text.removeprefix(draw_instruction(""))]) for p in prompts]
    )
    judged = drawing.draw(model, per_task=12, images=1, describe=False, seed=3, held_out=held_out)
    assert all(j.correct for j in judged)


class Captioner(Oracle):
    def answer(self, asked, *, max_tokens=32):
        self.asked = asked
        return ["a photo of a cat"] * len(asked)

    def _picture(self, instruction, seed):
        return self.blank


def test_captions_of_real_pictures_by_hand():
    def example(label, i):
        image = np.full((8, 8, 3), 10 * i, np.uint8)
        return Example((Picture(image, "read"), Text("caption:"), Text(f"a photo of a {label}", learn=True)), str(i))

    labels = ["cat"] * 6 + ["dog"] * 4
    scores, shown = pictures.captions(Captioner(), [example(label, i) for i, label in enumerate(labels)])
    assert scores["accuracy"] == scores["commonest_text"] == pytest.approx(0.6)
    assert scores["class_accuracy"] == pytest.approx(0.5)
    assert scores["word_overlap"] == pytest.approx(0.6 + 0.4 * 4 / 5)  # "a photo of a" of five words
    assert len(shown) == 10


def test_real_pictures_are_read_and_drawn_from_the_sources_that_have_them():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, SIZE, SIZE, 3), np.uint8)
    read = [Example((Picture(i, "read"), Text("caption:"), Text("a photo of a cat", learn=True)), "r") for i in images]
    draw = [Example((Text("draw: a cat"), Picture(i, "draw")), "d") for i in images]
    model = Captioner()
    outcome = pictures.evaluate_pictures(model, [read, draw], pictures=10, size=SIZE)
    scores, shown = outcome.scores, outcome.shown
    assert all(len(parts) == 2 for parts in model.asked)  # the answer is not shown
    assert scores["reading"]["accuracy"] == 1 and scores["reading"]["pictures"] == 10
    rebuilt = scores["reconstruction"]
    assert rebuilt["true_vectors_pixel_error"] == 0
    # Uniform bytes have variance (256² − 1)/12; the mean of ten pictures leaves 9/10 of it.
    assert rebuilt["mean_picture_pixel_error"] == pytest.approx(0.9 * (256**2 - 1) / 12 / 255**2, rel=0.02)
    assert shown["true"].shape == shown["drawn"].shape == (10, SIZE, SIZE, 3) and shown["prompts"] == ["a cat"] * 10


def test_what_is_drawn_is_read_and_compared_with_the_training_pictures():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
    read = [Example((Picture(i, "read"), Text("caption:"), Text("a photo of a cat", learn=True)), "r") for i in images]
    prompts = ["draw: a photo of a cat"] * 9 + ["draw: a photo of a dog"] * 3
    draw = [Example((Text(p), Picture(i, "draw")), "d") for p, i in zip(prompts, images, strict=True)]
    training = [Example((Text("draw: x"), Picture(i, "draw")), "t") for i in rng.permutation(images)]
    model = Captioner()  # draws grey, reads cats everywhere
    outcome = pictures.evaluate_pictures(model, [read, draw], pictures=12, size=SIZE, training=[training])
    scores = outcome.scores
    assert scores["drawing"]["read_as_asked"] == dict(true=0.75, true_vectors=0.75, drawn=0.75)
    near = scores["drawing"]["nearest"]
    assert near["distance_true"] < 1e-6 and near["ratio_true"] < 1e-6 and near["training_pictures"] == 12
    assert near["ratio_drawn"] > 0.95  # all are as far from grey
    sheet = np.asarray(pictures.sheet(outcome)).reshape(-1, 3)
    assert (sheet == grids.GREEN).all(1).any() and (sheet == grids.RED).all(1).any()


def test_nearest_is_what_a_double_loop_finds():
    rng = np.random.default_rng(2)
    images, known = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (5, 40))
    index, distance, ratio = pictures.nearest(images, known, neighbours=7)
    for i, image in enumerate(images):
        away = [np.sqrt(np.mean(((image.astype(float) - k) / 255) ** 2)) for k in known]
        assert index[i] == np.argmin(away) and distance[i] == pytest.approx(min(away))
        assert ratio[i] == pytest.approx(min(away) / np.mean(sorted(away)[:7]))


# What is made of them


LINES = [{"step": s, "train/text": 3.0 / s, "val/text": 4.0 / s, "val/text/question": 2.0 / s} for s in (1, 5, 10)]


def test_report_and_sheet_show_prompts_reasons_and_curves(tmp_path):
    results = suite.evaluate(Oracle(lambda i: i % 2 == 1), TASKS, dataclasses.replace(AMOUNT, both=True), HOW)
    drawn = results.outcomes["geneval"].drawn
    drawn["described"][0] = dataclasses.replace(drawn["described"][0], description="a \0 red circle")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/0000010.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    page = report.write_html("A title", results.scores, results, {"stage": tmp_path}, {"stage": LINES})
    assert "<h1>A title</h1>" in page and "a \N{REPLACEMENT CHARACTER} red circle" in page
    assert page.count("data:image/svg+xml") == 1 and "step 10:" in page
    # One file, without scripts.
    assert set(re.findall(r'src="(.{15})', page)) == {"data:image/svg+", "data:image/png;"}
    assert "http" not in page and "<script" not in page and "href" not in page
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Scores", "Training", "Drawing: described, then drawn", "Drawing: drawn directly",
        "Drawing: held-out combinations", "Drawing: in other words", "Reading", "Reading: in other words",
        "Reconstruction",
    ]  # fmt: skip
    wrong = sum("found 0" in j.reason for j in drawn["described"] if j.metadata["tag"] == "single_object")
    table = page.split("<h3>single_object")[1].split("</table>")[0]
    assert sum(map(int, re.findall(r'number">(\d+)<', table))) == wrong == 3
    # Beside each drawn picture stands a true one, which the detector's rules accept.
    assert all((j.truth == drawing.true_picture(j.metadata, SIZE)).all() for j in drawn["described"])
    card = page.split("<h3>single_object")[1].split('<div class="card ')[1]
    assert card.count("<img") == 2 and report._embedded_png(drawn["described"][0].truth) in card
    sheet = report.samples_sheet(drawn)
    assert sheet.width > 1000 and sheet.height > 500
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert (pixels == grids.GREEN).all(1).any() and (pixels == grids.RED).all(1).any()
    assert f"{results.scores['geneval']['described']['overall']:.3f}" in report.summary(results.scores)


def test_the_report_escapes_whatever_it_is_given(tmp_path):
    bad = '<script>alert("&")</script>'
    image = np.zeros((4, 4, 3), np.uint8)
    line = {"tag": "colors", "include": [], "prompt": bad}
    outcome = Outcome(
        {},
        drawn={"described": [geneval.Judged(line, bad, image, False, bad)]},
        asked=[answers.Answered(image, bad, bad, bad, f"no {bad}")],
        rows={bad: image[None]},
    )
    results = suite.Results({bad: {bad: 0.5, "n": {bad: 1}}}, {bad: outcome})
    metrics = {bad: [{"step": 1, "val/$<script>": 1.0, "val/$<script>/_$x": 1.0}]}
    page = report.write_html(bad, results.scores, results, {bad: tmp_path}, metrics)
    assert "<script" not in page.lower() and "alert(&#34;&amp;&#34;)" in page
    # Title twice, scores four times and in JSON, stage, prompt, description and reason twice; kind, question, answers.
    assert page.count("&lt;script&gt;") > 15
    drawings = [base64.b64decode(chart).decode() for chart in re.findall(r"svg\+xml;base64,([^\"]+)", page)]
    assert len(drawings) == 1 and "$&lt;script&gt;" in drawings[0] and "<script" not in drawings[0]
    assert "_$x" in drawings[0]


def test_confusion_counts_right_answers_down_and_given_ones_across():
    told = [("red", "red"), ("red", "Red."), ("red", "blue"), ("blue", "red"), ("blue", "a dog")]
    asked = [answers.Answered(np.zeros((2, 2, 3), np.uint8), "colour", "?", *pair) for pair in told]
    assert report.confusion(asked)[0] == ["blue", "red", "other"]
    results = suite.Results({}, {"reading": Outcome({}, asked=asked)})
    table = report.write_html("", {}, results, {}, {}).split("<h3>colour: 2 of 5</h3>")[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["right ↓ given →", "blue", "red", "other"],
        ["blue", "", "1", "1"],
        ["red", "1", "2", ""],
        ["other", "", "", ""],
    ]


def test_charts_show_a_curve_for_training_held_out_data_and_its_tasks():
    lines = [{**line, "train/text/question": 1.0, "train/norm": 2.0} for line in LINES]
    curves = charts.training_curves(lines)
    assert list(curves) == ["text"] and list(curves["text"]) == ["training", "held out", "question"]
    axes = charts.line_chart("text", curves["text"]).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[s, value / s] for s in (1, 5, 10)] for value in (3.0, 4.0, 2.0)
    ]
    assert axes.get_title(loc="left") == "text"
    assert [line.get_linewidth() for line in axes.lines] == [1, 2, 2]


@pytest.mark.parametrize("points", [[(3, 0.0)], [(1, 2.0), (2, 2.0)], [(1, 1e-9), (2, -3e7)], [(1, float("nan"))]])
def test_charts_take_any_values(points):
    assert charts.svg(charts.line_chart("x", {"a": points})).rstrip().endswith(b"</svg>")


def test_every_printed_number_is_in_the_scores():
    scores = {"geneval": {"overall": 0.25, "direct": {"overall": 0.125}}, "pictures": 7}
    printed = suite.table(scores)
    assert "0.250" in printed and "0.125" in printed and printed.splitlines()[-1].split() == ["pictures", "7"]


def test_another_seed_means_other_scenes():
    assert reconstruction.scenes(3, 1) == reconstruction.scenes(3, 1) != reconstruction.scenes(3, 2)

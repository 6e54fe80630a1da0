"""GenEval's rules on cases worked out by hand, its prompts, and its files."""

import json

import numpy as np
import pytest
from PIL import Image

from pisces_jax.evaluation import geneval, geneval_folder
from pisces_jax.evaluation.geneval import Detection
from pisces_jax.evaluation.relations import relations
from pisces_jax.shapes_world.text import geneval_prompts
from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError


def found(label, score=0.95, color=None, box=(0, 0, 10, 10)):
    return Detection(label, box, score, color)


def prompt(tag, *include, exclude=None):
    return {"tag": tag, "include": list(include), "prompt": "a photo"} | ({"exclude": exclude} if exclude else {})


def clause(label, count=1, **more):
    return {"class": label, "count": count, **more}


# The arithmetic of each case, with sizes d = 10 and 10, slack 0.1 * (10 + 10) = 2:
@pytest.mark.parametrize(
    ("offset", "held"),
    [
        ((-20, 0), {"left of"}),  # r = (-18, 0), / 20 = -0.9
        ((20, 0), {"right of"}),
        ((0, -20), {"above"}),  # y points down
        ((0, 20), {"below"}),
        ((-20, -20), {"left of", "above"}),  # 18 / 28.28 = 0.636 > 0.5 both ways
        ((20, 12), {"right of"}),  # ||o|| = 23.32; 18 / 23.32 = 0.772, 10 / 23.32 = 0.429
        ((1, -2), set()),  # both within the slack
        ((2.5, 0), set()),  # 0.5 / 2.5 = 0.2
        ((4, 0), set()),  # 2 / 4 = 0.5, which is not above 0.5
        ((4.1, 0), {"right of"}),  # 2.1 / 4.1 = 0.512
    ],
)
def test_relation_between_equal_boxes(offset, held):
    x, y = offset
    assert set(relations((x, y, x + 10, y + 10), (0, 0, 10, 10))) == held


def test_relation_takes_each_axis_with_its_own_sizes():
    # Widths 4 and 20, heights 10 and 2, centres (2, 5) and (30, 21): o = (-28, -16), ||o|| = 32.25,
    # r = (-(28 - 2.4), -(16 - 1.2)) = (-25.6, -14.8), / 32.25 = (-0.794, -0.459).
    assert relations((0, 0, 4, 10), (20, 20, 40, 22)) == ("left of",)


@pytest.mark.parametrize(
    ("scores", "correct"), [([0.31], True), ([0.3], False), ([], False), ([0.29, 0.1], False), ([0.5, 0.9], True)]
)
def test_presence_above_the_threshold(scores, correct):
    judged = geneval.judge([found("cross", s) for s in scores], prompt("single_object", clause("cross")))
    assert judged.correct == correct
    assert judged.reason == ("" if correct else "expected cross>=1, found 0")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([0.95, 0.92], ""),
        ([0.95, 0.9], "expected cross>=2, found 1"),  # 0.9 is not above 0.9
        ([0.95, 0.5, 0.5], "expected cross>=2, found 1"),
        ([0.95, 0.92, 0.91], "expected cross<3, found 3"),
        ([0.95, 0.92, 0.6], ""),  # the third does not count
    ],
)
def test_counting_is_exact_and_strict(scores, reason):
    line = prompt("counting", clause("cross", 2), exclude=[clause("cross", 3)])
    judged = geneval.judge([found("cross", s) for s in scores], line)
    assert judged == geneval.Judgement(not reason, reason)


def test_colour_of_the_surest_only():
    line = prompt("colors", clause("ring", color="red"))
    red, blue = found("ring", 0.8, "red"), found("ring", 0.9, "blue")
    assert geneval.judge([red], line).correct
    judged = geneval.judge([red, blue], line)  # the blue one is surer
    assert judged.reason == "expected red ring>=1, found 0 red; and 1 blue"


def test_colours_are_counted():
    line = prompt("colors", clause("ring", 2, color="red"))
    judged = geneval.judge([found("ring", 0.9, "red"), found("ring", 0.8, "green"), found("ring", 0.7, "red")], line)
    assert judged.reason == "expected red ring>=2, found 1 red; and 1 red, 1 green"


def position_line(relation):
    return prompt("position", clause("dog"), clause("cat", position=[relation, 0]))


def test_position_against_the_first_clause():
    dog, cat = found("dog", box=(20, 0, 30, 10)), found("cat", box=(0, 0, 10, 10))
    assert geneval.judge([dog, cat], position_line("left of")).correct
    judged = geneval.judge([dog, cat], position_line("right of"))
    assert judged.reason == "expected cat right of target, found left of target"


def test_no_position_without_a_target():
    judged = geneval.judge([found("cat")], position_line("above"))
    assert judged.reason == "expected dog>=1, found 0\nno target for cat to be above"


def test_no_position_of_what_has_the_wrong_colour():
    line = prompt("position", clause("dog", color="red"), clause("cat", position=["left of", 0]))
    dog, cat = found("dog", color="blue", box=(20, 0, 30, 10)), found("cat", box=(0, 0, 10, 10))
    assert geneval.judge([dog, cat], line).reason.splitlines()[1] == "no target for cat to be left of"


def test_position_must_hold_for_every_pair():
    line = prompt("position", clause("dog", 2), clause("cat", position=["left of", 0]))
    cat = found("cat", box=(20, 0, 30, 10))
    right, left = found("dog", 0.9, box=(50, 0, 60, 10)), found("dog", 0.8, box=(0, 0, 10, 10))
    assert not geneval.judge([cat, right, left], line).correct


def test_at_most_sixteen_of_a_class():
    line = prompt("counting", clause("cross", 4), exclude=[clause("cross", 17)])
    assert geneval.judge([found("cross")] * 20, line).correct


def test_overall_is_the_unweighted_mean_of_kinds():
    judged = [("counting", True), ("counting", False), ("colors", True)] + [("position", False)] * 7
    scores = geneval.scores(judged)
    assert scores == {"counting": 0.5, "colors": 1.0, "position": 0.0, "overall": 0.5}
    assert list(scores) == ["counting", "colors", "position", "overall"]
    with pytest.raises(UserError):
        geneval.scores([])
    with pytest.raises(UserError, match="correct is 'False' for a picture of colors: write true or false"):
        geneval.scores([("colors", "False")])


# Prompts


def test_official_prompts_are_read_and_ours_have_their_form(data_folder):
    path = data_folder / "geneval" / "evaluation_metadata.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    official = geneval_folder.read_prompts(path)
    assert len(official) == 553
    tags = [line["tag"] for line in official]
    assert {tag: tags.count(tag) for tag in geneval.TAGS} == dict(
        single_object=80, two_object=99, counting=80, colors=94, position=100, color_attr=100
    )
    for line in official:  # everything there is satisfied by nothing at all being found
        assert not geneval.judge([], line).correct

    def form(line):
        clauses = [tuple(c) for c in line["include"]], [tuple(c) for c in line.get("exclude", ())]
        return line["tag"], tuple(line), *clauses

    assert {str(form(line)) for line in geneval_prompts(20)} == {str(form(line)) for line in official}


def test_the_classes_are_the_official_ones(data_folder):
    path = data_folder / "geneval" / "object_names.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert geneval.CLASSES == tuple(path.read_text().split("\n")[: len(geneval.CLASSES)])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (prompt("Counting", clause("bench")), "tag 'Counting', .* did you mean 'counting'"),
        (prompt("colors", clause("bench", color="gray")), "colour 'gray', .* known ones are red, orange"),
        (prompt("single_object", clause("Bench")), "class 'Bench', .* did you mean 'bench'"),
        (prompt("counting", clause("bench"), exclude=[clause("benches", 2)]), "class 'benches'"),
    ],
)
def test_what_can_never_be_right_is_refused(tmp_path, line, said):
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(UserError, match=f"line 1 has the {said}"):
        geneval_folder.read_prompts(path, geneval.CLASSES)


def test_only_a_newline_ends_a_prompt(tmp_path):
    """A byte order mark is no part of the first, and other line breaks stand within one."""
    lines = [dict(prompt("single_object", clause("bench")), prompt=f"a photo{c}of it") for c in "\u2028\x85\x0b"]
    path = tmp_path / "metadata.jsonl"
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).replace("\\u000b", "\u2029")
    path.write_text(text, "utf-8-sig")
    assert [line["prompt"][7] for line in geneval_folder.read_prompts(path)] == ["\u2028", "\x85", "\u2029"]


# Files


class FixedDetector:
    labels = ("cross", "ring")

    def __init__(self, *detections):
        self.detections = list(detections)

    def detect(self, image):
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
        return self.detections


def test_folder_in_the_official_layout(tmp_path):
    lines = [prompt("single_object", clause("cross")), prompt("colors", clause("ring", color="red"))]
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    made = [geneval_folder.sample_files(i, line, [image, image]) for i, line in enumerate(lines)]
    cli.write_files(tmp_path / "out", {name: content for files in made for name, content in files.items()}, "--out")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == [
        f"{i:05d}/{name}" for i in range(2) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == lines[1]
    assert (np.asarray(Image.open(tmp_path / "out/00000/samples/0001.png")) == image).all()

    scores, results = geneval_folder.score_folder(tmp_path / "out", FixedDetector(found("cross", 0.5)))
    assert scores == {"single_object": 1.0, "colors": 0.0, "overall": 0.5}
    for other in ("grid.png", "0000_mask.png", "0000 (1).png"):  # what other programs leave there
        (tmp_path / "out/00000/samples" / other).write_bytes(b"no picture")
    assert geneval_folder.score_folder(tmp_path / "out", FixedDetector(found("cross", 0.5))) == (scores, results)
    rows = [json.loads(row) for row in results.decode().splitlines()]
    assert [row["correct"] for row in rows] == [True, True, False, False]
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(rows[0]["details"]) == {"cross": [[0, 0, 10, 10, 0.5]]}
    assert json.loads(rows[3]["metadata"]) == lines[1] and rows[3]["filename"].endswith("00001/samples/0001.png")


def test_bad_folders_are_the_users_mistakes(tmp_path):
    detector = FixedDetector()
    with pytest.raises(UserError, match="no GenEval samples"):
        geneval_folder.score_folder(tmp_path / "missing", detector)
    with pytest.raises(UserError, match="no GenEval samples"):
        geneval_folder.score_folder(tmp_path, detector)
    place = tmp_path / "00000"
    place.mkdir()
    with pytest.raises(UserError, match=r"metadata.jsonl cannot be read"):
        geneval_folder.score_folder(tmp_path, detector)
    (place / "metadata.jsonl").write_text('{"tag": "colors"}\n')
    with pytest.raises(UserError, match="line 1 is not a GenEval prompt"):
        geneval_folder.score_folder(tmp_path, detector)
    later = prompt("position", clause("dog", position=["left of", 1]), clause("cat"))
    (place / "metadata.jsonl").write_text(json.dumps(later))
    with pytest.raises(UserError, match="earlier clause"):
        geneval_folder.score_folder(tmp_path, detector)
    (place / "metadata.jsonl").write_text(json.dumps(prompt("single_object", clause("cross"))))
    with pytest.raises(UserError, match="holds no PNG"):
        geneval_folder.score_folder(tmp_path, detector)
    (place / "samples").mkdir()
    (place / "samples/0000.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        geneval_folder.score_folder(tmp_path, detector)
    (place / "metadata.jsonl").write_text(json.dumps(prompt("single_object", clause("dog"))))
    with pytest.raises(UserError, match="is to show 'dog', and the detector finds only cross, ring"):
        geneval_folder.score_folder(tmp_path, detector)

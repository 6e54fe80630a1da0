"""The judge: distances against closed forms, what it may see by hand, and a fake model that it sees through."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.sources import make_source
from pisces_jax.evaluation import distances, judge, judging, labelled
from pisces_jax.evaluation.labelled import Labelled
from pisces_jax.utils.errors import UserError

SIZE = 8
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220)}
SIDES = ("left", "right")
TINY = dict(widths=(8, 16), features=8, seen=1200, passes=200, batch_size=16, shift=0.0, learning_rate=0.01)


def painted(colour, side, noise=0):
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    image[:, slice(0, 4) if side == "left" else slice(4, 8)] = COLOURS[colour]
    return np.clip(image.astype(int) + np.random.default_rng(noise).integers(-12, 12, image.shape), 0, 255).astype(
        np.uint8
    )


def folder_of(path, copies, first=0):
    """A folder of pictures of every colour and side, as a source that draws them."""
    path.mkdir()
    lines = []
    for i in range(copies):
        for colour in COLOURS:
            for side in SIDES:
                name = f"{colour}{side}{i}.png"
                Image.fromarray(painted(colour, side, first + i)).save(path / name)
                lines.append(json.dumps({"file_name": name, "colour": colour, "side": side, "number": f"{first + i}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return source_of(path)


def source_of(path, **changes):
    how = dict(kind="image_folder", path=str(path), recipe="draw_caption", caption_format="{colour}, {side}")
    return make_source(how | changes).source


@dataclasses.dataclass
class Drawn:
    image: np.ndarray
    description: str = ""


class Painter:
    """Draws what is asked for, but in the wrong colour where `wrong(i)`; its vectors lose nothing."""

    drawn_size = SIZE
    config = None

    def __init__(self, wrong=lambda i: False):
        self.wrong, self.asked = wrong, []

    def draw(self, prompts, *, seed=0, **how):
        self.asked = [prompt[0].text for prompt in prompts]
        words = [text.removeprefix("draw: ").split(", ") for text in self.asked]
        other = dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True))
        return [
            Drawn(painted(other[colour] if self.wrong(i) else colour, side, 1000 + i))
            for i, (colour, side) in enumerate(words)
        ]

    def features(self, images):
        return images

    def decode(self, vectors, *, seed=0):
        return vectors


def labelled_set(rows, name="x"):
    images = np.zeros((len(rows), 2, 2, 3), np.uint8)
    return Labelled(images, rows, [[Text("draw: x")]] * len(rows), [f"{name}/{i}" for i in range(len(rows))])


# Distances


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4))
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert distances.frechet(a, a + [3, 0, 4, 0]) == pytest.approx(25)
    # Scaling by 2 doubles each standard deviation: Σ (2σ − σ)² = tr(A), and moves the mean by itself.
    expected = np.trace(np.cov(a, rowvar=False)) + np.sum(a.mean(0) ** 2)
    assert distances.frechet(a, 2 * a) == pytest.approx(expected)
    b = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4)) + 1
    A, B = (np.cov(x, rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(A @ B).real
    assert distances.frechet(a, b) == pytest.approx(
        np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(A + B - 2 * root), rel=1e-6
    )


def test_nearest_pictures_in_any_blocks():
    rng = np.random.default_rng(1)
    known = rng.integers(0, 256, (23, 4, 4, 3)).astype(np.uint8)
    images = np.concatenate([known[[17, 2]], rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)])
    brute = np.sqrt([[np.mean((x / 255 - y / 255) ** 2) for y in known] for x in images])
    for block in (4, 23, 100):
        at, distance = distances.nearest(images, known, block)
        np.testing.assert_array_equal(at, brute.argmin(1))
        np.testing.assert_allclose(distance, brute.min(1), atol=1e-6)
        assert distance[0] == distance[1] == 0


def test_standard_errors():
    right = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 1])
    mean, error = distances.mean_and_error(right, range(10))
    assert mean == 0.7 and error == pytest.approx(np.sqrt(0.7 * 0.3 / 9))
    # Copies of the same pictures are no more evidence.
    assert distances.mean_and_error(np.repeat(right, 4), np.repeat(np.arange(10), 4)) == pytest.approx((mean, error))
    booted = distances.bootstrap(lambda i: float(right[i].mean()), range(10), rounds=2000)
    assert booted == pytest.approx(np.sqrt(0.7 * 0.3 / 10), rel=0.05)


def test_pairs_and_their_differences():
    np.testing.assert_array_equal(distances.pairs(["a", "b", "a", "a"]), [[0, 2], [0, 3], [2, 3]])
    assert distances.pairs([1, 2]).shape == (0, 2)
    images = np.zeros((2, 2, 2, 3), np.uint8)
    images[1] = 51
    found = distances.apart(images, np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0, 1]]))
    assert found == {"pixels": pytest.approx(0.2), "features": pytest.approx(5)}
    across = judging._across(np.repeat([4, 7, 9], 2), 2)
    assert across.tolist() == [[0, 2], [1, 3], [2, 4], [3, 5], [4, 0], [5, 1]]


# Labels, and what the judge may see


def test_what_the_judge_may_not_see():
    """A held-out picture is kept from it once it sees three others of every label."""
    train = labelled_set([("duck", "flat")] * 2 + [("cat", "flat")] * 3)
    rows = {"val": [("cat", "flat")] * 2, "names": [("owl", "flat")] * 5}
    held_out = {name: labelled_set(of, name) for name, of in rows.items()}
    kept = labelled.unseen(train, held_out)
    assert kept["val"].all() and kept["names"].sum() == 2
    assert labelled.unseen(train, held_out)["names"].tolist() == kept["names"].tolist()
    # The two that it saw of "duck", and one more, which "val" gives.
    assert labelled.unseen(train, {"val": labelled_set([("duck", "flat")] * 4)})["val"].sum() == 3
    assert not labelled.unseen(train, {"val": labelled_set([("emu", "new")] * 3)})["val"].any()


def test_labels_come_from_the_caption(tmp_path):
    source = folder_of(tmp_path / "set", 1)
    assert labelled.label_fields(source) == ("colour", "side")
    assert labelled.label_fields(source, ("number",)) == ("number",)
    found = labelled.load(source, ("side", "number"), 4)
    assert found.images.shape == (6, 4, 4, 3) and found.labels[:2] == [("left", "0"), ("right", "0")]
    assert found.prompts[0] == [Text("draw: red, left")]
    classes = labelled.classes_of([found], ("side", "number"))
    assert classes == {"side": ["left", "right"], "number": ["0"]}
    assert labelled.numbered(found.labels, classes).tolist() == [[0, 0], [1, 0]] * 3
    with pytest.raises(UserError, match=r"no example has the labels size.*--labels"):
        labelled.load(source, ("size",), 4)
    with pytest.raises(UserError, match="--labels"):
        labelled.label_fields(source_of(tmp_path / "set", caption_format="{colour:{side}}"))


def test_prompts_end_before_what_is_not_given():
    image = Picture(np.zeros((2, 2, 3), np.uint8), "draw")
    assert labelled.prompt([Text("a"), Text("b"), Text("c", learn=True), image]) == [Text("a"), Text("b")]
    assert labelled.prompt([image, Text("a")]) == []


def test_pictures_are_moved_and_mirrored():
    import jax

    images = np.random.default_rng(0).integers(0, 256, (64, 6, 6, 3)).astype(np.uint8)
    still = np.asarray(judge.moved(jax.random.key(0), images, 0.0, False))
    np.testing.assert_array_equal(still, images)
    mirrored = np.asarray(judge.moved(jax.random.key(0), images, 0.0, True))
    flipped = (mirrored == images[:, :, ::-1]).all((1, 2, 3))
    assert 15 < flipped.sum() < 49 and (flipped | (mirrored == images).all((1, 2, 3))).all()
    moved = np.asarray(judge.moved(jax.random.key(0), images, 1 / 6, False))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    cuts = [{padded[i, a : a + 6, b : b + 6].tobytes() for a in range(3) for b in range(3)} for i in range(64)]
    assert all(x.tobytes() in cut for x, cut in zip(moved, cuts, strict=True))
    assert len({int(np.flatnonzero([x.tobytes() == padded[i, a : a + 6, b : b + 6].tobytes() for a in range(3)
                                    for b in range(3)])[0]) for i, x in enumerate(moved)}) > 4  # fmt: skip


# The whole task


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training and held-out sources, and the folder of a judge that is trained by the first test that asks for it."""
    folder = tmp_path_factory.mktemp("judge")
    return folder_of(folder / "train", 5), {"val": folder_of(folder / "val", 5, 100)}, folder / "kept"


def evaluate(model, given, **changes):
    train, held_out, folder = given
    how = dict(folder=folder, prompts=12, images=2, how={"describe": False}, **TINY)
    return judging.evaluate_judge(model, train, held_out, **how | changes)


def test_judged_as_drawn(sets, monkeypatch):
    model = Painter(wrong=lambda i: i % 4 == 0)
    outcome = evaluate(model, sets)
    scores = outcome.scores["val"]
    assert outcome.scores["classes"] == {"colour": 3, "side": 2} and outcome.scores["trained_on"] == 30
    true, drawn = scores["judged"]["true"], scores["judged"]["drawn"]
    assert true["colour"]["top1"] == true["side"]["top1"] == true["all"]["top1"] == 1 and true["pictures"] == 30
    assert drawn["colour"]["top1"] == drawn["all"]["top1"] == 0.75 and drawn["side"]["top1"] == 1
    # One of two pictures of every second prompt is wrong.
    assert drawn["colour"]["top1_se"] == pytest.approx(0.25 / np.sqrt(11)) and drawn["side"]["top1_se"] == 0
    assert len(model.asked) == 24 and scores["prompts"] == 12 and model.asked[0] == model.asked[1]
    assert scores["frechet"]["drawn"] > 0 and scores["frechet"]["equal"]["pictures"] == 15
    assert scores["nearest"]["training_pictures"] == 30 and 0 < scores["nearest"]["drawn"]["mean"] < 0.6
    assert scores["spread"]["true"]["pixels"] < scores["spread"]["other_prompts"]["pixels"]
    json.dumps(outcome.scores)
    assert len(np.unique(np.asarray(judging.sheet(outcome)).reshape(-1, 3), axis=0)) > 100

    # Kept and read again, with the same results; other settings or pictures are another judge.
    def refuse(*args):
        raise AssertionError("trained anew")

    monkeypatch.setattr(judge, "train", refuse)
    assert evaluate(model, sets).scores == outcome.scores
    assert sorted(path.suffix for path in sets[2].iterdir()) == [".json", ".safetensors"]
    (weights,) = sets[2].glob("*.safetensors")
    for changed in (dict(seed=0, labels=("colour",)), dict(smoothing=0.0)):
        with pytest.raises(AssertionError, match="anew"):
            evaluate(model, sets, **changed)
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    with pytest.raises(AssertionError, match="anew"):
        evaluate(model, sets)
    weights.write_bytes(content)


def test_what_cannot_be_judged(sets):
    with pytest.raises(UserError, match=r"--sets=test .*val"):
        evaluate(Painter(), sets, sets=("test",))
    with pytest.raises(UserError, match=r"val has no picture .*--labels"):
        evaluate(Painter(), (folder_of(sets[2].parent / "one", 1), sets[1], sets[2]), labels=("file_name",))

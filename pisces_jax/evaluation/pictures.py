"""Real pictures that were not trained on: captions, drawings, and reconstructions, beside what needs no model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from ml_collections import ConfigDict
from PIL import Image

from pisces_jax.data.example import Example, Part, Picture, Text
from pisces_jax.data.images import fit
from pisces_jax.data.instructions import CAPTION_INSTRUCTION, draw_instruction
from pisces_jax.evaluation.answers import Answered, plain
from pisces_jax.evaluation.grids import Cell, Row, labelled_grid, side_by_side
from pisces_jax.evaluation.task import Amount, Model, Outcome, Pictures, Task

Source = Sequence[Example]
SourcesOf = Callable[[ConfigDict], Sequence[Source]]
MOST_TRAINING_PICTURES = 5000  # that drawn ones are compared with


def task(evaluation_sources: SourcesOf, training_sources: SourcesOf, synthetic: set[str]) -> Task:
    """Task "pictures", for runs with sources of other kinds than `synthetic`.

    The functions give a run's held-out examples and those it was trained on.
    """

    def run(model: Model, amount: Amount, how: Mapping[str, Any]) -> Outcome:
        return evaluate_pictures(
            model,
            evaluation_sources(model.config),
            pictures=amount.pictures,
            size=model.drawn_size,
            training=training_sources(model.config),
            seed=amount.seed,
            **how,
        )

    return Task(lambda kinds: bool(kinds - synthetic), run, sheet)


def evaluate_pictures(
    model: Model,
    sources: Sequence[Source],
    *,
    pictures: int,
    size: int,
    training: Sequence[Source] = (),
    describe: bool = False,
    seed: int = 0,
    **how: Any,
) -> Outcome:
    """Scores on `pictures` examples of each kind in `sources`.

    `reading` needs a source that has pictures to read with learned texts; `reconstruction` and `drawing` need one that
    has pictures to draw. Beside them come the same scores of baselines that ignore the picture: the commonest text, the
    mean picture. Drawn pictures are judged by what the model itself reads in them (`read_as_asked`), and compared with
    the pictures of `training` (`nearest`). `how` goes to `model.draw`.
    """
    scores: dict[str, Any] = {}
    asked: list[Answered] = []
    shown: dict[str, Any] = {}
    if reads := _take(sources, _is_reading, pictures):
        scores["reading"], asked = captions(model, reads)
    if draws := _take(sources, _is_drawing, pictures):
        prompts = [example.parts[: _first(example, _drawn)] for example in draws]
        texts = [" ".join(p.text for p in prompt if isinstance(p, Text)) for prompt in prompts]
        wanted = [text.removeprefix(draw_instruction("")) for text in texts]
        truth = np.stack([fit(_picture(example, "draw"), size) for example in draws])
        decoded = model.decode(model.features(truth), seed=seed)
        drawn = model.draw(prompts, describe=describe, seed=seed, **how)
        scores["reconstruction"] = {**pixel_errors(truth, decoded), "pictures": len(draws)}
        of = {"true": truth, "true_vectors": decoded, "drawn": np.stack([d.image for d in drawn])}
        shown = {"prompts": wanted, **of}
        scores["drawing"] = {"pictures": len(draws)}
        if reads:
            right = {name: read_as(model, images, wanted) for name, images in of.items()}
            scores["drawing"]["read_as_asked"] = {name: float(r.mean()) for name, r in right.items()}
            shown["read_as_asked"] = right["drawn"]
        if known := [fit(_picture(e, "draw"), size) for e in _take(training, _is_drawing, MOST_TRAINING_PICTURES)]:
            near = {name: nearest(of[name], np.stack(known)) for name in ("true", "drawn")}
            scores["drawing"]["nearest"] = {
                f"{what}_{name}": float(value.mean())
                for name, (_, *values) in near.items()
                for what, value in zip(("distance", "ratio"), values, strict=True)
            } | {"training_pictures": len(known)}
            shown["nearest"] = np.stack([known[i] for i in near["drawn"][0]])
    return Outcome(scores, asked=asked, shown=shown)


def pixel_errors(truth: Pictures, decoded: Pictures) -> dict[str, float]:
    """The error of pictures decoded from true vectors, and that of the mean picture, the best that ignores them."""
    return {
        "true_vectors_pixel_error": pixel_error(truth, decoded),
        "mean_picture_pixel_error": pixel_error(truth, mean_picture(truth)),
    }


def pixel_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of pixels scaled to 0..1."""
    return float(np.mean(np.square((a.astype(np.float32) - b.astype(np.float32)) / 255)))


def mean_picture(images: Pictures) -> Float32[np.ndarray, "S S 3"]:
    """The picture that has the least error of all that ignore what is shown."""
    return np.mean(np.asarray(images, np.float32), axis=0)


def read_as(model: Model, images: Pictures, wanted: Sequence[str], max_tokens: int = 32) -> Bool[np.ndarray, "N"]:
    """Whether the model's own caption of each picture is what was wanted."""
    answers = model.answer(
        [(Picture(image, "read"), Text(CAPTION_INSTRUCTION)) for image in images], max_tokens=max_tokens
    )
    return np.array([plain(a) == plain(w) for a, w in zip(answers, wanted, strict=True)])


def nearest(images: Pictures, known: Pictures, neighbours: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each picture, the nearest of `known`: its index [N], its distance [N], and the ratio [N] of that distance to
    the mean distance of the `neighbours` nearest, which is small for a copy (after Carlini et al. 2023, arXiv
    2301.13188).

    A distance is the root mean square difference of pixels scaled to 0..1.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (images, known))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distances = np.sqrt(np.maximum(squares, 0) / a.shape[1])
    index = distances.argmin(1)
    best = distances[np.arange(len(a)), index]
    around = np.sort(distances, axis=1)[:, :neighbours].mean(1)
    return index, best, best / np.maximum(around, 1e-12)


def captions(model: Model, examples: Sequence[Example], max_tokens: int = 32) -> tuple[dict[str, Any], list[Answered]]:
    """How well the model finds the learned text of each example from what stands before it.

    Returns:
        The scores and the answers. `accuracy` is the share of exact matches, `word_overlap` the mean F1 of the words.
        Where texts come often enough to be classes, `class_accuracy` is the mean of their accuracies. `commonest_text`
        is the accuracy of always giving the commonest text.
    """
    at = [_first(example, _learned) for example in examples]
    questions = [example.parts[:i] for example, i in zip(examples, at, strict=True)]
    answers = model.answer(questions, max_tokens=max_tokens)
    asked = [
        Answered(_picture(example, "read"), "caption", "", example.parts[i].text, answer)  # type: ignore[union-attr]
        for example, i, answer in zip(examples, at, answers, strict=True)
    ]
    truths = [plain(a.truth) for a in asked]
    right = np.array([a.correct for a in asked])
    counts = Counter(truths)
    scores: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "word_overlap": float(np.mean([_overlap(plain(a.answer), plain(a.truth)) for a in asked])),
        "commonest_text": counts.most_common(1)[0][1] / len(truths),
        "pictures": len(truths),
    }
    if len(counts) <= len(truths) / 5:
        by_class = {text: float(right[[t == text for t in truths]].mean()) for text in sorted(counts)}
        scores["class_accuracy"] = float(np.mean(list(by_class.values())))
        scores["by_class"] = by_class
    return scores, asked


def sheet(outcome: Outcome, most: int = 24) -> Image.Image:
    """What was asked, a true picture, the same decoded from its true vectors, what was drawn, and the training picture
    nearest to that; then pictures that were read, with what was read in them.

    A drawn picture's frame is green where the model itself reads in it what was asked, else red.
    """
    sheets = []
    if drawing := outcome.shown:
        rows: list[Row] = []
        right, near = drawing.get("read_as_asked"), drawing.get("nearest")
        for i, prompt in enumerate(drawing["prompts"][:most]):
            cells = [Cell(drawing["true"][i]), Cell(drawing["true_vectors"][i])]
            cells.append(Cell(drawing["drawn"][i], None if right is None else bool(right[i])))
            rows.append((prompt, cells + ([] if near is None else [Cell(near[i])])))
        headings = ["true", "from its true vectors", "drawn", "nearest in training"]
        sheets.append(labelled_grid(rows, headings, picture=80, text=170))
    if outcome.asked:
        rows = []
        for a in outcome.asked[:most]:
            said = plain(a.answer) if a.correct else f"{plain(a.answer)} (right: {plain(a.truth)})"
            rows.append((said, [Cell(a.image, a.correct)]))
        sheets.append(labelled_grid(rows, ["read"], picture=80, text=230))
    title = "Unseen pictures, not chosen. Green frame: read rightly, by the model itself; red: not."
    return side_by_side(sheets, title)


def _overlap(answer: str, truth: str) -> float:
    a, t = Counter(answer.split()), Counter(truth.split())
    common = (a & t).total()
    return 2 * common / max(a.total() + t.total(), 1)


def _learned(part: Part) -> bool:
    return isinstance(part, Text) and part.learn


def _drawn(part: Part) -> bool:
    return isinstance(part, Picture) and part.role == "draw"


def _first(example: Example, wanted: Callable[[Part], bool]) -> int:
    """The index of the first part that is wanted; -1 if none is."""
    return next((i for i, part in enumerate(example.parts) if wanted(part)), -1)


def _is_reading(example: Example) -> bool:
    end = _first(example, _learned)
    return end > 0 and any(isinstance(p, Picture) and p.role == "read" for p in example.parts[:end])


def _is_drawing(example: Example) -> bool:
    end = _first(example, _drawn)
    # A learned text before the picture is the model's own to write, not a part of the prompt.
    return end > 0 and not any(_learned(p) for p in example.parts[:end])


def _take(sources: Sequence[Source], wanted: Callable[[Example], bool], number: int) -> list[Example]:
    """`number` examples of the first source of that kind, spread over it because files are often sorted."""
    for source in sources:
        if len(source) and wanted(source[0]):
            return [source[int(i)] for i in np.unique(np.linspace(0, len(source) - 1, number).astype(int))]
    return []


def _picture(example: Example, role: str) -> np.ndarray:
    return next(p.array() for p in example.parts if isinstance(p, Picture) and p.role == role)

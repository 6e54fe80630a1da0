"""Real pictures that were not trained on: captions, and reconstructions beside what needs no model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from pisces_jax.data.example import Example, Part, Picture, Text
from pisces_jax.data.images import fit
from pisces_jax.data.instructions import CAPTION_INSTRUCTION, draw_instruction
from pisces_jax.shapes_world.reading import Reader, plain
from pisces_jax.shapes_world.reconstruction import Reconstructor, mean_picture, pixel_error


class Whole(Reader, Reconstructor, Protocol):
    """What is needed of a model: `inference.model.Model` has it."""


Source = Sequence[Example]
Images = UInt8[np.ndarray, "N S S 3"]
MOST_TRAINING_PICTURES = 5000  # with which drawn ones are compared


def evaluate_pictures(
    model: Whole,
    sources: Sequence[Source],
    *,
    pictures: int,
    size: int,
    training: Sequence[Source] = (),
    describe: bool = False,
    seed: int = 0,
    **how: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores on the first `pictures` examples of each kind in `sources`, and what they were taken from.

    `reading` (where a source has pictures to read with learned texts), `reconstruction` and `drawing` (where one has
    pictures to draw). Beside them come the same scores of what ignores the picture: the commonest text, the mean
    picture. Drawn pictures are judged by what the model itself reads in them (`read_as_asked`), and compared with the
    pictures of `training` (`nearest`). `how` goes to `model.draw`.
    """
    scores: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    if reads := _take(sources, _is_reading, pictures):
        scores["reading"], shown["reading"] = captions(model, reads)
    if draws := _take(sources, _is_drawing, pictures):
        prompts = [example.parts[: _first(example, _drawn)] for example in draws]
        asked = [" ".join(p.text for p in prompt if isinstance(p, Text)) for prompt in prompts]
        truth = np.stack([fit(_picture(example, "draw"), size) for example in draws])
        decoded = model.decode(model.features(truth), seed=seed)
        drawn = model.draw(prompts, describe=describe, seed=seed, **how)
        average = mean_picture(truth)
        scores["reconstruction"] = {
            "true_vectors_pixel_error": pixel_error(truth, decoded),
            "mean_picture_pixel_error": pixel_error(truth, average),
            "pictures": len(draws),
        }
        of = {"true": truth, "true_vectors": decoded, "drawn": np.stack([d.image for d in drawn])}
        shown["drawing"] = {"prompts": asked, **of, "descriptions": [d.description for d in drawn]}
        scores["drawing"] = {"pictures": len(draws)}
        if reads:
            right = {name: read_as(model, images, asked) for name, images in of.items()}
            scores["drawing"]["read_as_asked"] = {name: float(r.mean()) for name, r in right.items()}
            shown["drawing"]["read_as_asked"] = right["drawn"]
        if known := [fit(_picture(e, "draw"), size) for e in _take(training, _is_drawing, MOST_TRAINING_PICTURES)]:
            near = {name: nearest(of[name], np.stack(known)) for name in ("true", "drawn")}
            scores["drawing"]["nearest"] = {
                f"{what}_{name}": float(value.mean())
                for name, (_, *values) in near.items()
                for what, value in zip(("distance", "ratio"), values, strict=True)
            } | {"training_pictures": len(known)}
            shown["drawing"]["nearest"] = np.stack([known[i] for i in near["drawn"][0]])
    return scores, shown


def read_as(model: Reader, images: Images, asked: Sequence[str], max_tokens: int = 32) -> Bool[np.ndarray, "N"]:
    """Whether the model's own caption of each picture is what was asked for."""
    answers = model.answer(
        [(Picture(image, "read"), Text(CAPTION_INSTRUCTION)) for image in images], max_tokens=max_tokens
    )
    wanted = [text.removeprefix(draw_instruction("")) for text in asked]
    return np.array([plain(a) == plain(w) for a, w in zip(answers, wanted, strict=True)])


def nearest(images: Images, known: Images, neighbours: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each picture, the nearest of `known`: its index, its distance, and that distance over the mean distance of
    the `neighbours` nearest, which a copy makes small (after Carlini et al. 2023, arXiv 2301.13188).

    A distance is the root mean square difference of pixels that run from 0 to 1.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (images, known))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distances = np.sqrt(np.maximum(squares, 0) / a.shape[1])
    index = distances.argmin(1)
    best = distances[np.arange(len(a)), index]
    around = np.sort(distances, axis=1)[:, :neighbours].mean(1)
    return index, best, best / np.maximum(around, 1e-12)


def captions(
    model: Reader, examples: Sequence[Example], max_tokens: int = 32
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How well the learned text of each example is found from what stands before it.

    `accuracy` is the share of exact matches. `word_overlap` is the mean F1 of the words. Where texts come often enough
    to be classes, `class_accuracy` is the mean of their accuracies. `commonest_text` is the accuracy of always giving
    the text that is the commonest.
    """
    at = [_first(example, _learned) for example in examples]
    questions = [example.parts[:i] for example, i in zip(examples, at, strict=True)]
    truths = [plain(example.parts[i].text) for example, i in zip(examples, at, strict=True)]  # type: ignore[union-attr]
    answers = [plain(answer) for answer in model.answer(questions, max_tokens=max_tokens)]
    right = np.array([a == t for a, t in zip(answers, truths, strict=True)])
    counts = Counter(truths)
    scores: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "word_overlap": float(np.mean([_overlap(a, t) for a, t in zip(answers, truths, strict=True)])),
        "commonest_text": counts.most_common(1)[0][1] / len(truths),
        "pictures": len(truths),
    }
    if len(counts) <= len(truths) / 5:
        by_class = {text: float(right[[t == text for t in truths]].mean()) for text in sorted(counts)}
        scores["class_accuracy"] = float(np.mean(list(by_class.values())))
        scores["by_class"] = by_class
    shown = [
        {"image": _picture(e, "read"), "truth": t, "answer": a, "correct": a == t}
        for e, t, a in zip(examples, truths, answers, strict=True)
    ]
    return scores, shown


def _overlap(answer: str, truth: str) -> float:
    a, t = Counter(answer.split()), Counter(truth.split())
    common = (a & t).total()
    return 2 * common / max(a.total() + t.total(), 1)


def _learned(part: Part) -> bool:
    return isinstance(part, Text) and part.learn


def _drawn(part: Part) -> bool:
    return isinstance(part, Picture) and part.role == "draw"


def _first(example: Example, wanted: Any) -> int:
    return next((i for i, part in enumerate(example.parts) if wanted(part)), -1)


def _is_reading(example: Example) -> bool:
    end = _first(example, _learned)
    return end > 0 and any(isinstance(p, Picture) and p.role == "read" for p in example.parts[:end])


def _is_drawing(example: Example) -> bool:
    end = _first(example, _drawn)
    # What is written first here is the model's own to write, and no part of the prompt.
    return end > 0 and not any(_learned(p) for p in example.parts[:end])


def _take(sources: Sequence[Source], wanted: Any, number: int) -> list[Example]:
    """The first examples of the first source of that kind, spread over it: files are often sorted."""
    for source in sources:
        if len(source) and wanted(source[0]):
            return [source[int(i)] for i in np.unique(np.linspace(0, len(source) - 1, number).astype(int))]
    return []


def _picture(example: Example, role: str) -> np.ndarray:
    return next(p.array() for p in example.parts if isinstance(p, Picture) and p.role == role)

"""Task "judge": pictures drawn from a captioned set's unseen prompts, judged by a classifier of its true pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict
from PIL import Image

from pisces_jax.data.formats.records import Examples
from pisces_jax.evaluation import distances, labelled
from pisces_jax.evaluation.grids import Cell, Row, labelled_grid, side_by_side
from pisces_jax.evaluation.judge import Judge, JudgeSettings, Seen, open_judge
from pisces_jax.evaluation.labelled import Labelled
from pisces_jax.evaluation.task import Amount, Model, Outcome, Pictures, Task
from pisces_jax.utils.errors import UserError

SourcesOf = Callable[[ConfigDict], tuple[Examples, Mapping[str, Examples]]]
TOP = 5  # the asked class may be among so many, for fields with more than twice as many classes
SPLITS = 20  # random halves for the Fréchet distance
FEWEST = 8  # pictures for a Fréchet distance


def task(sources: SourcesOf, synthetic: set[str], folder: Path, labels: str = "", sets: str = "") -> Task:
    """Task "judge", for runs with sources of other kinds than `synthetic`.

    Args:
        sources: gives the source that a run learns to draw from, and the held-out ones by name.
        folder: where the classifier is kept.
        labels, sets: names with commas between them.
    """

    def run(model: Model, amount: Amount, how: Mapping[str, Any]) -> Outcome:
        train, held_out = sources(model.config)
        return evaluate_judge(
            model, train, held_out, folder=folder, prompts=amount.pictures, images=amount.images, seed=amount.seed,
            labels=_names(labels), sets=_names(sets), how=how,
        )  # fmt: skip

    return Task(lambda kinds: bool(kinds - synthetic), run, sheet, alone=True)


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def evaluate_judge(
    model: Model,
    train: Examples,
    held_out: Mapping[str, Examples],
    *,
    folder: Path,
    prompts: int,
    images: int,
    seed: int = 0,
    labels: Sequence[str] = (),
    sets: Sequence[str] = (),
    how: Mapping[str, Any],
    **settings: Any,
) -> Outcome:
    """Draws `images` pictures for each of `prompts` prompts of every held-out set (or those that `sets` names).

    The judge is trained on the pictures of `train` and on what it may see of all `held_out` (`labelled.unseen`);
    prompts are those of unseen pictures, spread evenly over the set. `settings` are those of `JudgeSettings`.

    Returns:
        The fields, what the judge was trained on and, for each set (`score_set`), the scores.

    Raises:
        UserError: a set does not exist or has no picture that the judge has not seen; there are no labels.
    """
    for name in sets:
        if name not in held_out:
            raise UserError(f"--sets={name} is no held-out set of this run: choose among {', '.join(held_out)}")
    fields, size = labelled.label_fields(train, labels), model.drawn_size
    known = labelled.load(train, fields, size)
    loaded = {name: labelled.load(source, fields, size) for name, source in held_out.items()}
    classes = labelled.classes_of([known, *loaded.values()], fields)
    unseen = labelled.unseen(known, loaded)
    for name in sets or held_out:
        if not unseen[name].any():
            raise UserError(
                f"held-out set {name} has no picture of which the judge sees {labelled.LEAST} others with the same "
                f"{' and '.join(fields)}: name fields that repeat with --labels"
            )
    shown = [known, *(loaded[name].take(~unseen[name]) for name in sorted(loaded))]
    judge = open_judge(
        folder,
        np.concatenate([one.images for one in shown]),
        [row for one in shown for row in one.labels],
        classes,
        JudgeSettings(size=size, flip=getattr(train.recipe, "flip", False), **settings),
    )
    scores: dict[str, Any] = {
        "classes": {field: len(values) for field, values in classes.items()}, "trained_on": judge.pictures
    }  # fmt: skip
    sheets = {}
    for name in sets or held_out:
        true = loaded[name].take(unseen[name])
        scores[name], sheets[name] = score_set(model, judge, true, known.images, prompts, images, seed, how)
    return Outcome(scores, shown=sheets)


def score_set(
    model: Model,
    judge: Judge,
    true: Labelled,
    known: Pictures,
    prompts: int,
    images: int,
    seed: int,
    how: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of pictures drawn from the prompts of `true`, the pictures that neither model nor judge has seen.

    Returns:
        The scores, and what the sheet shows. `judged` is what the judge takes pictures for: the `true` ones, which is
        the most that can be asked, these through the model's encoder and decoder (`true_vectors`), and those `drawn`;
        `all` is every field at once, and `_se` a standard error, for drawn pictures over prompts. `frechet` is the
        distance to the true pictures; `equal` has it for sets of the same size, with that of two halves of the true
        pictures (`true`) for scale. `nearest` is the distance to the nearest training picture: copies have less than
        true pictures. `spread` is how much the pictures of a prompt differ, beside pictures of two prompts and true
        pictures of the same labels.
    """
    asked = labelled.numbered(true.labels, judge.classes)
    chosen = np.unique(np.linspace(0, len(true) - 1, min(prompts, len(true))).astype(int))
    of = np.repeat(chosen, images)
    drawn = np.stack([d.image for d in model.draw([true.prompts[i] for i in of], seed=seed, **how)])
    decoded = model.decode(model.features(true.images[chosen]), seed=seed)
    look = {"true": judge.look(true.images, asked), "true_vectors": judge.look(decoded, asked[chosen]),
            "drawn": judge.look(drawn, asked[of])}  # fmt: skip
    groups = {"true": np.arange(len(true)), "true_vectors": chosen, "drawn": of}
    near = {name: distances.nearest(x, known) for name, x in (("true", true.images[chosen]), ("drawn", drawn))}
    scores = {
        "judged": {name: _judged(look[name], judge, groups[name]) for name in look},
        "frechet": _frechet({name: seen.features for name, seen in look.items()}, of, seed),
        "nearest": {name: _summary(values) for name, (_, values) in near.items()} | {"training_pictures": len(known)},
        "spread": {
            "drawn": _spread(drawn, look["drawn"], distances.pairs(of.tolist())),
            "other_prompts": _spread(drawn, look["drawn"], _across(of, images)),
            "true": _spread(true.images, look["true"], _some(distances.pairs(true.labels), seed)),
        },
        "prompts": len(chosen),
        "images": images,
    }
    right = {name: (seen.rank == 0).all(1) for name, seen in look.items()}
    shown = {
        "prompts": [" ".join(text.text for text in true.prompts[i]) for i in chosen],
        "true": true.images[chosen], "true_right": right["true"][chosen],
        "drawn": drawn.reshape(len(chosen), images, *drawn.shape[1:]),
        "drawn_right": right["drawn"].reshape(len(chosen), images),
        "nearest": known[near["drawn"][0].reshape(len(chosen), images)[:, 0]],
    }  # fmt: skip
    return scores, shown


def _judged(seen: Seen, judge: Judge, groups: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f, (field, values) in enumerate(judge.classes.items()):
        found[field] = _share(seen.rank[:, f] == 0, groups, "top1")
        if len(values) > 2 * TOP:
            found[field] |= _share(seen.rank[:, f] < TOP, groups, f"top{TOP}")
    if len(judge.classes) > 1:
        found["all"] = _share((seen.rank == 0).all(1), groups, "top1")
    return found | {"pictures": len(seen.rank)}


def _share(right: np.ndarray, groups: np.ndarray, name: str) -> dict[str, float]:
    return dict(zip((name, f"{name}_se"), distances.mean_and_error(right, groups.tolist()), strict=True))


def _frechet(features: Mapping[str, np.ndarray], of: np.ndarray, seed: int) -> dict[str, Any] | None:
    true, drawn = features["true"], features["drawn"]
    size = min(len(true) // 2, len(drawn))
    if size < FEWEST:
        return None
    rng = np.random.default_rng(seed)
    equal: dict[str, list[float]] = {"drawn": [], "true": []}
    for _ in range(SPLITS):
        a, b = np.split(true[rng.permutation(len(true))[: 2 * size]], 2)
        equal["drawn"].append(distances.frechet(drawn[rng.permutation(len(drawn))[:size]], b))
        equal["true"].append(distances.frechet(a, b))
    return {
        "drawn": distances.frechet(drawn, true),
        "drawn_se": distances.bootstrap(lambda i: distances.frechet(drawn[i], true), of.tolist(), seed=seed),
        "true_vectors": distances.frechet(features["true_vectors"], true),
        "equal": {name: float(np.mean(values)) for name, values in equal.items()} | {"pictures": size},
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    low, middle = np.quantile(values, [0.05, 0.5])
    return {"mean": float(values.mean()), "median": float(middle), "lowest_twentieth": float(low)}


def _spread(images: Pictures, seen: Seen, pairs: np.ndarray) -> dict[str, float] | None:
    return distances.apart(images, seen.features, pairs) if len(pairs) else None


def _across(of: np.ndarray, images: int) -> np.ndarray:
    """Every picture with one of the next prompt."""
    numbers = np.arange(len(of))
    return np.stack([numbers, np.roll(numbers, -images)], 1) if len(of) > images else np.zeros((0, 2), int)


def _some(pairs: Int32[np.ndarray, "P 2"], seed: int, most: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).permutation(pairs)[:most]


def sheet(outcome: Outcome, most: int = 16) -> Image.Image:
    """For each set prompts, a true picture, those drawn, and the training picture nearest to the first of these.

    A frame is green where the judge takes the picture for what was asked, in every field; else red.
    """
    sheets = []
    for name, s in outcome.shown.items():
        rows: list[Row] = []
        for i, prompt in enumerate(s["prompts"][:most]):
            drawn = zip(s["drawn"][i], s["drawn_right"][i], strict=True)
            cells = [Cell(s["true"][i], bool(s["true_right"][i])), *(Cell(x, bool(right)) for x, right in drawn)]
            rows.append((prompt, [*cells, Cell(s["nearest"][i])]))
        images = s["drawn"].shape[1]
        headings = [f"{name}: true", "drawn", *[""] * (images - 1), "nearest in training"]
        sheets.append(labelled_grid(rows, headings, picture=80, text=170))
    title = "Drawn from unseen prompts, not chosen. Green frame: the judge takes it for what was asked; red: not."
    return side_by_side(sheets, title)

"""All scores of one model, as the `evaluate` command and the demo report them, with what they were taken from."""

import argparse
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.evaluation import pictures
from pisces_jax.shapes_world import drawing, reading, reconstruction, spread
from pisces_jax.utils.cli import Parser, whole_number
from pisces_jax.utils.errors import UserError

SHAPES_TASKS = ("geneval", "spread", "reading", "reconstruction")
TASKS = (*SHAPES_TASKS, "pictures")
SPREAD_IMAGES = 8  # of one prompt, to see how much they differ


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is evaluated.

    Attributes:
        per_task: prompts of each of GenEval's kinds.
        images: pictures a prompt.
        per_kind: questions of each kind.
        held_out: prompts and questions of each kind about what is held out of training; 0: none.
        spread: prompts that are drawn `SPREAD_IMAGES` times each, to see how much their pictures differ; 0: none.
        pictures: pictures to reconstruct, and real pictures to read and to draw.
        seed: another seed, other prompts, questions and noise.
    """

    per_task: int = 25
    images: int = 2
    per_kind: int = 200
    held_out: int = 12
    spread: int = 8
    pictures: int = 128
    seed: int = 0


@dataclasses.dataclass
class Results:
    """`scores` go to JSON; the rest is what a report shows of them."""

    scores: dict[str, Any] = dataclasses.field(default_factory=dict)
    drawn: dict[str, list[drawing.Judged]] = dataclasses.field(default_factory=dict)
    asked: list[reading.Answered] = dataclasses.field(default_factory=list)
    reconstructed: dict[str, Any] = dataclasses.field(default_factory=dict)
    real: dict[str, Any] = dataclasses.field(default_factory=dict)


def add_amount_flags(parser: Parser) -> None:
    """How much to evaluate: the fields of `evaluation.suite.Amount`."""
    helps = {
        "per_task": "prompts of each of GenEval's kinds",
        "images": "pictures a prompt",
        "per_kind": "questions of each kind",
        "held_out": "prompts and questions of each kind about what is held out of training; 0: none",
        "spread": f"prompts drawn {SPREAD_IMAGES} times each, to see how much their pictures differ; 0: none",
        "pictures": "pictures to reconstruct; real pictures to read and draw",
        "seed": "another seed, other prompts, questions and noise",
    }
    for field in dataclasses.fields(Amount):
        least = 0 if field.name in ("held_out", "spread", "seed") else 1
        text = f"{helps[field.name]} (default {field.default})"
        parser.add_argument(f"--{field.name}", type=whole_number(least), default=field.default, help=text)


def amount(given: argparse.Namespace) -> Amount:
    return Amount(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Amount)})


def tasks_for(task: str, config: ConfigDict) -> tuple[str, ...]:
    """The tasks that a run of this config can be asked for; "all" are those that fit its data.

    Raises:
        UserError: an unknown task, or one that does not fit.
    """
    kinds = {source.kind for source in (config.data.evaluate or config.data.train).values()}
    possible = (SHAPES_TASKS if "shapes" in kinds else ()) + (("pictures",) if kinds - {"shapes"} else ())
    if task == "all":
        return possible
    if task not in TASKS:
        raise UserError(f"--task={task} is none of {', '.join(TASKS)}, all")
    if task not in possible:
        raise UserError(f"--task={task} does not fit this run, which saw {', '.join(kinds)}: try {possible[0]}")
    return (task,)


def evaluate(
    model: Any,
    tasks: Sequence[str],
    amount: Amount,
    how: Mapping[str, Any],
    *,
    both: bool = False,
    sources: Sequence[Any] = (),
    training: Sequence[Any] = (),
) -> Results:
    """Runs `tasks` on a `Model`; `how` holds the arguments of `Model.draw`, `describe` among them.

    With `both`, GenEval's prompts are drawn both ways, after a description and at once. `sources` are the held-out
    examples of task "pictures", `training` those that it compares what is drawn with.
    """
    results = Results()
    seconds: dict[str, float] = {}
    for task in tasks:
        if task == "spread" and not amount.spread:
            continue
        start = time.perf_counter()
        if task == "geneval":
            results.scores[task] = _geneval(model, amount, how, both, results)
        elif task == "spread":
            arguments = {**how, "seed": amount.seed}
            results.scores[task] = spread.spread(
                model, prompts=amount.spread, images=SPREAD_IMAGES, size=model.drawn_size, **arguments
            )
        elif task == "reading":
            results.scores[task] = _reading(model, amount, results)
        elif task == "reconstruction":
            results.scores[task], results.reconstructed = reconstruction.reconstruct(
                model, pictures=amount.pictures, size=model.drawn_size, seed=amount.seed
            )
        else:
            results.scores[task], results.real = pictures.evaluate_pictures(
                model,
                sources,
                pictures=amount.pictures,
                size=model.drawn_size,
                training=training,
                seed=amount.seed,
                **how,
            )
        seconds[task] = round(time.perf_counter() - start, 1)
    results.scores["seconds"] = seconds
    return results


def _geneval(model: Any, amount: Amount, how: Mapping[str, Any], both: bool, results: Results) -> dict[str, Any]:
    def draw(describe: bool, per_task: int, held_out: bool = False) -> list[drawing.Judged]:
        arguments = {**how, "describe": describe, "seed": amount.seed}
        return drawing.draw(model, per_task=per_task, images=amount.images, held_out=held_out, **arguments)

    chosen = how["describe"]
    name = {True: "described", False: "direct"}
    results.drawn[name[chosen]] = draw(chosen, amount.per_task)
    if amount.held_out:
        results.drawn["held_out"] = draw(chosen, amount.held_out, held_out=True)
    scores = drawing.score(results.drawn[name[chosen]], results.drawn.get("held_out", ()))
    scores["drawn"] = name[chosen]
    if both:
        results.drawn[name[not chosen]] = draw(not chosen, amount.per_task)
        for way in name.values():
            scores[way] = drawing.score(results.drawn[way])
    return scores


def _reading(model: Any, amount: Amount, results: Results) -> dict[str, Any]:
    size = model.read_size
    results.asked = reading.ask(model, per_kind=amount.per_kind, size=size, seed=amount.seed)
    held_out = (
        reading.ask(model, per_kind=amount.held_out, size=size, seed=amount.seed, held_out=True)
        if amount.held_out
        else []
    )
    return reading.score(results.asked, held_out)


def versions() -> dict[str, str]:
    """What the numbers were measured with."""
    packages = {"orbax": "orbax-checkpoint"}
    names = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(packages.get(name, name)) for name in names
    }


def number(value: float) -> str:
    """Three decimals; small numbers, such as errors of pixels, to two figures."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def table(scores: Mapping[str, Any]) -> str:
    """The scores for a terminal: every number, a line each, indented below its group."""
    lines: list[tuple[str, str]] = []

    def add(group: Mapping[str, Any], depth: int) -> None:
        for name, value in group.items():
            indent = "  " * depth
            if isinstance(value, Mapping):
                lines.append((f"{indent}{name}", ""))
                add(value, depth + 1)
            else:
                shown = number(value) if isinstance(value, float) else str(value)
                lines.append((f"{indent}{name}", shown))

    add(scores, 0)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {shown.rjust(9)}".rstrip() for name, shown in lines)

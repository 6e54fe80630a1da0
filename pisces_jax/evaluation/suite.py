"""Runs evaluation tasks on one model, for the `evaluate` command and the demo."""

import argparse
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.evaluation.task import Amount, Model, Outcome, Task
from pisces_jax.utils.cli import Parser, path, whole_number
from pisces_jax.utils.errors import UserError

Tasks = Mapping[str, Task]
_NUMBERS = [field for field in dataclasses.fields(Amount) if field.metadata]


def add_amount_flags(parser: Parser) -> None:
    """Adds a flag for each number in `Amount`."""
    for field in _NUMBERS:
        meaning = f"{field.metadata['meaning']} (default {field.default})"
        kind = whole_number(field.metadata["least"])
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=meaning)


def add_judge_flags(parser: Parser) -> None:
    """The flags of the task "judge" (`judging.py`)."""
    parser.add_argument("--judge", type=path, metavar="DIR", help="judge: where its classifier is kept, for all runs "
                        "on one set (default: WORKDIR/judge)")  # fmt: skip
    parser.add_argument("--labels", default="", help="judge: the fields with labels, as in label,style (default: those "
                        "that the captions name)")  # fmt: skip
    parser.add_argument("--sets", default="", help="judge: the held-out sets to draw from (default: all)")


def amount(given: argparse.Namespace, *, both: bool) -> Amount:
    """The amount that the flags of `add_amount_flags` ask for."""
    return Amount(**{field.name: getattr(given, field.name) for field in _NUMBERS}, both=both)


def check_name(task: str, known: Tasks) -> None:
    """Raises `UserError` for a --task that is neither known nor "all"."""
    if task not in (*known, "all"):
        raise UserError(f"--task={task} is none of {', '.join(known)}, all")


def tasks_for(task: str, known: Tasks, config: ConfigDict) -> Tasks:
    """The tasks that --task asks for: one, or for "all" those that fit a run of this config and do not run alone.

    Raises:
        UserError: the task does not fit.
    """
    kinds = {source.kind for source in (config.data.evaluate or config.data.train).values()}
    possible = {name: one for name, one in known.items() if one.fits(kinds)}
    if task != "all" and task not in possible:
        other = next(iter(possible))
        raise UserError(f"--task={task} does not fit this run, which saw {', '.join(kinds)}: try {other}")
    if task == "all":
        return {name: one for name, one in possible.items() if not one.alone}
    return {task: possible[task]}


@dataclasses.dataclass(frozen=True)
class Results:
    """`scores` go to JSON; `outcomes` hold what they were taken from, by task."""

    scores: dict[str, Any]
    outcomes: dict[str, Outcome]


def evaluate(model: Model, tasks: Tasks, amount: Amount, how: Mapping[str, Any]) -> Results:
    """Runs the tasks one after the other; `how` holds the arguments of `Model.draw`, `describe` among them."""
    outcomes: dict[str, Outcome] = {}
    seconds: dict[str, float] = {}
    for name, task in tasks.items():
        start = time.perf_counter()
        if outcome := task.run(model, amount, how):
            outcomes[name] = outcome
            seconds[name] = round(time.perf_counter() - start, 1)
    return Results({**{name: outcome.scores for name, outcome in outcomes.items()}, "seconds": seconds}, outcomes)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the numbers depend on."""
    packages = {"orbax": "orbax-checkpoint"}
    names = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(packages.get(name, name)) for name in names
    }


def number(value: float) -> str:
    """Three decimals; small numbers, such as pixel errors, to two significant figures."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def table(scores: Mapping[str, Any]) -> str:
    """The scores for a terminal: every number on a line of its own, indented below its group."""
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

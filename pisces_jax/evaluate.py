"""Scores a finished run.

python -m pisces_jax.evaluate --workdir=DIR --task=geneval|spread|reading|reconstruction|pictures|all [--out=F.json]
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command


def main() -> None:
    from pisces_jax.evaluation import suite
    from pisces_jax.inference.flags import add_drawing_flags, drawing_choice

    parser = cli.Parser(
        "evaluate",
        "Scores a finished run on unseen data: geneval (drawing), spread (of one prompt's pictures), reading and "
        "reconstruction in the shapes world, pictures for runs on real ones; all: whatever fits the run.",
        [
            "--workdir=runs/shapes --task=all --out=scores.json",
            "--workdir=runs/shapes --task=geneval --per_task=50 --images=4 --nodescribe",
            "--workdir=runs/cifar10 --task=pictures --out=scores.json --grid=pictures.png",
        ],
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where the model was trained")
    parser.add_argument("--run", default="", help="the run in it (default: the unified one that was finished last)")
    parser.add_argument("--task", required=True, help="geneval, spread, reading, reconstruction, pictures or all")
    parser.add_argument("--out", type=Path, metavar="F.json", help="a JSON file with every number that is printed")
    parser.add_argument("--grid", type=Path, metavar="F.png", help="a sheet of what was drawn and read, for the eye")
    parser.add_argument("--both", action="store_true", help="geneval: with descriptions and without")
    add_drawing_flags(parser)
    suite.add_amount_flags(parser)
    parser.add_argument("--batch_size", type=cli.whole_number(1), default=64, help="rows at a time (default 64)")
    flags = parser.parse()

    from pisces_jax.evaluation import report
    from pisces_jax.evaluation.grids import png
    from pisces_jax.inference.model import load_model
    from pisces_jax.training.input import evaluation_sources, training_sources

    if flags.task not in (*suite.TASKS, "all"):
        raise UserError(f"--task={flags.task} is none of {', '.join(suite.TASKS)}, all")
    for flag in ("out", "grid"):
        if getattr(flags, flag):
            cli.check_output(getattr(flags, flag), f"--{flag}", folder=False)
    cli.start()
    model = load_model(flags.workdir, flags.run, flags.batch_size)
    tasks = suite.tasks_for(flags.task, model.config)
    if flags.grid and not {"geneval", "pictures"} & set(tasks):
        raise UserError(f"--grid shows drawn pictures, and --task={flags.task} draws none: leave it out")
    sources: Sequence[Any] = ()
    training: Sequence[Any] = ()
    if "pictures" in tasks:
        sources, training = evaluation_sources(model.config), training_sources(model.config)
    how = drawing_choice(flags, model.config)
    amount = suite.amount(flags)
    results = suite.evaluate(model, tasks, amount, how, both=flags.both, sources=sources, training=training)
    scores = {"run": model.config.name, **results.scores}
    cli.say(suite.table(scores))
    if flags.out:
        scores |= {"amount": dataclasses.asdict(amount), "drawing": how, "versions": suite.versions()}
        cli.write_files(flags.out.parent, {flags.out.name: json.dumps(scores, indent=1).encode()}, "--out")
        cli.say(f"\nthe scores are in {flags.out}")
    if flags.grid:
        sheet = report.samples_sheet(results) if results.drawn else report.pictures_sheet(results.real)
        cli.write_files(flags.grid.parent, {flags.grid.name: png(sheet)}, "--grid")
        cli.say(f"the pictures are in {flags.grid}")


if __name__ == "__main__":
    run_command(main)

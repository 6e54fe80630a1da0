"""Scores a finished run, or a folder of pictures in GenEval's layout.

python -m pisces_jax.evaluate --workdir=DIR --task=geneval|spread|reading|reconstruction|pictures|judge|all [--out=F]
"""

import dataclasses
import json
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
        "reconstruction in the shapes world, pictures and judge (a classifier of true pictures) on real ones; all: "
        "whatever fits the run, but judge.",
        [
            "--workdir=runs/shapes --task=all --out=scores.json",
            "--workdir=runs/shapes --task=geneval --per_task=50 --images=4 --nodescribe",
            "--workdir=runs/cifar10 --task=pictures --out=scores.json --grid=pictures.png",
            "--workdir=runs/emoji --task=judge --pictures=400 --judge=runs/judge --out=scores.json --grid=drawn.png",
            "--folder=drawn --task=geneval --out=results.jsonl",
        ],
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=cli.path, metavar="DIR", help="where the model was trained")
    where.add_argument("--folder", type=cli.path, metavar="DIR", help="for --task=geneval: pictures of the shapes "
                       "world's prompts in GenEval's layout, as `generate --geneval` writes them")  # fmt: skip
    parser.add_argument("--run", default="", help="the run in --workdir (default: the unified one that finished last)")
    parser.add_argument("--task", required=True, help="geneval, spread, reading, reconstruction, pictures, judge, all")
    parser.add_argument("--out", type=cli.path, metavar="F.json", help="a JSON file with every number that is printed; "
                        "with --folder GenEval's results file, a line per picture")  # fmt: skip
    parser.add_argument("--grid", type=cli.path, metavar="F.png", help="a sheet of what was drawn and read, to look at")
    parser.add_argument("--both", action="store_true", help="geneval: with descriptions and without")
    suite.add_judge_flags(parser)
    add_drawing_flags(parser)
    suite.add_amount_flags(parser)
    parser.add_argument("--batch_size", type=cli.whole_number(1), default=64, help="rows at a time (default 64)")
    flags = parser.parse()

    from pisces_jax.data.images import png
    from pisces_jax.evaluation import geneval_folder, judging, pictures
    from pisces_jax.inference.model import load_model
    from pisces_jax.shapes_world import scores as shapes
    from pisces_jax.training.input import evaluation_sources, judged_sources, training_sources

    folder = flags.judge or (flags.workdir or Path()) / "judge"
    known = {
        **shapes.TASKS,
        "pictures": pictures.task(evaluation_sources, training_sources, {shapes.KIND}),
        "judge": judging.task(judged_sources, {shapes.KIND}, folder, flags.labels, flags.sets),
    }
    suite.check_name(flags.task, known)
    for flag in ("out", "grid"):
        if getattr(flags, flag):
            cli.check_output(getattr(flags, flag), f"--{flag}", folder=False)
    if flags.folder:
        if flags.task != "geneval" or flags.grid:
            raise UserError("--folder is scored with --task=geneval and without --grid: change these flags")
        scores, results_file = geneval_folder.score_folder(flags.folder, shapes.ShapesDetector())
        cli.say(suite.table(scores))
        if flags.out:
            _save(flags.out, results_file, "--out", "\nGenEval's results are")
        return
    cli.start()
    model = load_model(flags.workdir, flags.run, flags.batch_size)
    tasks = suite.tasks_for(flags.task, known, model.config)
    if flags.grid and not any(task.sheet for task in tasks.values()):
        raise UserError(f"--grid shows drawn pictures, and --task={flags.task} draws none: leave it out")
    how, amount = drawing_choice(flags, model.config), suite.amount(flags, both=flags.both)
    results = suite.evaluate(model, tasks, amount, how)
    whole: dict[str, Any] = {"run": model.config.name, **results.scores}
    cli.say(suite.table(whole))
    if flags.out:
        whole |= {"amount": dataclasses.asdict(amount), "drawing": how, "versions": suite.versions()}
        _save(flags.out, json.dumps(whole, indent=1).encode(), "--out", "\nthe scores are")
    if flags.grid:
        sheet = next(task.sheet(results.outcomes[name]) for name, task in tasks.items() if task.sheet)
        _save(flags.grid, png(sheet), "--grid", "the pictures are")


def _save(path: Path, content: bytes, flag: str, what: str) -> None:
    cli.write_files(path.parent, {path.name: content}, flag)
    cli.say(f"{what} in {path}")


if __name__ == "__main__":
    run_command(main)

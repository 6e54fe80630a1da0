"""The whole method on the shapes world: trains every stage, reads, draws, scores and reports.

python -m pisces_jax.demo --workdir=runs/shapes
"""

import json
import time

from pisces_jax.utils import cli
from pisces_jax.utils.errors import run_command


def main() -> None:
    rest, overrides = cli.split_overrides(cli.arguments())
    parser = cli.Parser(
        "demo",
        "Trains all stages of a config of the shapes world (finished stages are skipped, interrupted ones continue), "
        "scores the last, and writes scores.json, samples.png and report.html into the work directory.",
        ["--workdir=runs/shapes", "--workdir=runs/seed1 --config=configs/shapes.py --config.seed=1"],
    )
    parser.add_argument("--workdir", type=cli.path, default="runs/shapes", metavar="DIR", help="default runs/shapes")
    parser.add_argument("--config", default="configs/shapes.py", metavar="FILE", help="default configs/shapes.py")
    from pisces_jax.evaluation import suite

    suite.add_amount_flags(parser)
    flags = parser.parse(rest)
    from pisces_jax.data.images import png
    from pisces_jax.evaluation import report
    from pisces_jax.inference.flags import drawing_choice
    from pisces_jax.inference.model import load_model
    from pisces_jax.inference.samples import make_sampler
    from pisces_jax.shapes_world.scores import TASKS
    from pisces_jax.training.config_files import load_stages
    from pisces_jax.training.metrics import read_metrics
    from pisces_jax.training.stages import train_stages

    stages = load_stages(flags.config, overrides)
    cli.start()
    seconds = train_stages(stages, flags.workdir, make_sampler)

    cli.say("scoring: drawing, reading, reconstruction")
    start = time.perf_counter()
    model = load_model(flags.workdir, list(stages.values())[-1].name)
    how = drawing_choice(None, model.config)
    results = suite.evaluate(model, TASKS, suite.amount(flags, both=True), how)
    runs = {name: flags.workdir / config.name for name, config in stages.items()}
    metrics = {name: read_metrics(run) for name, run in runs.items()}
    files = {"samples.png": png(report.samples_sheet(results.outcomes["geneval"].drawn))}
    seconds["evaluation"] = round(time.perf_counter() - start, 1)
    seconds["total"] = round(sum(seconds.values()), 1)
    scores = {**results.scores, "seconds": seconds, "versions": suite.versions()}
    title = "Pisces in JAX: the shapes world"
    files["report.html"] = report.write_html(title, scores, results, runs, metrics).encode()
    files["scores.json"] = json.dumps(scores, indent=1).encode()
    cli.write_files(flags.workdir, files, "--workdir")
    cli.say(f"\n{report.summary(scores)}\n")
    cli.say(f"pictures: {flags.workdir / 'samples.png'}\nreport:   {flags.workdir / 'report.html'}")


if __name__ == "__main__":
    run_command(main)

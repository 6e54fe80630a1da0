"""Trains the runs of a config, in order, each from where it stands.

python -m pisces_jax.train --config=configs/X.py[:stage] --workdir=DIR [--config.key=value ...]
"""

import argparse
from collections.abc import Mapping

from pisces_jax.utils import cli, processes, stopping
from pisces_jax.utils.errors import run_command

STATUSES = """exit status:
  0    finished
  1    failed: the last line says why, and what to change
  75   stopped by a signal (SIGTERM, SIGINT): saved, unless it was stopped at once
  76   stuck: a step took longer than limits.step_seconds
  77   another process of the run is gone, or never came
After 75, 76 and 77 the same command continues the run."""


def main() -> None:
    rest, overrides = cli.split_overrides(cli.arguments())
    parser = cli.Parser(
        "train",
        "Trains one run, or all stages of a config in order. The same command continues what was interrupted. "
        "--config.key=value changes a value of the config; where it has stages, --config.stages.NAME.key=value "
        "changes one of them.",
        [
            "--config=configs/shapes.py --workdir=runs/shapes",
            "--config=configs/shapes.py:stage1 --workdir=runs/shapes",
            "--config=configs/shapes.py --workdir=runs/seed1 --config.seed=1 --config.stages.stage1.steps=400",
        ],
    )
    parser.add_argument("--config", required=True, metavar="FILE[:STAGE]", help="a file like those in configs/")
    parser.add_argument("--workdir", required=True, type=cli.path, metavar="DIR", help="where the runs are kept")
    cli.add_process_flags(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="try one of everything on this machine, say go, and leave nothing"
    )
    parser.add_argument(
        "--allow_changes", default="", metavar="KEY,...", help="config keys that may change in a run that goes on"
    )
    parser.add_argument(
        "--fallback", type=cli.path, metavar="DIR", help="takes the state if the work directory cannot be written"
    )
    parser.add_argument(
        "--debug_nans", action="store_true", help="look at every step, and name the first layer that gives NaN"
    )
    parser.epilog = f"{parser.epilog}\n\n{STATUSES}"
    flags = parser.parse(rest)
    with stopping.listening(command=True):
        _train(flags, overrides)


def _train(flags: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    processes.start(flags.coordinator, flags.processes, flags.process, flags.meet_seconds, flags.silent_seconds)
    from pisces_jax.inference.samples import make_sampler
    from pisces_jax.planning.preflight import preflight
    from pisces_jax.training.config_files import load_stages
    from pisces_jax.training.loop import Options
    from pisces_jax.training.stages import train_stages

    stages = load_stages(flags.config, overrides)
    cli.start()
    if not flags.dry_run:
        allowed = tuple(filter(None, flags.allow_changes.split(",")))
        train_stages(stages, flags.workdir, make_sampler, Options(allowed, flags.fallback, flags.debug_nans))
        return
    cli.check_output(flags.workdir, "--workdir", folder=True)
    for name, config in stages.items():
        if processes.primary():
            cli.say(f"{name}:")
        preflight(config, flags.workdir, lambda line: cli.say(line) if processes.primary() else None)


if __name__ == "__main__":
    run_command(main)

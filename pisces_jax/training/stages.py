"""The stages of a config in order: all are checked first, then each is trained from its latest checkpoint."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.sharding import make_mesh
from pisces_jax.training import flops, optimizer
from pisces_jax.training.config import part_settings, vit_config
from pisces_jax.training.config_files import Stages
from pisces_jax.training.loop import NOTHING_ELSE, Options, Sampler, train
from pisces_jax.training.programs import make_program
from pisces_jax.training.run_folder import is_finished
from pisces_jax.utils import cli, processes
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic
from pisces_jax.weights.diffusion_decoder import open_decoder
from pisces_jax.weights.folder import Folder
from pisces_jax.weights.sources import is_folder

log = logging.getLogger(__name__)


def train_stages(
    stages: Stages, workdir: Path, make_sampler: Callable[..., Sampler], options: Options = NOTHING_ELSE
) -> dict[str, float]:
    """Trains all stages that are not finished; returns the seconds that each took, interruptions included.

    Raises:
        UserError: a stage that cannot be trained; before the first one starts, wherever that can be known.
    """
    work = check_stages(stages, workdir)
    for i, (name, config) in enumerate(stages.items()):
        if len(stages) > 1:
            taken = [seconds_of(workdir / c.name) for c in list(stages.values())[:i]]
            cli.say(f"stage {i + 1} of {len(stages)}: {name}, {config.steps} steps{_outlook(taken, work)}")
        with _Stopwatch(workdir / config.name):
            train(config, workdir, make_sampler, options)
    return {name: seconds_of(workdir / config.name) for name, config in stages.items()}


def _outlook(taken: Sequence[float], work: Sequence[float]) -> str:
    """How long the remaining stages will take, if their FLOPs run as fast as those so far."""
    if not sum(taken):
        return ""
    to_come = sum(taken) * sum(work[len(taken) :]) / sum(work[: len(taken)])
    return f" ({sum(taken) / 60:.1f} min so far, about {to_come / 60:.0f} min of training to come)"


def check_stages(stages: Stages, workdir: Path) -> list[float]:
    """FLOPs of each stage. Reports what is wrong with any before the first one runs for minutes; writes nothing.

    Raises:
        UserError: settings that do not fit, or weights to start from that neither exist nor are trained before.
    """
    cli.check_output(workdir, "--workdir", folder=True)
    known: set[str] = set()
    work = []
    for name, config in stages.items():
        if config.steps < 1 or config.batch_size < 1:
            raise UserError(f"stage {name}: config keys steps and batch_size must be at least 1")
        if not config.name or Path(config.name).name != config.name:
            raise UserError(f"config key name {config.name!r} must be the name of a folder below --workdir")
        make_mesh(**config.mesh)
        program = make_program(config, config.data.tokenizer_vocabulary or 512)
        work.append(_flops(config, program))
        optimizer.learning_rate(config.optimizer, config.steps)
        sources = {**config.init_from, "decoder": config.decoder} if config.decoder else config.init_from
        for part, source in sources.items():
            if part == "decoder" and source == config.decoder and is_folder(source):
                open_decoder(source, vit_config(config, "generation_encoder").output_width)
            elif is_folder(source):
                # What depends on the tokenizer is checked when the run starts.
                folder = Folder.open(source, part)
                tokens = getattr(folder.settings, "vocab_size", 1)
                folder.check(part_settings(config, part, tokens), f"stage {name}: model.{part}")
            elif source and source not in known and not is_finished(workdir / source):
                raise UserError(
                    f"stage {name} takes its {part} from run {source!r}, which is not in --workdir={workdir} or not "
                    "finished: train it first"
                )
        known.add(config.name)
    return work


def _flops(config: ConfigDict, program: Any) -> float:
    table = optimizer.read_table(config.optimizer.param_groups)
    multiples = {
        part: next((rule.multiple for rule in table if re.fullmatch(rule.pattern, f"{part}/kernel")), 1.0)
        for part in config.model
    }
    trained = {part for part, multiple in multiples.items() if multiple}
    return config.steps * flops.step_flops(program, program.batch_spec(config), trained)


class _Stopwatch:
    """Adds the seconds spent inside to the run's `seconds.json`, also when interrupted."""

    def __init__(self, run: Path) -> None:
        self._run, self._finished = run, is_finished(run)

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if processes.primary() and not self._finished and (self._run / "config.json").exists():
            seconds = seconds_of(self._run) + time.perf_counter() - self._start
            try:
                write_atomic(self._run / "seconds.json", json.dumps({"seconds": round(seconds, 1)}))
            except OSError as error:  # it matters for nothing but what is said of the time
                log.warning("%s cannot be written: %s", error.filename, error.strerror)


def seconds_of(run: Path) -> float:
    """Seconds of training of a run, or 0 where that is not known."""
    try:
        seconds = float(json.loads((run / "seconds.json").read_text())["seconds"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0

"""A run's folder: its config, its lock, and whether a run may be started, continued or used.

    WORKDIR/tokenizer.model
    WORKDIR/NAME/config.json            the run's config; a folder without it is not a run
    WORKDIR/NAME/metrics.jsonl
    WORKDIR/NAME/events.jsonl           skipped batches, changed settings and the like (`health.py`)
    WORKDIR/NAME/owed                   the step that is saved and whose evaluation was interrupted
    WORKDIR/NAME/checkpoints/           the steps that it has saved (`steps.py`), each with a copy of config.json
    WORKDIR/NAME/.lock                  who writes the folder now

A config that was cut off is taken from the newest whole checkpoint.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.training import steps
from pisces_jax.training.old_configs import upgrade
from pisces_jax.training.steps import finished_step, folder_of
from pisces_jax.utils import locks
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic
from pisces_jax.utils.processes import primary, primary_first

# Keys that may differ between a run and its continuation: none of them changes its numbers.
_FREE_KEYS = ("log", "limits", "mesh", "profile", "sampling", "data.threads", "data.workers", "data.max_broken")
# Keys that a user may change in a run that goes on (`--allow_changes`): the state keeps its shape.
CHANGEABLE = (
    *(f"optimizer.{k}" for k in ("learning_rate", "warmup_steps", "final_rate", "b1", "b2", "eps", "clip")),
    "steps", "loss", "data.leave_out",
)  # fmt: skip


def check_run(workdir: Path, config: ConfigDict, allowed: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Checks that this run may be started or continued in its folder; writes nothing.

    Args:
        allowed: keys that may differ from the run's own config.

    Returns:
        By key the values before and now of those that do.

    Raises:
        UserError: the folder cannot be used, holds other files, or a run of another config.
    """
    run = workdir / config.name
    try:
        held = [path.name for path in run.iterdir()] if run.exists() else []
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if (saved := _saved_config(run)) is None:
        # A run that was killed while its config was written has nothing else yet; later there are checkpoints.
        if "checkpoints" not in held and any(name != steps.CONFIG and not _is_leftover(name) for name in held):
            raise UserError(f"{run} holds files that are not a run: choose another --workdir")
        if finished_step(run):
            raise UserError(
                f"{run} has checkpoints and no {steps.CONFIG} that can be read: write the run's config there as JSON, "
                "or choose another --workdir"
            )
        return {}
    before, now = json.loads(upgrade(saved).to_json()), json.loads(config.to_json())
    changed = [key for key in sorted(_differences(before, now)) if not _below(key, _FREE_KEYS)]
    may = [key for key in changed if _below(key, CHANGEABLE)]
    if refused := [key for key in changed if key not in may or not _below(key, allowed)]:
        allow = f", or allow the change (--allow_changes={','.join(may)})" if may == changed else ""
        raise UserError(
            f"{run} holds a run with another config ({', '.join(refused[:5])}): continue it with its own "
            f"config, or choose another --workdir{allow}"
        )
    return {key: (_value(before, key), _value(now, key)) for key in changed}


def _below(key: str, keys: Sequence[str]) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _is_leftover(name: str) -> bool:
    """Whether a file is a lock, or what `write_atomic` leaves when its process is killed."""
    return name == locks.NAME or re.fullmatch(r"\..+\.(json|jsonl)\..{8}", name) is not None


def open_run(workdir: Path, config: ConfigDict, allowed: Sequence[str] = ()) -> Path:
    """The folder of this run, checked by `check_run`, with its config written (again, where it was damaged or was
    changed)."""
    run = workdir / config.name
    with primary_first("open_run"):
        changed = check_run(workdir, config, allowed)
        if primary():
            try:
                if changed or _config_in(run) is None:
                    saved = None if changed else _saved_config(run)
                    saved = saved or json.loads(config.to_json())
                    write_atomic(run / steps.CONFIG, json.dumps(saved, indent=1))
                for path in run.iterdir():
                    if path.name != locks.NAME and _is_leftover(path.name):
                        path.unlink()
            except OSError as error:
                raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    return run


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run's folder while the block writes it (`utils.locks`); of several processes the first holds it for all.

    Raises:
        UserError: another command holds it, or it cannot be written; in all processes alike.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if primary():
            try:
                held.enter_context(locks.locked(run))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"--workdir={run.parent} cannot be used: {error.strerror}"
        if (problem := steps.of_any_process(problem)) is not None:
            raise UserError(problem)
        yield


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            name
            for key in {*a, *b}
            for name in _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if a == b else [prefix]


def _config_in(folder: Path) -> dict[str, Any] | None:
    """The config in a run's folder or in a checkpoint; None if it is missing or cut off."""
    try:
        found = json.loads((folder / steps.CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found else None


def _saved_config(run: Path) -> dict[str, Any] | None:
    """A run's config, from the newest whole checkpoint where its own file is missing or cut off; None without both."""
    if (found := _config_in(run)) is not None:
        return found
    for step in steps.saved_steps(run):
        folder = folder_of(run, step)
        if steps.flaw(folder, content=True) is None and (found := _config_in(folder)) is not None:
            steps.warn_once("%s cannot be read: the copy in %s is used", run / steps.CONFIG, folder)
            return found
    return None


def read_config(run: Path) -> ConfigDict:
    """The config that a run was started with, with today's keys (`old_configs`).

    Raises:
        UserError: the folder is not a run.
    """
    if (found := _saved_config(run)) is not None:
        try:
            return upgrade(found)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{run / steps.CONFIG} is not a run's config: {error}") from error
    if (run / steps.CONFIG).exists():
        raise UserError(f"{run / steps.CONFIG} cannot be read: write the run's config there as JSON, or train it anew")
    raise UserError(f"{run} is not a run: give the --workdir of a finished training")


def is_finished(run: Path, *, content: bool = False) -> bool:
    """Whether a run's last step is saved. Without `content`, the sizes of its files are checked and not their hashes;
    with it, all processes call this, and each checks a share."""
    step = finished_step(run)
    if not step or _saved_config(run) is None or step < read_config(run).steps:
        return False
    if content:
        try:
            with steps.verified(folder_of(run, step)):
                pass
        except steps.Damaged:
            return False
    return True

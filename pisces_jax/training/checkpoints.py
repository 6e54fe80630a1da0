"""A run's folder: its config, its checkpoints (Orbax), and weights taken from other runs.

    WORKDIR/tokenizer.model
    WORKDIR/NAME/config.json            the run's config; a folder without it is not a run
    WORKDIR/NAME/metrics.jsonl
    WORKDIR/NAME/checkpoints/STEP/      state (what the run changes) and iterator (its position)

A checkpoint holds what its run trains. Frozen parts are read again from the run or folder named in `config.init_from`.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from pisces_jax.training import optimizer
from pisces_jax.training.config import part_settings
from pisces_jax.training.old_configs import upgrade
from pisces_jax.training.step import State
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic
from pisces_jax.utils.processes import primary, primary_first
from pisces_jax.utils.units import gib
from pisces_jax.weights.folder import part_shapes, read_source
from pisces_jax.weights.sources import folder_mark, is_folder

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
        held = any(run.iterdir()) if run.exists() else False
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if not (run / "config.json").exists():
        if held:
            raise UserError(f"{run} holds files that are not a run: choose another --workdir")
        return {}
    before, now = json.loads(read_config(run).to_json()), json.loads(config.to_json())
    changed = [key for key in sorted(_differences(before, now)) if not _below(key, _FREE_KEYS)]
    if refused := [key for key in changed if not _below(key, allowed)]:
        may = ", or allow the change (--allow_changes)" if all(_below(key, CHANGEABLE) for key in refused) else ""
        raise UserError(
            f"{run} holds a run with another config ({', '.join(refused[:5])}): continue it with its own "
            f"config, or choose another --workdir{may}"
        )
    return {key: (_value(before, key), _value(now, key)) for key in changed}


def _below(key: str, keys: Sequence[str]) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def open_run(workdir: Path, config: ConfigDict, allowed: Sequence[str] = ()) -> Path:
    """The folder of this run, checked by `check_run`, with its config written."""
    run = workdir / config.name
    with primary_first("open_run"):
        changed = check_run(workdir, config, allowed)
        if primary() and (changed or not (run / "config.json").exists()):
            try:
                write_atomic(run / "config.json", json.dumps(json.loads(config.to_json()), indent=1))
            except OSError as error:
                raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    return run


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            name
            for key in {*a, *b}
            for name in _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if a == b else [prefix]


def read_config(run: Path) -> ConfigDict:
    """The config that a run was started with, with today's keys (`old_configs`).

    Raises:
        UserError: the folder is not a run.
    """
    try:
        return upgrade(json.loads((run / "config.json").read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{run} is not a run: give the --workdir of a finished training") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'config.json'} cannot be read: {error}") from error


def finished_step(run: Path) -> int:
    """The step of the latest complete checkpoint, or 0."""
    folder = run / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0) if folder.exists() else 0


def is_finished(run: Path) -> bool:
    return (run / "config.json").exists() and finished_step(run) >= read_config(run).steps


class Checkpoints:
    """Saves and restores the state of one run together with the position of its input.

    Args:
        keep: how many checkpoints stay.
        measured: frozen parts that the run measured itself (`Program.measured`): they are saved too.
    """

    def __init__(self, run: Path, keep: int, measured: Sequence[str] = ()) -> None:
        self.measured = measured
        self._folder = (run / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        )

    def save(self, step: int, state: State, iterator: Mapping[str, Any]) -> None:
        """Saves in the background; `close` waits for it.

        Raises:
            UserError: the disk is too full.
        """
        changed = self._changed(state)
        size = sum(x.nbytes for x in jax.tree.leaves(changed))
        free = shutil.disk_usage(self._folder).free
        if free < 1.1 * size:
            raise UserError(
                f"{self._folder} has {gib(free)} free and a checkpoint takes {gib(size)}: "
                "free some space and run the same command again"
            )
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(changed), iterator=ocp.args.JsonSave(dict(iterator)))
        self._manager.save(step, args=args)

    def restore(self, state: State) -> tuple[State, dict[str, Any]] | None:
        """The latest checkpoint, laid out as `state` (arrays, or abstract ones with shardings); None without one."""
        step = self._manager.latest_step()
        if step is None:
            return None
        target = self._changed(state)
        args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=args, iterator=ocp.args.JsonRestore()))
        values = restored["state"]
        frozen = {**state.frozen, **values.pop("measured", {})}
        return dataclasses.replace(state, ema=values.pop("average"), frozen=frozen, **values), restored["iterator"]

    def _changed(self, state: State) -> dict[str, Any]:
        # "average": the name on disk since the first checkpoints.
        changed = {"step": state.step, "trained": state.trained, "average": state.ema, "optimizer": state.optimizer}
        return changed | ({"measured": {part: state.frozen[part] for part in self.measured}} if self.measured else {})

    def saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits for the save in the background, and raises what it raised."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def part_mark(workdir: Path, name: str, part: str) -> str:
    """A hash that changes when the weights change that `load_part` gives, or a published folder of that name holds.

    Raises:
        UserError: the run or the folder is missing, or the run is unfinished.
    """
    if is_folder(name):
        return folder_mark(name)
    config, step = _finished(workdir, name)
    # Orbax gives a checkpoint's files random names and lists them here: a run trained again has another list.
    manifest = workdir / name / "checkpoints" / str(step) / "state" / "manifest.ocdbt"
    digest = hashlib.blake2b(f"{step} ".encode() + manifest.read_bytes(), digest_size=8)
    if source := config.init_from.get(part, ""):
        digest.update(part_mark(workdir, source, part).encode())
    return digest.hexdigest()


def _finished(workdir: Path, name: str) -> tuple[ConfigDict, int]:
    """A run's config and last step."""
    run = workdir / name
    config = read_config(run)
    if not is_finished(run):
        raise UserError(f"{run} is not finished ({finished_step(run)} of {config.steps} steps): train it first")
    return config, finished_step(run)


def load_part(workdir: Path, name: str, part: str) -> Any:
    """The weights of `part` as run `name` left them, as host arrays: trained there (their average, where the run keeps
    one), or where the run itself took them from.

    Raises:
        UserError: the run is missing or unfinished, or has no such part.
    """
    config, step = _finished(workdir, name)
    run = workdir / name
    path = run.absolute() / "checkpoints" / str(step) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(path).item_metadata.tree
    which = "measured" if part in tree.get("measured", {}) else "average" if tree.get("average") else "trained"
    kept = tree[which]
    flat: dict[str, Any] = {}
    if part in kept:
        wanted = {which: {part: kept[part]}}
        # As NumPy arrays: with their saved shardings they could be restored on as many devices only.
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        got = checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        )
        flat = optimizer.flatten(got[which][part])
    if source := config.init_from.get(part, ""):
        tokenizer = load_tokenizer(config, workdir) if part == "language_model" else None
        settings = part_settings(config, part, tokenizer.vocab_size if tokenizer else 0)
        # Of a part that was trained in part, the frozen parameters come from where the run took them.
        if settings is None or set(flat) != set(optimizer.flatten(part_shapes(settings))):
            if is_folder(source):
                start = read_source(source, settings, part, tokenizer.own_size if tokenizer else None)
            else:
                start = load_part(workdir, source, part)
            flat = {**optimizer.flatten(start), **flat}
    if not flat:
        raise UserError(f"{run} has no part {part!r}: it trained {', '.join(kept)}")
    return optimizer.unflatten(flat)

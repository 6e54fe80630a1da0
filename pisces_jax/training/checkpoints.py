"""Checkpoints of a run (Orbax), and weights taken from other runs.

    WORKDIR/NAME/checkpoints/STEP/      state (what the run changes), iterator (its position), a copy of config.json and
                                        the manifest of all these files (`steps.py`)

A checkpoint holds what its run trains. Frozen parts are read again from the run or folder named in `config.init_from`.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from pisces_jax.training import optimizer, steps
from pisces_jax.training.config import part_settings
from pisces_jax.training.run_folder import is_finished, read_config
from pisces_jax.training.step import State
from pisces_jax.training.steps import finished_step, folder_of
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils import manifests
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import synchronize
from pisces_jax.utils.processes import barrier, primary
from pisces_jax.utils.units import gib
from pisces_jax.weights.folder import part_shapes, read_source
from pisces_jax.weights.sources import folder_mark, is_folder

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores the state of one run together with the position of its input.

    A step is whole or not there: Orbax writes it under another name, then all its files are hashed, then it is renamed.

    Args:
        keep: how many of the last steps stay, or which (`steps.Keep`).
        measured: frozen parts that the run measured itself (`Program.measured`): they are saved too.
    """

    def __init__(self, run: Path, keep: int | steps.Keep, measured: Sequence[str] = ()) -> None:
        self.measured = measured
        self._run = run
        self._keep = keep if isinstance(keep, steps.Keep) else steps.Keep(keep)
        self._folder = (run / "checkpoints").absolute()
        # Made with the first save: a process of several that leaves one open hangs when it ends.
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._commit: threading.Thread | None = None
        self._failure: BaseException | None = None
        if primary():
            self._folder.mkdir(parents=True, exist_ok=True)
            steps.set_aside_interrupted(self._folder)

    def save(self, step: int, state: State, iterator: Mapping[str, Any]) -> None:
        """Saves in the background; `wait` and `close` wait for it. Raises what went wrong with the save before.

        Raises:
            UserError: the disk is too full.
        """
        self.wait()
        changed = self._changed(state)
        size = sum(x.nbytes for x in jax.tree.leaves(changed))
        free = shutil.disk_usage(self._folder).free
        if free < 1.1 * size:
            raise UserError(
                f"{self._folder} has {gib(free)} free and a checkpoint takes {gib(size)}: "
                "free some space and run the same command again"
            )
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(changed), iterator=ocp.args.JsonSave(dict(iterator)))
        saving = self._folder / f"{step}.saving"
        if self._orbax is None:
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._orbax.save(saving, args=args, force=True)
        self._commit = threading.Thread(target=self._finish, args=(self._orbax, step, saving), name="checkpoint")
        self._commit.start()

    def _finish(self, orbax: ocp.AsyncCheckpointer, step: int, saving: Path) -> None:
        """Waits until all processes have written their files, then makes the step appear."""
        try:
            orbax.wait_until_finished()
            if primary():
                if (self._run / steps.CONFIG).exists():
                    shutil.copyfile(self._run / steps.CONFIG, saving / steps.CONFIG)
                manifests.write_manifest(saving, {"step": step})
                os.rename(saving, folder_of(self._run, step))
                with contextlib.suppress(OSError):  # some storage has no such thing for folders
                    synchronize(self._folder)
                steps.delete_others(self._run, self._keep)
        except BaseException as error:  # for the thread that saves next
            self._failure = error

    def saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._commit is not None and self._commit.is_alive()

    def wait(self) -> None:
        """Returns when the last save is finished; raises what went wrong with it, once."""
        if self._commit is not None:
            self._commit.join()
            self._commit = None
        failed, self._failure = self._failure, None
        if failed is not None:
            raise failed

    def restore(self, state: State) -> tuple[State, dict[str, Any]] | None:
        """The newest step that is what was written, with its data position; None without one.

        Arrays go from storage into the shards of `state`, which are arrays or abstract ones with shardings; frozen
        parts are those of `state`. Damaged steps are said and set aside.
        """
        self.wait()
        while step := steps.of_first_process(next(iter(steps.saved_steps(self._run)), 0)):
            folder, words = folder_of(self._run, step), ""
            with steps.quietly():
                try:
                    return self._read(folder, state)
                except steps.Damaged as error:
                    words = str(error)
            steps.set_aside(folder, words)
            barrier("set aside")
            left = steps.of_first_process(finished_step(self._run))
            if primary():
                begin = f"from step {left}" if left else "from the start: there is no other checkpoint"
                log.warning("%s goes on %s", self._run, begin)
        return None

    def _read(self, folder: Path, state: State) -> tuple[State, dict[str, Any]]:
        target = self._changed(state)
        with steps.verified(folder):
            values = read_arrays(folder / "state", target)
            position = json.loads((folder / "iterator" / "metadata").read_text())
        frozen = {**state.frozen, **values.pop("measured", {})}
        return dataclasses.replace(state, ema=values.pop("average"), frozen=frozen, **values), position

    def _changed(self, state: State) -> dict[str, Any]:
        # "average": the name on disk since the first checkpoints.
        changed = {"step": state.step, "trained": state.trained, "average": state.ema, "optimizer": state.optimizer}
        return changed | ({"measured": {part: state.frozen[part] for part in self.measured}} if self.measured else {})

    def close(self) -> None:
        """Waits for the last save; raises what went wrong with it."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None


def read_arrays(path: Path, target: Any, *, partial: bool = False) -> Any:
    """The arrays of an Orbax folder, straight into the shards of `target`: arrays, abstract ones with shardings, or
    `ocp.PLACEHOLDER` for what is not read.

    Beside the result, little memory is used: the size of its largest array, or a twentieth of the whole.

    Args:
        partial: `target` has some of the arrays only.
    """
    wanted = [x for x in jax.tree.leaves(target) if x is not ocp.PLACEHOLDER]
    sizes = [math.prod(x.shape) * max(x.dtype.itemsize, 4) for x in wanted]
    at_once = max(sum(sizes) / 20, 1.1 * max(sizes, default=0), 2**20) / 1e9
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=at_once)) as orbax:
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=partial)
        return orbax.restore(path, args=args)


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
        flaws = {step: steps.flaw(folder_of(run, step)) for step in steps.saved_steps(run)}
        damaged = "".join(f"; checkpoint {step} is damaged: {words}" for step, words in flaws.items() if words)
        done = f"{finished_step(run)} of {config.steps} steps{damaged}"
        raise UserError(f"{run} is not finished ({done}): train it first")
    return config, finished_step(run)


def load_part(
    workdir: Path, name: str, part: str, like: Mapping[str, Any] | None = None, only: Collection[str] | None = None
) -> Any:
    """The weights of `part` as run `name` left them: trained there (their average, where the run keeps one), or where
    the run itself took them from.

    Args:
        like: the part's tree as abstract arrays with shardings: each shard is then read where it belongs, in the dtype
            of `like`. Without it, whole arrays are read into the host's memory.
        only: with `like`, the names of the parameters to read.

    Raises:
        UserError: the run is missing, unfinished or damaged, has no such part, or `like` has other shapes.
    """
    config, step = _finished(workdir, name)
    run, folder = workdir / name, folder_of(workdir / name, step)
    source = config.init_from.get(part, "")
    goal = None if like is None else optimizer.flatten(like)
    names = goal if only is None else only
    words = None
    with steps.quietly():
        try:
            with steps.verified(folder):
                flat, held, parts = _read_held(run, folder / "state", part, goal, names, alone=not source)
        except steps.Damaged as error:
            words = str(error)
    if words is not None:
        raise UserError(_without(run, folder, words))
    if source:
        tokenizer = load_tokenizer(config, workdir) if part == "language_model" else None
        settings = part_settings(config, part, tokenizer.vocab_size if tokenizer else 0)
        # Of a part that was trained in part, the frozen parameters come from where the run took them.
        if goal is None:
            lacking = None
            complete = settings is not None and held == set(optimizer.flatten(part_shapes(settings)))
        else:
            assert names is not None
            lacking = set(names) - held
            complete = not lacking
        if not complete:
            if is_folder(source):
                start = read_source(source, settings, part, tokenizer.own_size if tokenizer else None, like, lacking)
            else:
                start = load_part(workdir, source, part, like, lacking)
            flat = {**optimizer.flatten(start), **flat}
    if not flat and not held:
        raise UserError(f"{run} has no part {part!r}: it trained {', '.join(parts)}")
    return optimizer.unflatten(flat)


def _read_held(
    run: Path, path: Path, part: str, goal: Mapping[str, Any] | None, names: Collection[str] | None, *, alone: bool
) -> tuple[dict[str, Any], set[str], list[str]]:
    """The parameters of `part` that a checkpoint has: those read, by name; the names of all; the parts that it has.

    Raises:
        UserError: their shapes are not those of `goal`, or (`alone`) some of `names` are missing.
    """
    tree = ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree
    which = "measured" if part in tree.get("measured", {}) else "average" if tree.get("average") else "trained"
    held = optimizer.flatten(tree[which].get(part, {}))
    if goal is None:
        # As NumPy arrays: with their saved shardings they could be restored on as many devices only.
        targets = {name: np.broadcast_to(np.zeros((), each.dtype), each.shape) for name, each in held.items()}
    else:
        needed = {*held, *(names or ())} if alone and held else set(held)
        pairs = [
            (k, getattr(held.get(k), "shape", "missing"), getattr(goal.get(k), "shape", "nothing")) for k in needed
        ]
        if wrong := [f"{part}/{k} {a} for {b}" for k, a, b in sorted(pairs) if a != b]:
            raise UserError(f"{run} does not fit model.{part}: {'; '.join(wrong)}")
        targets = {name: goal[name] for name in held if names is None or name in names}
    if not targets:
        return {}, set(held), list(tree[which])
    got = read_arrays(path, {which: {part: optimizer.unflatten(targets)}}, partial=True)
    return optimizer.flatten(got[which][part]), set(held), list(tree[which])


def _without(run: Path, folder: Path, words: str) -> str:
    """Sets a damaged step of a finished run aside, where that can be; returns what the user is to do."""
    try:
        place = f"is set aside as {steps.set_aside(folder, words)}"
    except OSError as error:
        place = f"is not used (and cannot be set aside: {error.strerror})"
    barrier("set aside")
    return f"{folder} is damaged ({words}) and {place}: train {run.name} again, from its newest whole checkpoint"

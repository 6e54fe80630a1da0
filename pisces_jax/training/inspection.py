"""Looks at saved steps: which there are, whether they are whole, what they hold, how two of them differ."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from pisces_jax.sharding import path_name
from pisces_jax.training import steps
from pisces_jax.training.checkpoints import read_arrays
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.units import gib

AT_ONCE = 2**30  # bytes of arrays in memory


class Listed(NamedTuple):
    """A saved step. `state` is "whole", "unchecked" (from before there were manifests) or what is wrong with it."""

    folder: Path
    state: str

    @property
    def damaged(self) -> bool:
        return self.state not in ("whole", "unchecked")

    def __str__(self) -> str:
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.folder.stat().st_mtime))
        return f"{self.folder}  {gib(sum(p.stat().st_size for p in paths))}  {when}  {self.state}"


def listed(path: Path, *, content: bool = False) -> Iterator[Listed]:
    """The steps below `path`: a work directory, a run's folder or a step's. `content`: all their bytes are checked.

    Raises:
        UserError: there are none.
    """
    folders = [path] if steps.is_step(path) else []
    for run in [] if folders else [path, *sorted(p for p in path.glob("*") if p.is_dir())]:
        folders += [steps.folder_of(run, step) for step in steps.saved_steps(run)]
    if not folders:
        raise UserError(f"{path} holds no checkpoints: give a work directory, a run's folder or a checkpoint")
    for folder in folders:
        old = "unchecked" if steps.is_old(folder) else "whole"
        yield Listed(folder, steps.flaw(folder, content=content) or old)


def step_of(path: Path) -> Path:
    """The folder of one step: `path` itself, or the newest whole one of a run.

    Raises:
        UserError: there is none.
    """
    if steps.is_step(path):
        return path.absolute()
    if not (step := steps.finished_step(path)):
        raise UserError(f"{path} is neither a checkpoint nor a run with one")
    return steps.folder_of(path, step)


def arrays(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a step with their names, in host memory; some at a time.

    Raises:
        UserError: the step is damaged.
    """
    if (words := steps.flaw(folder, content=True)) is not None:
        raise UserError(f"{folder} is damaged: {words}")
    tree = ocp.PyTreeCheckpointer().metadata(folder / "state").item_metadata.tree
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    start = 0
    while start < len(leaves):
        stop, size = start, 0
        while stop < len(leaves) and (stop == start or size + _bytes(leaves[stop][1]) <= AT_ONCE):
            size += _bytes(leaves[stop][1])
            stop += 1
        wanted = [_empty(each) if start <= i < stop else ocp.PLACEHOLDER for i, (_, each) in enumerate(leaves)]
        got = jax.tree.leaves(read_arrays(folder / "state", jax.tree.unflatten(structure, wanted)))
        got = [x for x in got if x is not ocp.PLACEHOLDER]
        yield from zip((path_name(path) for path, _ in leaves[start:stop]), got, strict=True)
        start = stop


def _bytes(of: Any) -> int:
    return math.prod(of.shape) * np.dtype(of.dtype).itemsize


def _empty(of: Any) -> np.ndarray:
    """An array of that shape and dtype that takes no memory."""
    return np.broadcast_to(np.zeros((), of.dtype), of.shape)


def shown(folder: Path) -> Iterator[str]:
    """A line for each array of a step: its shape, dtype and Euclidean norm."""
    for name, array in arrays(folder):
        norm = np.linalg.norm(np.asarray(array, np.float64).ravel())
        yield f"{name}  {list(array.shape)}  {array.dtype}  norm {norm:.6g}"


def compared(folder: Path, other: Path) -> Iterator[tuple[str, float]]:
    """For each array, the largest difference between two steps: infinite where shapes differ or one lacks the array."""
    ours, theirs = arrays(folder), arrays(other)
    left: dict[str, np.ndarray] = {}
    right: dict[str, np.ndarray] = {}
    more = True
    while more:  # their orders are the same unless their trees differ
        more = False
        for held, source in (left, ours), (right, theirs):
            for name, array in source:
                held[name] = array
                more = True
                break
        for name in [name for name in left if name in right]:
            yield name, _difference(left.pop(name), right.pop(name))
    for name in sorted({*left, *right}):
        yield name, math.inf


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if np.array_equal(a, b) or not a.size:
        return 0.0
    difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    both = np.asarray(np.isnan(np.asarray(a, np.float64)) & np.isnan(np.asarray(b, np.float64)))
    return float(np.nan_to_num(np.where(both, 0.0, difference), nan=math.inf, posinf=math.inf).max())


def copy(folder: Path, out: Path) -> None:
    """Copies a step into the new folder `out`, which appears when every byte of the copy has been checked.

    Raises:
        UserError: the step is damaged or has no manifest, `out` exists, or the copy is not the same.
    """
    if out.exists():
        raise UserError(f"--out={out} exists: give a new folder")
    if steps.is_old(folder):
        raise UserError(f"{folder} was saved before checkpoints had manifests: a copy cannot be checked, so use cp")
    making = out.with_name(f".{out.name}.copying")
    shutil.rmtree(making, ignore_errors=True)
    try:
        shutil.copytree(folder, making)
        if (words := steps.flaw(making, content=True)) is not None:
            whose = "is damaged" if steps.flaw(folder, content=True) else "could not be copied unchanged"
            raise UserError(f"{folder} {whose}: {words}")
        os.rename(making, out)
    finally:
        shutil.rmtree(making, ignore_errors=True)

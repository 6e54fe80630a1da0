"""The steps that a run has saved: which are whole, which are damaged, and which stay.

    RUN/checkpoints/60/                a saved step
    RUN/checkpoints/60.saving*/        one that is being written
    RUN/checkpoints/damaged-60/        one that was found damaged; it is never deleted
    RUN/checkpoints/interrupted-60/    what a save left that was interrupted; deleted when the next step is whole

A rename makes a step appear when all its files are there; the last one is the manifest (`utils/manifests.py`).
"""

import contextlib
import gc
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from pisces_jax.training.metrics import read_metrics
from pisces_jax.utils import manifests
from pisces_jax.utils.errors import UserError, cut
from pisces_jax.utils.processes import primary

log = logging.getLogger(__name__)
CONFIG = "config.json"  # each step has a copy of its run's
_STEP = re.compile(r"[1-9][0-9]*|0")
_LEFTOVER = re.compile(r"(\d+)\.(saving|orbax-checkpoint-tmp).*")  # the second: from before there were manifests
_WORDS = 1000  # bytes of a sentence that processes exchange


class Damaged(Exception):
    """A saved step that is not what was written; the message says what is wrong, with the name of the file."""


def folder_of(run: Path, step: int) -> Path:
    return (run / "checkpoints" / str(step)).absolute()


def saved_steps(run: Path) -> list[int]:
    """All steps with a folder, damaged or not, the newest first."""
    return sorted((int(p.name) for p in (run / "checkpoints").glob("*") if _STEP.fullmatch(p.name)), reverse=True)


def is_step(folder: Path) -> bool:
    """Whether a folder is a saved step, under any name."""
    return (folder / manifests.MANIFEST).is_file() or (folder / "state").is_dir()


def finished_step(run: Path) -> int:
    """The newest step whose files are all there and of the right size, or 0."""
    return next((step for step in saved_steps(run) if flaw(folder_of(run, step)) is None), 0)


def is_old(folder: Path) -> bool:
    """Whether a step was saved before there were manifests: then it has no copy of the config either."""
    return not (folder / manifests.MANIFEST).exists() and not (folder / CONFIG).exists() and _held(folder / "state")


def _held(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _files(folder: Path) -> dict[str, Any]:
    """The files of the manifest.

    Raises:
        Damaged: it is missing or damaged.
    """
    try:
        return manifests.read_manifest(folder)["files"]
    except FileNotFoundError as error:
        raise Damaged(f"{manifests.MANIFEST} is missing" if _held(folder) else "the folder is empty") from error
    except OSError as error:
        raise Damaged(f"{manifests.MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Damaged(f"{manifests.MANIFEST} is damaged") from error


def flaw(folder: Path, *, content: bool = False) -> str | None:
    """What is wrong with a saved step, in words; None if nothing is. Without `content`, files' sizes alone are checked.

    A step from before there were manifests passes.
    """
    if is_old(folder):
        return None
    try:
        files = _files(folder)
    except Damaged as error:
        return str(error)
    return manifests.wrong_size(folder, files) or (manifests.wrong_content(folder, files) if content else None)


# Steps that this process has checked already, with the sizes and times of their files: parts are read one by one.
_checked: set[tuple[Any, ...]] = set()
_said: set[tuple[str, ...]] = set()


def warn_once(message: str, *values: object) -> None:
    """A warning that this process gives once for the same values."""
    if (key := (message, *map(str, values))) not in _said:
        _said.add(key)
        log.warning(message, *values)


def _signature(folder: Path, files: dict[str, Any]) -> tuple[Any, ...]:
    stats = ((folder / name).stat() for name in files)
    return folder, *((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats)


@contextlib.contextmanager
def verified(folder: Path) -> Iterator[None]:
    """Checks a saved step against its manifest while the block reads it.

    Of several processes each checks its share of the files, before any of them reads: one that met a damaged file
    while the others did not would leave them waiting.

    Raises:
        Damaged: the step is not what was written, and what the block read must not be used; in all processes alike.
    """
    if is_old(folder):
        warn_once("%s was saved before checkpoints had manifests: it is used unchecked", folder)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise Damaged(f"it cannot be read: {cut(' '.join(str(error).split()), 100)}") from error
        return
    count, index = jax.process_count(), jax.process_index()
    problem, files = None, dict[str, Any]()
    try:
        files = _files(folder)
        problem = manifests.wrong_size(folder, files)
    except Damaged as error:
        problem = str(error)
    signature = () if problem else _signature(folder, files)
    if of_any_process(None if signature in _checked else "unchecked") is None:
        yield
        return
    small = [name for name, (size, _) in files.items() if size < manifests.SMALL]
    large = [name for name in files if name not in small]
    _raise_if(problem or manifests.wrong_content(folder, files, small[index::count]), folder)
    failure = None
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(manifests.wrong_content, folder, files, large[index::count])
        if count > 1:
            _raise_if(checked.result(), folder)
        try:
            yield
        except Exception as error:  # of the storage library, if a file is damaged
            failure = error
        problem = checked.result()
    if count == 1 and problem:
        raise Damaged(problem) from failure
    if failure is not None:
        raise failure
    _checked.add(signature)


def of_first_process(number: int) -> int:
    """The number that process 0 has. All processes call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """For a block that reads what may be damaged, and lets no `Damaged` out: what the storage library was still doing
    when a file failed would complain on the terminal, with tracebacks, when Python collects it. Its own threads may end
    later still: their complaint that nobody listens any more stays unsaid for good."""
    previous, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = previous if isinstance(previous, _WithoutLate) else _WithoutLate(previous)


class _WithoutLate:
    """A hook for unraisable exceptions without those of reads that end after their event loop."""

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._hook(unraisable)


def _raise_if(problem: str | None, folder: Path) -> None:
    if (problem := of_any_process(problem)) is not None:
        raise Damaged(problem)


def of_any_process(words: str | None) -> str | None:
    """The first words that any process has; None if none has. All processes call it."""
    if jax.process_count() == 1:
        return words
    mine = np.frombuffer((words or "").encode()[:_WORDS].ljust(_WORDS, b"\0"), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, _WORDS)
    return next((bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered if row.any()), None)


def set_aside(folder: Path, reason: str) -> str:
    """Renames a damaged step; returns its new name. Only the first of several processes does it.

    Raises:
        OSError: it cannot be renamed.
    """
    name = _free_name(folder.parent, f"damaged-{folder.name}")
    if primary():
        os.rename(folder, folder.parent / name)
        log.warning("%s is damaged (%s): it is set aside as %s and not used", folder, reason, name)
    return name


def _free_name(folder: Path, name: str) -> str:
    taken = {path.name for path in folder.iterdir()}
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def set_aside_interrupted(checkpoints: Path) -> None:
    """Renames what saves have left that were interrupted."""
    for path in sorted(checkpoints.glob("*")):
        if found := _LEFTOVER.fullmatch(path.name):
            name = _free_name(checkpoints, f"interrupted-{found[1]}")
            os.rename(path, checkpoints / name)
            log.warning("%s was left by an interrupted save: it is set aside as %s until the next is whole", path, name)


class Keep(NamedTuple):
    """Which steps stay: the last `last`, multiples of `every` (0: none), and the one with the lowest `best`, a name in
    metrics.jsonl ("": none). What one of them keeps, no other deletes."""

    last: int = 1
    every: int = 0
    best: str = ""

    def stay(self, run: Path, steps: list[int]) -> set[int]:
        """Those of `steps` (the newest first) that stay."""
        stay = set(steps[: max(self.last, 1)])
        if self.every:
            stay |= {step for step in steps if step % self.every == 0}
        if self.best:
            values = {e["step"]: e[self.best] for e in read_metrics(run) if self.best in e}
            known = [step for step in steps if math.isfinite(values.get(step, math.nan))]
            stay |= set(sorted(known, key=lambda step: (values[step], -step))[:1])
        return stay


def delete_others(run: Path, keep: Keep) -> None:
    """Deletes the steps that need not stay, and what interrupted saves left. Damaged ones stay, under any name."""
    checkpoints = run / "checkpoints"
    whole = [step for step in saved_steps(run) if flaw(folder_of(run, step)) is None]
    for step in set(whole) - keep.stay(run, whole):
        # Renamed first, so that a deletion that is interrupted does not look like damage.
        os.rename(checkpoints / str(step), checkpoints / _free_name(checkpoints, f"interrupted-{step}"))
    for path in checkpoints.glob("interrupted-*"):
        shutil.rmtree(path, ignore_errors=True)

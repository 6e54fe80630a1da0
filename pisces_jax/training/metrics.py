"""What a run measures: averages taken on the device, written as JSON lines and, on request, for TensorBoard."""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu.metrics import Average

from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic
from pisces_jax.utils.processes import primary

log = logging.getLogger(__name__)


def merge(parts: Sequence[Mapping[str, Average]]) -> dict[str, float]:
    """The averages of several steps as one number each. Averages of nothing are left out."""
    parts = jax.device_get(list(parts))
    totals: dict[str, list[float]] = {}
    for part in parts:
        for name, average in part.items():
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0] += float(average.total)
            entry[1] += float(average.count)
    return {name: total / count for name, (total, count) in totals.items() if count > 0}


def check_finite(values: Mapping[str, float], first: int, last: int) -> None:
    """Checks the averages of the steps between `first` and `last`.

    Raises:
        UserError: names what is infinite or NaN, and the steps.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} became infinite or NaN between steps {first} and {last}: lower optimizer.learning_rate "
            "or optimizer.clip; the last checkpoint is untouched"
        )


class Clock:
    """Where the time of a run goes: whatever is not counted under a cause is time in steps.

    Waiting for input counts in full, even where the device was still busy with the previous step.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, cause: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[cause] = self._seconds.get(cause, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """`goodput`: the share of the time so far that went into steps; `lost/CAUSE`: the share of each cause."""
        total = time.perf_counter() - self._start
        lost = {f"lost/{cause}": seconds / total for cause, seconds in self._seconds.items()}
        return {"goodput": 1.0 - sum(lost.values()), **lost}


class Writer:
    """Appends to metrics.jsonl. Only the first of several processes writes.

    A run may continue from a checkpoint older than its last line: lines after `step` are dropped.

    Raises:
        UserError: TensorBoard without TensorFlow.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool) -> None:
        self._path = run / "metrics.jsonl"
        self._unwritten: list[str] = []
        self._summary: Any = None
        self._writes = primary()
        if not self._writes:
            return
        if self._path.exists():
            kept = [json.dumps(entry) + "\n" for entry in read_metrics(run) if entry["step"] <= step]
            write_atomic(self._path, "".join(kept))
        if tensorboard:
            try:
                from clu import metric_writers  # imports TensorFlow
            except ImportError as error:
                raise UserError(
                    "log.tensorboard needs TensorFlow: install pisces-jax[tensorboard], or set it to False: "
                    "metrics.jsonl holds the same numbers"
                ) from error
            self._summary = metric_writers.SummaryWriter(str(run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writes:
            return
        self._unwritten.append(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")
        self._write()
        if self._summary is not None:
            self._summary.write_scalars(step, dict(values))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        if self._summary is not None:
            self._summary.write_images(step, {name: image[None]})

    def _write(self) -> None:
        """Appends the lines so far, all or none: where the disk refuses, they wait for the next time."""
        size = None
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                whole = "".join(self._unwritten).encode()
                if file.write(whole) != len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = []
        except OSError as error:
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(self._path, size)
            if len(self._unwritten) == 1:
                log.warning("%s cannot be written (%s): its lines wait", self._path, error.strerror)

    def close(self) -> None:
        if self._unwritten:
            self._write()
        if self._unwritten:
            log.warning("%s could not be written: its last %d lines are lost", self._path, len(self._unwritten))
        if self._summary is not None:
            self._summary.close()


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The entries of a run's metrics.jsonl in order, without lines that are no entries: cut off when the run was
    killed, or damaged."""
    entries = read_json_lines(run / "metrics.jsonl")
    return [entry for entry in entries if all(map(_is_number, entry.values()))]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, that say their `step`; others are passed over. Empty without the file."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Bad numbers in a run: which steps were skipped and with which examples, loss spikes, and when to go back.

The compiled step skips a batch whose loss or gradient is not finite by itself (`step.Trainer`). What is decided here
follows from the metrics of the steps and from nothing else, so a run that is killed and continued decides the same.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu.metrics import Average
from ml_collections import ConfigDict

from pisces_jax.training.metrics import merge, read_json_lines
from pisces_jax.training.step import SKIPPED
from pisces_jax.utils.errors import UserError, listed
from pisces_jax.utils.files import write_atomic
from pisces_jax.utils.processes import primary

log = logging.getLogger(__name__)
Measured = Mapping[str, Average]


class Events:
    """RUN/events.jsonl: what happened to a run, a line each: `step`, `event`, and what belongs to it.

    Args:
        step: that the run continues from: events after it will happen again, and are dropped. What a user did stays.
    """

    BY_USER = "changed"

    def __init__(self, run: Path, step: int = 0) -> None:
        self._path = run / "events.jsonl"
        if not primary() or not self._path.exists():
            return
        kept = [e for e in read_events(run) if e["step"] <= step or e["event"] == self.BY_USER]
        write_atomic(self._path, "".join(json.dumps(e) + "\n" for e in kept))

    def __call__(self, step: int, event: str, **what: Any) -> None:
        """Appends an event. Where the disk refuses, the log has said it all the same."""
        if not primary():
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "event": event, **what}) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)

    def report(self, step: int, event: str, what: str, bad: Sequence[str], examples: Callable[[], list[str]]) -> None:
        """Says which numbers of a batch are not finite, and which examples it holds."""
        if not primary():
            return
        names = examples()
        self(step, event, not_finite=list(bad), examples=names)
        log.warning(
            "step %d: %s is left out: %s became infinite or NaN; it holds %s (events.jsonl has all)",
            step, what, ", ".join(bad), listed(names),
        )  # fmt: skip


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run in order, without lines that were cut off."""
    return [event for event in read_json_lines(run / "events.jsonl") if isinstance(event.get("event"), str)]


def skipped(measured: Measured) -> dict[str, Average]:
    """What the step says of itself: by loss whether it was not finite."""
    return {k.removeprefix(SKIPPED): v for k, v in measured.items() if k.startswith(SKIPPED)}


def not_finite(measured: Measured) -> list[str]:
    """The averages of a batch that are infinite or NaN."""
    return [k for k, v in measured.items() if not math.isfinite(v.total)]


class Health:
    """Looks at the metrics of finished steps, in order.

    Args:
        limits: the config's key `limits`.
        weights: of the losses.
        named: the examples of the batch of a step.
        in_a_row: how many steps just before were skipped, as the checkpoint says.
    """

    def __init__(
        self, limits: ConfigDict, weights: Mapping[str, float], events: Events, named: Callable[[int], list[str]],
        in_a_row: int = 0,
    ) -> None:  # fmt: skip
        self._limits, self._weights, self._events, self._named = limits, weights, events, named
        self.in_a_row = in_a_row
        self._window: list[tuple[int, Measured, bool]] = []

    def look(self, steps: Sequence[tuple[int, Measured]]) -> int | None:
        """Takes the metrics of these steps in. None, or the step at which `limits.bad_steps` in a row were bad."""
        for number, measured in jax.device_get(list(steps)):
            bad = [name for name, flag in skipped(measured).items() if flag.total]
            plain = {k: v for k, v in measured.items() if not k.startswith(SKIPPED)}
            self._window.append((number, plain, bool(bad)))
            if not bad:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self._events.report(number, "skipped", "its batch", bad, functools.partial(self._named, number))
            if 0 < self._limits.bad_steps <= self.in_a_row:
                return number
        return None

    def since(self) -> dict[str, float]:
        """The averages since the last line of the log."""
        return merge([m for _, m, _ in self._window])

    def window(self) -> tuple[list[Measured], dict[str, float]]:
        """The metrics of the steps since the last line of the log, and how many were skipped or are spikes."""
        steps, self._window = self._window, []
        counts = {"skipped": sum(bad for _, _, bad in steps), "spikes": 0}
        losses = np.array([self._loss(measured) for _, measured, _ in steps])
        if self._limits.spike and np.isfinite(losses).any():
            middle = float(np.nanmedian(losses))
            for i in np.flatnonzero(losses > self._limits.spike * middle):
                self._events(steps[i][0], "spike", loss=float(f"{losses[i]:.6g}"), median=float(f"{middle:.6g}"))
                counts["spikes"] += 1
        return [measured for _, measured, _ in steps], {k: float(n) for k, n in counts.items() if n}

    def went_back(self, bad: int, to: int) -> None:
        """Forgets the steps up to `bad`: the state is that of step `to` again, and their batches are passed over."""
        self._window, self.in_a_row = [], 0
        self._events(bad, "went_back", to=to)
        log.warning(
            "%d steps in a row up to step %d were skipped: the run goes on with the state of step %d, after their "
            "batches", self._limits.bad_steps, bad, to,
        )  # fmt: skip

    def report(self, number: int, went_back: bool) -> UserError:
        """Why a run stops."""
        again = "also after the run went back to its last checkpoint" if went_back else "and there is no checkpoint yet"
        return UserError(
            f"the {self._limits.bad_steps} steps up to {number} all gave infinite or NaN losses or gradients, {again}: "
            "look at their examples in events.jsonl, find the layer with --debug_nans, or lower "
            "optimizer.learning_rate or optimizer.clip (--allow_changes=optimizer.learning_rate)"
        )

    def _loss(self, measured: Measured) -> float:
        """The objective of a step; NaN for one that was skipped."""
        got = [(weight, measured[k]) for k, weight in self._weights.items() if weight and k in measured]
        values = [weight * float(v.total) / float(v.count) for weight, v in got if v.count]
        return sum(values) if values else math.nan

"""Saves on storage that may be full, read-only, gone, or never answer: the run goes on, and says so."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pisces_jax.training.checkpoints import Checkpoints
from pisces_jax.training.step import State
from pisces_jax.utils import errors
from pisces_jax.utils.errors import UserError, refusal
from pisces_jax.utils.files import write_atomic

log = logging.getLogger(__name__)


class Saver:
    """Saves a run's checkpoints. A save that fails is reported, and the next one tries again.

    After `limits.failed_saves` failures in a row the run stops; its state is then written to `fallback`, if that is
    given. With several processes the run stops at the first failure: the others could not know of it.

    Args:
        fallback: a folder, on other storage, that takes the state.
    """

    def __init__(self, checkpoints: Checkpoints, config: ConfigDict, run: Path, fallback: Path | None) -> None:
        self._checkpoints, self._config, self._run, self._fallback = checkpoints, config, run, fallback
        self._limits = config.limits
        self._saving: tuple[int, float] | None = None  # the step that is being written in the background, and since
        self._in_a_row = 0
        self._failures: list[str] = []

    def save(self, step: int, state: State, position: Mapping[str, Any], *, last: bool = False) -> None:
        """Starts a save, once the one before has ended.

        Args:
            last: the run ends here: returns when the state is safe, and does not end without it.

        Raises:
            UserError: too many saves failed, or the last one.
        """
        self.settle()
        if self._saving is None:

            def begin() -> None:
                if not (self._run / "config.json").exists():
                    raise FileNotFoundError(2, "the run's folder is gone", str(self._run))
                self._checkpoints.save(step, state, position)

            begun = time.monotonic()
            if self._timed(begin, step):
                self._saving = step, begun
                if last:
                    self.settle()
        if self._in_a_row and (last or self._in_a_row >= self._limits.failed_saves or jax.process_count() > 1):
            raise self._gives_up(step, state, position)

    def look(self) -> None:
        """Notices a background save that has ended."""
        if self._saving is not None and not self._checkpoints.saving():
            self.settle()

    def close(self) -> None:
        """Waits for the background save, and ends. A run that is ended by something else loses nothing more here."""
        if not errors.hanging:
            self.settle()
        if not errors.hanging:
            self._checkpoints.close()

    def summary(self) -> str | None:
        """What did not go well, as a sentence for the end; None: nothing."""
        if not self._failures:
            return None
        return f"{len(self._failures)} saves failed and the run went on, the last one: {self._failures[-1]}"

    def settle(self) -> None:
        """Waits for the background save, at most until `limits.save_seconds` have passed since it began."""
        if self._saving is None:
            return
        step, begun = self._saving
        if self._timed(self._checkpoints.wait, step, begun):
            self._saving, self._in_a_row = None, 0
        elif not errors.hanging:
            self._saving = None

    def _timed(self, function: Callable[[], None], step: int, begun: float | None = None) -> bool:
        """Whether `function` ended well, in time; else reports why not. It runs in a thread that may be left behind."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                raised.append(error)

        since = time.monotonic() if begun is None else begun
        thread = threading.Thread(target=run, name="save", daemon=True)
        thread.start()
        thread.join(max(0.1, self._limits.save_seconds - (time.monotonic() - since)))
        errors.hanging = thread.is_alive()
        if errors.hanging:
            self._failed(step, f"it has not ended after {time.monotonic() - since:.0f} s")
        elif raised:
            if not isinstance(raised[0], Exception):  # of the storage, or of the libraries that use it
                raise raised[0]
            self._failed(step, _reason(raised[0]))
        return not (errors.hanging or raised)

    def _failed(self, step: int, reason: str) -> None:
        self._in_a_row += 1
        self._failures.append(f"step {step}: {reason}")
        log.warning("%s: the checkpoint of step %d could not be saved: %s", self._config.name, step, reason)

    def _gives_up(self, step: int, state: State, position: Mapping[str, Any]) -> UserError:
        words = f"step {step} of {self._config.name} is not saved ({self._failures[-1]})"
        kept = "older checkpoints are as they were"
        if self._fallback is None:
            return UserError(f"{words}: {kept}; fix that and run the same command again, or give --fallback")
        folder = self._fallback / self._config.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                write_atomic(folder / "config.json", json.dumps(json.loads(self._config.to_json()), indent=1))
            checkpoints = Checkpoints(folder, 1, self._checkpoints.measured)
            checkpoints.save(step, state, position)
            checkpoints.close()
        except Exception as error:
            return UserError(f"{words}, nor could it be saved in --fallback={folder} ({_reason(error)}): {kept}")
        saved = folder / "checkpoints" / str(step)
        return UserError(f"{words}, and is in {saved} instead: move that to {self._run / 'checkpoints'} and continue")


@contextlib.contextmanager
def reported(run: str, what: str) -> Iterator[None]:
    """Inside, what the storage refuses is said, and the run goes on without it."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s could not be written: %s", run, what, _reason(error))


def _reason(error: BaseException) -> str:
    """What the storage refused, in a line."""
    if isinstance(error, OSError) and (words := refusal(error) or error.strerror):
        return words
    return " ".join(str(error).split())[:200] or type(error).__name__

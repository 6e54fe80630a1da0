"""Requests of many clients for one model: a queue with a limit, and one thread that owns the devices.

Texts are written in a running batch (`running.RunningTexts`): a request joins as soon as a row is free. Pictures that
wait together, with the same settings, are drawn together. Between two pieces of text one batch of pictures is drawn.
"""

import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pisces_jax.data.example import Part
from pisces_jax.inference.model import Model
from pisces_jax.inference.running import RunningTexts, Written
from pisces_jax.inference.sampling import TextSampling
from pisces_jax.utils.errors import UserError


class Progress(NamedTuple):
    """What is certain of a text so far; `ended` as of `running.Written`."""

    text: str
    tokens: int
    prompt_tokens: int
    ended: str


class Busy(Exception):
    """The queue is full, or the engine ends."""


@dataclasses.dataclass(eq=False)
class Job:
    """What one client wants.

    Attributes:
        tell: is called in the engine's thread: with the `Progress` of a text after each piece, with the drawings (a
            list), or with an exception.
        how: of a text, or how `Model.draw` draws.
    """

    parts: Sequence[Part]
    how: TextSampling | Mapping[str, Any]
    seeds: Sequence[int]
    tell: Callable[[Any], None]
    gone: bool = False
    text: Written | None = None

    @property
    def draws(self) -> bool:
        return not isinstance(self.how, TextSampling)


class Engine:
    """Serves jobs until it is closed; a job that fails harms no other."""

    def __init__(self, model: Model, rows: int, slots: int, queue: int) -> None:
        """
        Args:
            rows: texts or pictures that are made at once.
            slots: positions of a prompt and its text together.
            queue: jobs that may wait; more are refused.
        """
        self.model, self._rows, self._most = model, rows, queue
        self._texts = RunningTexts(model, rows, slots)
        self._waiting: collections.deque[Job] = collections.deque()
        self._writing: list[Job] = []
        self._wake, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def writing(self) -> int:
        return len(self._writing)

    def submit(self, job: Job) -> None:
        """
        Raises:
            Busy: too many wait already.
        """
        with self._wake:
            if self._closing:
                raise Busy("the server ends: ask another one")
            if len(self._waiting) >= self._most:
                raise Busy(f"{self._most} requests wait already: try again later")
            self._waiting.append(job)
            self._wake.notify()

    def close(self) -> None:
        """Takes no more jobs, finishes those that it has, and ends."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._writing or self._closing):
                    self._wake.wait()
                if not (self._waiting or self._writing):
                    return
            self._join()
            self._write()
            self._draw()

    def _take(self, wanted: Callable[[Job], bool], most: int) -> list[Job]:
        """Up to `most` waiting jobs, the oldest first; those whose client has gone are dropped."""
        with self._wake:
            here = [job for job in self._waiting if not job.gone]
            taken = [job for job in here if wanted(job)][:most]
            self._waiting = collections.deque(job for job in here if job not in taken)
        return taken

    def _join(self) -> None:
        for job in self._take(lambda job: not job.draws, self._texts.free):
            assert isinstance(job.how, TextSampling)
            with _told([job]):
                job.text = self._texts.join(job.parts, job.how, job.seeds[0])
                self._writing.append(job)

    def _write(self) -> None:
        for job in self._writing:
            if job.gone and job.text is not None:
                self._texts.leave(job.text)
        self._writing = [job for job in self._writing if not job.gone]
        with _told(self._writing) as failed:
            self._texts.advance()
        if failed:
            self._texts.clear()  # the rows' memory was given away
            self._writing = []
        for job in self._writing:
            assert job.text is not None
            text = job.text
            job.tell(Progress(text.certain, len(text.tokens), text.prompt_tokens, text.ended))
        self._writing = [job for job in self._writing if job.text and not job.text.ended]

    def _draw(self) -> None:
        with self._wake:
            first = next((job for job in self._waiting if job.draws and not job.gone), None)
        room = self._rows

        def fits(job: Job) -> bool:
            nonlocal room
            if not job.draws or first is None or job.how != first.how:
                return False
            if job is not first and room < len(job.seeds):
                return False
            room -= len(job.seeds)
            return True

        if first is not None and (together := self._take(fits, self._rows)):
            self._draw_together(together)

    def _draw_together(self, jobs: Sequence[Job]) -> None:
        prompts = [job.parts for job in jobs for _ in job.seeds]
        seeds = [seed for job in jobs for seed in job.seeds]
        how: Any = jobs[0].how
        model = self._texts.alone if len(seeds) == 1 else self._texts.together
        with _told(jobs if len(jobs) == 1 else []) as failed:
            drawings = model.draw(prompts, seeds=seeds, **how)
        if failed:
            for job in jobs if len(jobs) > 1 else ():  # it is one's fault: the others are drawn without it
                self._draw_together([job])
            return
        for job in jobs:
            job.tell(drawings[: len(job.seeds)])
            drawings = drawings[len(job.seeds) :]


@contextlib.contextmanager
def _told(jobs: Sequence[Job]) -> Iterator[list[Exception]]:
    """What the block raises is told to the jobs, and is in the list."""
    failed: list[Exception] = []
    try:
        yield failed
    except Exception as error:
        failed.append(error)
        if not isinstance(error, UserError):
            logging.getLogger(__name__).error("a request failed", exc_info=error)
        for job in jobs:
            job.tell(error)

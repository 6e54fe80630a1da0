"""What an evaluation task is: what it asks of a model, how much, and what it returns.

A new task is a module with a `Task`, and a line in the `evaluate` command.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pisces_jax.data.example import Picture, Text
from pisces_jax.evaluation.answers import Answered
from pisces_jax.evaluation.geneval import Judged

Pictures = UInt8[np.ndarray, "N S S 3"]
Vectors = Float[np.ndarray, "N m C"]


class Drawn(Protocol):
    """What came of a prompt: the model's own description ("" if none) and the picture, uint8 [S, S, 3]."""

    @property
    def description(self) -> str: ...
    @property
    def image(self) -> np.ndarray: ...


class Model(Protocol):
    """What tasks ask of a model, as `inference.model.Model` has it."""

    config: ConfigDict

    @property
    def read_size(self) -> int: ...
    @property
    def drawn_size(self) -> int: ...
    def answer(self, questions: Sequence[Sequence[Text | Picture]], *, max_tokens: int = ...) -> list[str]: ...
    def draw(
        self,
        prompts: Sequence[Sequence[Text | Picture]],
        *,
        describe: bool,
        max_tokens: int = ...,
        temperature: float = ...,
        guidance: float | None = ...,
        vector_guidance: float | None = ...,
        seed: int = ...,
    ) -> Sequence[Drawn]: ...
    def features(self, images: Pictures) -> Vectors: ...
    def decode(self, vectors: Vectors, *, seed: int = ...) -> Pictures: ...


def _number(default: int, meaning: str, least: int = 1) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning, "least": least})


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is evaluated; the numbers are flags of the commands (`suite.add_amount_flags`)."""

    per_task: int = _number(25, "prompts of each of GenEval's kinds")
    images: int = _number(2, "pictures per prompt")
    per_kind: int = _number(200, "questions of each kind")
    held_out: int = _number(12, "prompts and questions of each kind about what is held out of training; 0: none", 0)
    other_words: int = _number(20, "prompts and questions of each kind, at most, in wordings held out too; 0: none", 0)
    spread: int = _number(8, "prompts drawn several times each, to see how much their pictures differ; 0: none", 0)
    pictures: int = _number(128, "pictures to reconstruct; real pictures to read and draw; judged prompts of a set")
    seed: int = _number(0, "another seed, other prompts, questions and noise", 0)
    both: bool = False  # GenEval's prompts are drawn both ways, after a description and directly


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        scores: numbers, in groups; they go to JSON.
        drawn: judged pictures by how they were drawn, for the report.
        asked: answered questions, for the report.
        asked_in_other_words: such questions in wordings that were held out of training.
        rows: rows of pictures under a heading each, for the report.
        shown: what the task's `sheet` shows besides.
    """

    scores: dict[str, Any]
    drawn: Mapping[str, Sequence[Judged]] = dataclasses.field(default_factory=dict)
    asked: Sequence[Answered] = ()
    asked_in_other_words: Sequence[Answered] = ()
    rows: Mapping[str, Pictures] = dataclasses.field(default_factory=dict)
    shown: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to score a model; its name is the key of the mapping that holds it.

    Attributes:
        fits: whether it fits a run whose sources are of these kinds (config keys `data.*.*.kind`).
        run: scores a model; the mapping holds the arguments of `Model.draw`. None if the amount asks for nothing.
        sheet: a picture of what was drawn, for tasks that draw.
        alone: whether it runs only where it is asked for by name, because it takes long before it scores.
    """

    fits: Callable[[set[str]], bool]
    run: Callable[[Model, Amount, Mapping[str, Any]], Outcome | None]
    sheet: Callable[[Outcome], Image.Image] | None = None
    alone: bool = False

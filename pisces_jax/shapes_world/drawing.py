"""Drawing in the shapes world: GenEval's six kinds of prompts, judged by its rules on what the detector finds."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation import geneval
from pisces_jax.shapes_world.detector import Detector, ShapesDetector
from pisces_jax.shapes_world.source import HELD_OUT_TAGS, geneval_prompts, render
from pisces_jax.shapes_world.text import Metadata, metadata, prompt_space, scene_for


class Drawn(Protocol):
    """What came of a prompt: the model's own description ("" if none) and the picture, uint8 [S, S, 3]."""

    @property
    def description(self) -> str: ...
    @property
    def image(self) -> np.ndarray: ...


class Drawer(Protocol):
    """What is needed of a model: `inference.model.Model` has it."""

    def draw(self, prompts: Sequence[Sequence[Text | Picture]], *, describe: bool, **how: Any) -> Sequence[Drawn]: ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """A drawn picture, uint8 [S, S, 3], with GenEval's verdict on it; `reason` says what is wrong."""

    metadata: Metadata
    description: str
    image: np.ndarray
    correct: bool
    reason: str


def draw(
    model: Drawer,
    *,
    per_task: int,
    images: int,
    describe: bool,
    seed: int = 0,
    held_out: bool = False,
    detector: Detector | None = None,
    **how: Any,
) -> list[Judged]:
    """Draws `images` pictures for each of `per_task` prompts a kind; `how` goes to `model.draw`.

    The pictures of a prompt follow one another. With `held_out`, all prompts name what is held out of training.
    """
    detector = detector or ShapesDetector()
    lines = [line for line in geneval_prompts(per_task, seed, held_out) for _ in range(images)]
    prompts = [(Text(draw_instruction(line["prompt"])),) for line in lines]
    drawn = model.draw(prompts, describe=describe, seed=seed, **how)
    return [_judge(detector, line, d) for line, d in zip(lines, drawn, strict=True)]


def _judge(detector: Detector, line: Metadata, drawn: Drawn) -> Judged:
    verdict = geneval.judge(detector.detect(drawn.image), line)
    return Judged(line, drawn.description, drawn.image, verdict.correct, verdict.reason)


def score(judged: Sequence[Judged], held_out: Sequence[Judged] = ()) -> dict[str, Any]:
    """Share of right pictures: `overall` (mean over tasks, as in GenEval), by task, `held_out`, counts.

    `held_out` is the mean over those tasks that can name something held out; `same_tasks` is that of the other
    pictures over the same tasks, to compare it with.
    """
    scores: dict[str, Any] = {**_scores(judged), "pictures": len(judged)}
    if held_out:
        by_task = _scores(held_out)
        scores["held_out"] = by_task.pop("overall")
        scores["same_tasks"] = float(np.mean([scores[tag] for tag in HELD_OUT_TAGS]))
        scores["held_out_by_task"] = by_task
        scores["held_out_pictures"] = len(held_out)
    return scores


def _scores(judged: Sequence[Judged]) -> dict[str, float]:
    return geneval.scores((j.metadata["tag"], j.correct) for j in judged)


def true_picture(line: Metadata, size: int, seed: int = 0) -> np.ndarray:
    """A picture of the world that the prompt is true of, uint8 [S, S, 3]."""
    for held_out in (False, True):
        for arguments in prompt_space(line["tag"], held_out):
            if metadata(line["tag"], *arguments) == line:
                rng = random.Random(f"true picture/{seed}/{line['prompt']}")
                return render(scene_for(rng, line["tag"], arguments, keep_allowed=not held_out), size)
    raise ValueError(f"{line['prompt']!r} is no prompt of the shapes world")

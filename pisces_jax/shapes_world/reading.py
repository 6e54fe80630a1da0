"""Reading in the shapes world: questions about unseen pictures, as many of each kind, with answers to match exactly."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from pisces_jax.data.example import Picture, Text
from pisces_jax.shapes_world.source import questions, render


class Reader(Protocol):
    """What is needed of a model: `inference.model.Model` has it."""

    def answer(self, questions: Sequence[Sequence[Text | Picture]], *, max_tokens: int = 32) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question, the right answer and the model's; picture uint8 [S, S, 3]."""

    image: np.ndarray
    kind: str
    question: str
    truth: str
    answer: str

    @property
    def correct(self) -> bool:
        return plain(self.answer) == plain(self.truth)


def plain(text: str) -> str:
    """Text as answers are compared: letter case, spaces and a full stop at the end do not count."""
    return " ".join(text.lower().split()).rstrip(".")


def ask(
    model: Reader, *, per_kind: int, size: int, seed: int = 0, held_out: bool = False, max_tokens: int = 8
) -> list[Answered]:
    """`per_kind` questions of each kind about pictures of `size`; with `held_out`, about what is held out."""
    asked = questions(per_kind, seed, held_out)
    images = [render(scene, size) for scene, *_ in asked]
    prompts = [(Picture(i, "read"), Text(question)) for i, (_, _, question, _) in zip(images, asked, strict=True)]
    answers = model.answer(prompts, max_tokens=max_tokens)
    return [
        Answered(image, kind, question, truth, answer)
        for image, (_, kind, question, truth), answer in zip(images, asked, answers, strict=True)
    ]


def score(asked: Sequence[Answered], held_out: Sequence[Answered] = ()) -> dict[str, Any]:
    """Share of right answers: `overall` (mean over kinds), by kind, `held_out` (mean over its kinds), counts."""
    scores: dict[str, Any] = {**_means((a.kind, a.correct) for a in asked), "questions": len(asked)}
    if held_out:
        by_kind = _means((a.kind, a.correct) for a in held_out)
        scores["held_out"] = by_kind.pop("overall")
        scores["held_out_by_kind"] = by_kind
        scores["held_out_questions"] = len(held_out)
    return scores


def _means(graded: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Mean by group, and before them `overall`, the mean of the groups' means."""
    groups: dict[str, list[bool]] = {}
    for group, right in graded:
        groups.setdefault(group, []).append(right)
    means = {group: float(np.mean(right)) for group, right in groups.items()}
    return {"overall": float(np.mean(list(means.values()))), **means}

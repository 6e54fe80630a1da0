"""Reading in the shapes world: questions about unseen pictures, as many of each kind, with answers to match exactly."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.shapes import questions, render


class Reader(Protocol):
    """What is needed of a model: `inference.model.Model` has it."""

    def answer(self, questions: Sequence[Sequence[Text | Picture]], *, most: int = 32) -> list[str]: ...

    def described(
        self, questions: Sequence[Sequence[Text | Picture]], *, most: int = 96
    ) -> Sequence[Sequence[Text | Picture]]: ...


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question, the right answer and the model's; picture uint8 [S, S, 3]; the model's own description of it, if it
    wrote one first."""

    image: np.ndarray
    kind: str
    question: str
    truth: str
    answer: str
    description: str = ""

    @property
    def correct(self) -> bool:
        return plain(self.answer) == plain(self.truth)


def plain(text: str) -> str:
    """Text as answers are compared: letter case, spaces and a full stop at the end do not count."""
    return " ".join(text.lower().split()).rstrip(".")


def ask(
    model: Reader,
    *,
    per_kind: int,
    size: int,
    describe: bool = False,
    seed: int = 0,
    held_out: bool = False,
    tokens: int = 96,
    most: int = 8,
) -> list[Answered]:
    """`per_kind` questions of each kind about pictures of `size`; with `held_out`, about what is held out.

    With `describe` the model first describes each picture, in `tokens` tokens at the most, and answers after that: its
    own description is all that it is told. Answers have `most` tokens at the most.
    """
    asked = questions(per_kind, seed, held_out)
    images = [render(scene, size) for scene, *_ in asked]
    prompts: Sequence[Sequence[Text | Picture]] = [
        (Picture(i, "read"), Text(question)) for i, (_, _, question, _) in zip(images, asked, strict=True)
    ]
    descriptions = [""] * len(asked)
    if describe:
        prompts = model.described(prompts, most=tokens)
        descriptions = ["".join(p.text for p in parts if isinstance(p, Text) and p.learn) for parts in prompts]
    answers = model.answer(prompts, most=most)
    return [
        Answered(image, kind, question, truth, answer, description)
        for image, (_, kind, question, truth), answer, description in zip(
            images, asked, answers, descriptions, strict=True
        )
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

"""Answers that must match exactly."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question of some kind about a picture, uint8 [S, S, 3], the right answer and the model's."""

    image: np.ndarray
    kind: str
    question: str
    truth: str
    answer: str

    @property
    def correct(self) -> bool:
        return plain(self.answer) == plain(self.truth)


def plain(text: str) -> str:
    """Text as answers are compared: without letter case, extra spaces and a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def score(
    asked: Sequence[Answered], held_out: Sequence[Answered] = (), other_words: Sequence[Answered] = ()
) -> dict[str, Any]:
    """Share of right answers: `overall` (mean over kinds), per kind, and counts.

    `held_out` and `other_words` are the means over the kinds of these questions.
    """
    scores: dict[str, Any] = {**_means((a.kind, a.correct) for a in asked), "questions": len(asked)}
    for name, others in {"held_out": held_out, "other_words": other_words}.items():
        if others:
            by_kind = _means((a.kind, a.correct) for a in others)
            scores[name] = by_kind.pop("overall")
            scores |= {f"{name}_by_kind": by_kind, f"{name}_questions": len(others)}
    return scores


def _means(graded: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The mean of each group and, before them, `overall`, the mean of these means."""
    groups: dict[str, list[bool]] = {}
    for group, right in graded:
        groups.setdefault(group, []).append(right)
    means = {group: float(np.mean(right)) for group, right in groups.items()}
    return {"overall": float(np.mean(list(means.values()))), **means}

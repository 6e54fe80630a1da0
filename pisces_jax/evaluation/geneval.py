"""GenEval's rules for whether a picture shows what its prompt asks for.

Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment". The official detector
is Mask2Former, with CLIP for colours; the rules here take the detections of any `Detector`.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from pisces_jax.evaluation.relations import Box, relations
from pisces_jax.utils.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The classes of COCO under GenEval's names (its object_names.txt).
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts above this score
MOST_OF_A_CLASS = 16

Metadata = dict[str, Any]
"""One line of GenEval's metadata: tag, include, perhaps exclude, prompt."""


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object: its class, box in pixels, score in 0..1 and colour (one of `COLORS`, or None)."""

    label: str
    box: Box
    score: float
    color: str | None = None


class Detector(Protocol):
    """Anything that finds objects of the classes `labels` in a picture."""

    @property
    def labels(self) -> Collection[str]: ...

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[Detection]:
        """The objects in `image`, the highest score first."""
        ...


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Whether a picture is right; `reason` says what is wrong with it, one fault per line."""

    correct: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """A drawn picture, uint8 [S, S, 3], with GenEval's judgement.

    Attributes:
        description: what the model wrote before drawing; "" if nothing.
        truth: a picture that the prompt is true of, to show beside it.
    """

    metadata: Metadata
    description: str
    image: np.ndarray
    correct: bool
    reason: str
    truth: np.ndarray | None = None


def keep(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count for prompts of this kind, by class, the highest score first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            kept.setdefault(detection.label, []).append(detection)
    return {label: found[:MOST_OF_A_CLASS] for label, found in kept.items()}


def judge(detections: Iterable[Detection], metadata: Metadata) -> Judgement:
    """Applies GenEval's rules to one picture.

    Each `include` clause needs `count` objects of its class. Only the `count` with the highest scores are looked at
    further: at least `count` of them must have the colour, and every one must stand in the relation to every object of
    the target clause. An `exclude` clause fails if there are `count` objects of its class.
    """
    kept = keep(detections, metadata["tag"])
    wrong: list[str] = []
    matched: list[list[Detection] | None] = []  # per clause, None where it failed
    for clause in metadata.get("include", ()):
        found = kept.get(clause["class"], [])[: clause["count"]]
        reason = _lacks_number(clause, found) or _lacks_color(clause, found) or _lacks_position(clause, found, matched)
        matched.append(None if reason else found)
        if reason:
            wrong.append(reason)
    for clause in metadata.get("exclude", ()):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            wrong.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Judgement(not wrong, "\n".join(wrong))


def _lacks_number(clause: Metadata, found: Sequence[Detection]) -> str | None:
    if len(found) >= clause["count"]:
        return None
    return f"expected {clause['class']}>={clause['count']}, found {len(found)}"


def _lacks_color(clause: Metadata, found: Sequence[Detection]) -> str | None:
    if "color" not in clause:
        return None
    wanted, colors = clause["color"], Counter(d.color for d in found)
    if colors[wanted] >= clause["count"]:
        return None
    seen = ", ".join(f"{colors[color]} {color}" for color in COLORS if colors[color])
    expected = f"expected {wanted} {clause['class']}>={clause['count']}, found {colors[wanted]} {wanted}"
    return f"{expected}; and {seen or 'no colour'}"


def _lacks_position(
    clause: Metadata, found: Sequence[Detection], matched: Sequence[list[Detection] | None]
) -> str | None:
    if "position" not in clause:
        return None
    relation, target = clause["position"]
    if matched[target] is None:
        return f"no target for {clause['class']} to be {relation}"
    for detection in found:
        for other in matched[target]:
            held = relations(detection.box, other.box)
            if relation not in held:
                seen = f"{' and '.join(held)} target" if held else "no relation to target"
                return f"expected {clause['class']} {relation} target, found {seen}"
    return None


def scores(judged: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """From (tag, correct) per picture, the mean of each kind in GenEval's order, and the mean of these as "overall".

    Raises:
        UserError: there is no picture, or a judgement is neither true nor false.
    """
    by_tag: dict[str, list[bool]] = {}
    for tag, correct in judged:
        if not isinstance(correct, (bool, np.bool_)):  # the text "False" is true in Python
            raise UserError(f"correct is {correct!r} for a picture of {tag}: write true or false, without quotes")
        by_tag.setdefault(tag, []).append(correct)
    if not by_tag:
        raise UserError("there is no picture to score: generate some first")
    means = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in TAGS if tag in by_tag}
    means |= {tag: sum(right) / len(right) for tag, right in by_tag.items() if tag not in means}
    return means | {"overall": sum(means.values()) / len(means)}


def score(
    judged: Sequence[Judged], held_out: Sequence[Judged] = (), other_words: Sequence[Judged] = ()
) -> dict[str, Any]:
    """Share of right pictures: `overall` (mean over tasks, as in GenEval), per task, and counts.

    With `held_out`, pictures of combinations that were held out of training: `held_out` is the mean over their tasks,
    and `same_tasks` the mean of the other pictures over the same tasks, for comparison. With `other_words`, pictures of
    prompts in wordings that were held out of training: `other_words` is the mean over their tasks.
    """
    means: dict[str, Any] = {**_means(judged), "pictures": len(judged)}
    for name, others in {"held_out": held_out, "other_words": other_words}.items():
        if others:
            by_task = _means(others)
            means[name] = by_task.pop("overall")
            if name == "held_out":
                means["same_tasks"] = float(np.mean([means[tag] for tag in by_task]))
            means |= {f"{name}_by_task": by_task, f"{name}_pictures": len(others)}
    return means


def _means(judged: Sequence[Judged]) -> dict[str, float]:
    return scores((j.metadata["tag"], j.correct) for j in judged)

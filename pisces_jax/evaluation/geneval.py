"""GenEval's rules for whether a picture shows what its prompt asks for, and its folder layout.

Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment". The official detector
is Mask2Former with CLIP for colours; the rules here take the detections of any `Detector`. `write_sample` makes the
folders that the official scorer reads, so that it can run on them unchanged.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from pisces_jax.evaluation.relations import RELATIONS, relations
from pisces_jax.shapes_world.detector import Detection, Detector
from pisces_jax.utils.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts above this score
MOST_OF_A_CLASS = 16

Metadata = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Whether a picture is right; `reason` says, a line each, what is wrong with it."""

    correct: bool
    reason: str


def keep(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count for prompts of this kind, by class, the surest first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            kept.setdefault(detection.label, []).append(detection)
    return {label: found[:MOST_OF_A_CLASS] for label, found in kept.items()}


def judge(detections: Iterable[Detection], metadata: Metadata) -> Judgement:
    """Applies GenEval's rules to one picture.

    Each `include` clause needs `count` of its class, and only the `count` surest are looked at further: at least
    `count` of them must have the colour, and every one must stand in the relation to every object of the target
    clause. An `exclude` clause fails at `count` of its class.
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
    """From (tag, correct) per picture, the mean of each kind in GenEval's order, and their mean as "overall".

    Raises `UserError` if there is no picture at all.
    """
    by_tag: dict[str, list[bool]] = {}
    for tag, correct in judged:
        by_tag.setdefault(tag, []).append(correct)
    if not by_tag:
        raise UserError("there is no picture to score: generate some first")
    means = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in TAGS if tag in by_tag}
    means |= {tag: sum(right) / len(right) for tag, right in by_tag.items() if tag not in means}
    return means | {"overall": sum(means.values()) / len(means)}


# Files


def read_prompts(path: Path) -> list[Metadata]:
    """The prompts of a metadata file: one JSON object a line.

    Raises `UserError` if the file cannot be read, or a line lacks what the rules need.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as GenEval's metadata: give another file") from error
    return [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> Metadata:
    try:
        metadata = json.loads(line)
        if not all(isinstance(metadata[key], str) for key in ("tag", "prompt")):
            raise ValueError("no text")
        include = metadata["include"]
        for i, clause in enumerate([*include, *metadata.get("exclude", ())]):
            if not isinstance(clause["class"], str) or not isinstance(clause["count"], int):
                raise ValueError("no class or count")
            if "position" in clause:
                relation, target = clause["position"]
                if relation not in RELATIONS or target not in range(min(i, len(include))):
                    raise ValueError("no such relation or target")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} is no GenEval prompt: it must be a JSON object with tag, prompt and include clauses of class "
            "and count, whose positions name a relation and an earlier clause"
        ) from error
    return metadata


def write_sample(folder: Path, prompt: int, metadata: Metadata, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Path:
    """Writes the pictures of one prompt as `folder/00000/metadata.jsonl` and `folder/00000/samples/0000.png`, …

    `prompt` is the prompt's number. Returns the prompt's folder.
    """
    place = Path(folder) / f"{prompt:05d}"
    (place / "samples").mkdir(parents=True, exist_ok=True)
    (place / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    for i, image in enumerate(images):
        Image.fromarray(image).save(place / "samples" / f"{i:04d}.png")
    return place


def read_samples(folder: Path) -> Iterator[tuple[Path, Metadata]]:
    """Every picture of a folder in the official layout, with its prompt, in order.

    Raises `UserError` if the folder, a prompt's metadata or all of its pictures are missing.
    """
    folder = Path(folder)
    places = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []
    if not places:
        raise UserError(f"{folder} holds no GenEval samples: give a folder with 00000/metadata.jsonl and 00000/samples")
    for place in places:
        prompts = read_prompts(place / "metadata.jsonl")
        if len(prompts) != 1:
            raise UserError(f"{place / 'metadata.jsonl'} must hold one prompt and holds {len(prompts)}")
        pictures = sorted((place / "samples").glob("*.png"))
        if not pictures:
            raise UserError(f"{place / 'samples'} holds no PNG: generate that prompt's pictures again")
        for picture in pictures:
            yield picture, prompts[0]


def score_folder(folder: Path, detector: Detector) -> list[dict[str, Any]]:
    """Judges every picture of a folder in the official layout; a row each, as the official results have them."""
    rows = []
    for path, metadata in read_samples(folder):
        try:
            with Image.open(path) as picture:
                image = np.asarray(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path} cannot be read as a picture: generate it again") from error
        rows.append(result(str(path), metadata, detector.detect(image)))
    return rows


def result(filename: str, metadata: Metadata, detections: Sequence[Detection]) -> dict[str, Any]:
    """One row of results: judgement, the prompt's line, and the boxes (x0, y0, x1, y1, score) that counted."""
    judgement = judge(detections, metadata)
    kept = keep(detections, metadata["tag"])
    boxes = {label: [[*d.box, d.score] for d in found] for label, found in kept.items()}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": judgement.correct,
        "reason": judgement.reason,
        "metadata": json.dumps(metadata),  # text within text, as the official scorer writes both
        "details": json.dumps(boxes),
    }


def write_results(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes results as JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Reads results. Raises `UserError` if the file is missing or a line is no result."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as GenEval results: score the pictures again") from error
    if not all(isinstance(row, dict) and {"tag", "correct"} <= row.keys() for row in rows):
        raise UserError(f"{path} holds lines that are no GenEval results: score the pictures again")
    return rows

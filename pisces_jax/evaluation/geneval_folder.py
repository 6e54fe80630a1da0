"""GenEval's files: prompts, and pictures in the official layout, which the official scorer reads too.

DIR/00000/metadata.jsonl      the prompt's line
DIR/00000/samples/0000.png    its pictures
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from pisces_jax.data.images import png
from pisces_jax.evaluation.geneval import COLORS, TAGS, Detection, Detector, Metadata, judge, keep, scores
from pisces_jax.evaluation.relations import RELATIONS
from pisces_jax.utils.errors import UserError


def read_prompts(path: Path, classes: Collection[str] | None = None) -> list[Metadata]:
    """The prompts of a metadata file, one JSON object per line.

    Args:
        classes: what the objects may be; None: anything.

    Raises:
        UserError: the file cannot be read, a line lacks what the rules need, or names a tag, a colour or a class that
            no detection can ever have.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")  # JSON may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as GenEval's metadata: give another file") from error
    return [_parse(line, f"{path}, line {i}", classes) for i, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str, classes: Collection[str] | None) -> Metadata:
    try:
        metadata = json.loads(line)
        if not all(isinstance(metadata[key], str) for key in ("tag", "prompt")):
            raise ValueError("no text")
        include = metadata["include"]
        clauses = [*include, *metadata.get("exclude", ())]
        for i, clause in enumerate(clauses):
            if not isinstance(clause["class"], str) or not isinstance(clause["count"], int):
                raise ValueError("no class or count")
            if "position" in clause:
                relation, target = clause["position"]
                if relation not in RELATIONS or target not in range(min(i, len(include))):
                    raise ValueError("no such relation or target")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} is not a GenEval prompt: it must be a JSON object with tag, prompt and include clauses of class "
            "and count, whose positions name a relation and an earlier clause"
        ) from error
    _check_known("tag", metadata["tag"], TAGS, where)
    for clause in clauses:
        if "color" in clause:
            _check_known("colour", clause["color"], COLORS, where)
        if classes is not None:
            _check_known("class", clause["class"], classes, where)
    return metadata


def _check_known(what: str, name: Any, known: Collection[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name).lower(), known, 1)
        raise UserError(
            f"{where} has the {what} {str(name)[:50]!r}, which nothing can be recognised as: "
            + (f"did you mean {near[0]!r}? The known ones" if near else "the known ones")
            + f" are {', '.join(known)}"
        )


def sample_files(prompt: int, metadata: Metadata, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> dict[str, bytes]:
    """The files of prompt number `prompt` (from 0) in the official layout, by their path in the folder."""
    files = {f"{prompt:05d}/metadata.jsonl": (json.dumps(metadata) + "\n").encode()}
    return files | {f"{prompt:05d}/samples/{i:04d}.png": png(image) for i, image in enumerate(images)}


def read_samples(folder: Path) -> Iterator[tuple[Path, Metadata]]:
    """Every picture of a folder in the official layout, with its prompt, in order.

    Raises:
        UserError: the folder, a prompt's metadata or all of its pictures are missing.
    """
    places = prompt_folders(folder)
    if not places:
        raise UserError(f"{folder} holds no GenEval samples: give a folder with 00000/metadata.jsonl and 00000/samples")
    for place in places:
        prompts = read_prompts(place / "metadata.jsonl")
        if len(prompts) != 1:
            raise UserError(f"{place / 'metadata.jsonl'} must hold one prompt and holds {len(prompts)}")
        # The official rule; the same programs write a grid.png or masks beside them.
        pictures = sorted(p for p in (place / "samples").glob("*.png") if re.fullmatch("[0-9]+", p.stem))
        if not pictures:
            raise UserError(
                f"{place / 'samples'} holds no PNG named by a number: generate that prompt's pictures again"
            )
        for picture in pictures:
            yield picture, prompts[0]


def prompt_folders(folder: Path) -> list[Path]:
    """The folders of prompts in a folder in the official layout; none if it has none or does not exist."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []


def score_folder(folder: Path, detector: Detector) -> tuple[dict[str, float], bytes]:
    """Judges every picture of a folder in the official layout.

    Returns:
        The scores (`geneval.scores`), and the content of the official results file: a JSON line for each picture.

    Raises:
        UserError: a file cannot be read, or a prompt names a class that the detector does not know.
    """
    rows = []
    for path, metadata in read_samples(folder):
        for name in (clause["class"] for clause in metadata["include"]):
            if name not in detector.labels:
                raise UserError(
                    f"{path} is to show {name!r}, and the detector finds only {', '.join(detector.labels)}: score this "
                    "folder with GenEval's own program"
                )
        try:
            with Image.open(path) as picture:
                image = np.asarray(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path} cannot be read as a picture: generate it again") from error
        rows.append(result(str(path), metadata, detector.detect(image)))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return scores((row["tag"], row["correct"]) for row in rows), content


def result(filename: str, metadata: Metadata, detections: Sequence[Detection]) -> dict[str, Any]:
    """One row of the results: the judgement, the prompt's line, and the boxes (x0, y0, x1, y1, score) that counted."""
    judgement = judge(detections, metadata)
    kept = keep(detections, metadata["tag"])
    boxes = {label: [[*d.box, d.score] for d in found] for label, found in kept.items()}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": judgement.correct,
        "reason": judgement.reason,
        "metadata": json.dumps(metadata),  # JSON within JSON, as in the official scorer's file
        "details": json.dumps(boxes),
    }

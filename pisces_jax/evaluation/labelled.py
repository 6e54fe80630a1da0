"""True pictures with the labels that their captions name, and which of them a judge may not see."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from tqdm import tqdm

from pisces_jax.data.example import BrokenExample, Picture, Text, identity
from pisces_jax.data.formats.records import Examples
from pisces_jax.data.images import fit
from pisces_jax.evaluation.answers import plain
from pisces_jax.utils.errors import UserError

MOST = 60_000  # pictures of one source that are taken, spread over it
LEAST = 3  # pictures of each of its labels that the judge sees before one is kept from it

Classes = Mapping[str, Sequence[str]]
"""Field -> its values, sorted."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """N true pictures, the values of F label fields, the prompts that ask for them, and their keys."""

    images: UInt8[np.ndarray, "N S S 3"]
    labels: Sequence[tuple[str, ...]]
    prompts: Sequence[Sequence[Text]]
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: np.ndarray) -> "Labelled":
        """Those at these numbers, or where a mask is True."""
        numbers = np.arange(len(self))[chosen].tolist()
        return Labelled(
            self.images[chosen],
            [self.labels[i] for i in numbers],
            [self.prompts[i] for i in numbers],
            [self.keys[i] for i in numbers],
        )


def label_fields(source: Examples, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The fields that hold a source's labels: those given, or else those that its captions name.

    Raises:
        UserError: the format of the captions does not tell.
    """
    fields = tuple(given) or tuple(sorted(source.recipe.fields or ()))
    if not fields:
        raise UserError("the captions' format does not name the fields with labels: give them with --labels")
    return fields


def load(source: Examples, fields: Sequence[str], size: int) -> Labelled:
    """The pictures that a source draws, at `size` pixels a side; broken examples are left out.

    Raises:
        UserError: no record has the fields and a picture.
    """
    images, labels, prompts, keys, missing = [], [], [], [], ""
    needed = None if source.recipe.fields is None else source.recipe.fields | set(fields)
    numbers = np.unique(np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int)).tolist()
    for i in tqdm(numbers, desc="pictures", leave=False, delay=3.0, mininterval=1.0):
        try:
            record = source.record(i, needed)
            example = source.recipe.example(record)
            values = tuple(_value(record.fields, field, record.key) for field in fields)
            picture = next(part for part in example.parts if isinstance(part, Picture) and part.role == "draw")
            images.append(fit(picture.array(), size))
        except UserError as error:  # counted where the model's input reads it
            missing = missing or str(error)
            continue
        labels.append(values)
        prompts.append(prompt(example.parts))
        keys.append(example.key)
    if not keys:
        raise UserError(f"no example has the labels {', '.join(fields)} ({missing}): give others with --labels")
    return Labelled(np.stack(images), labels, prompts, keys)


def prompt(parts: Sequence[Text | Picture]) -> list[Text]:
    """What is given of an example that draws: its texts before a picture or a text that is learned."""
    given = []
    for part in parts:
        if not isinstance(part, Text) or part.learn:
            break
        given.append(part)
    return given


def _value(fields: Mapping[str, object], field: str, key: str) -> str:
    value = fields.get(field)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, (list, tuple, dict, np.ndarray)) or not plain(str(value)):
        raise BrokenExample(key, "a label is missing", field)
    return plain(str(value))


def classes_of(sets: Sequence[Labelled], fields: Sequence[str]) -> dict[str, list[str]]:
    """The values of each field in all of these pictures."""
    return {
        field: sorted({labels[f] for one in sets for labels in one.labels}) for f, field in enumerate(fields)
    }  # fmt: skip


def numbered(labels: Sequence[tuple[str, ...]], classes: Classes) -> Int32[np.ndarray, "N F"]:
    """Labels as numbers of their classes."""
    numbers = [{value: i for i, value in enumerate(values)} for values in classes.values()]
    rows = [[number[value] for number, value in zip(numbers, row, strict=True)] for row in labels]
    return np.array(rows, np.int32).reshape(-1, len(numbers))


def unseen(train: Labelled, held_out: Mapping[str, Labelled], least: int = LEAST) -> dict[str, Bool[np.ndarray, "N"]]:
    """Which held-out pictures the judge does not see: all of which it sees `least` others with each of the labels.

    It must have seen a name to recognise it. So where training has too few pictures of a label, as of a name that is
    held out whole, the first held-out ones, in an order by a hash of their keys, are shown to the judge too.
    """
    seen: list[dict[str, int]] = [{} for _ in (train.labels[0] if len(train) else ())]

    def show(labels: tuple[str, ...]) -> None:
        for counts, value in zip(seen, labels, strict=True):
            counts[value] = counts.get(value, 0) + 1

    for labels in train.labels:
        show(labels)
    kept = {}
    for name in sorted(held_out):
        one = held_out[name]
        kept[name] = np.zeros(len(one), bool)
        for i in sorted(range(len(one)), key=lambda i: tuple(identity(one.keys[i], "judge"))):  # noqa: B023
            if all(c.get(v, 0) >= least for c, v in zip(seen, one.labels[i], strict=True)):
                kept[name][i] = True
            else:
                show(one.labels[i])
    return kept


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """Of the pictures' pixels and labels, whatever their files."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in (images, labels):
        hashed.update(f"{array.shape}{array.dtype}".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()

"""What readers of file formats share: random access to records, and examples from them by a recipe."""

import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pisces_jax.data.example import BrokenExample, Example
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Recipe, Record
from pisces_jax.utils.errors import UserError

SPLITS = ("train", "val", "all")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class Records(Protocol):
    """Random access to the records of some files; picklable, and nothing is decoded before a picture is called.

    `names` are the fields that every record has, or None where that is not known before reading. `fingerprint`
    changes with the files.
    """

    @property
    def names(self) -> Sequence[str] | None: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record:
        """Raises `BrokenExample` where record i cannot be used; the others still can."""
        ...


class Examples:
    """A source (`layout.Source`): records, made examples by a recipe.

    With `split` "train" or "val", every k-th record, k = round(1 / val_share), is held out: what is appended to the
    files later moves nothing.

    Raises:
        UserError: an unknown split, an empty one, or a format that names a field which the records lack.
    """

    def __init__(self, records: Records, recipe: Recipe, split: str = "all", val_share: float = 0.01):
        if split not in SPLITS:
            raise UserError(f"no split {split!r}: choose train, val or all")
        if not isinstance(val_share, (int, float)) or not 0 < val_share <= 0.5:
            raise UserError(f"val_share={val_share!r} is no share: give a number above 0 and up to 0.5")
        self.records, self.recipe, self.split = records, recipe, split
        self._every = round(1 / val_share)
        held_out = len(records) // self._every
        self._length = {"train": len(records) - held_out, "val": held_out, "all": len(records)}[split]
        if not self._length:
            raise UserError(f"the split {split!r} is empty: it has {len(records)} records in all")
        if records.names is not None:
            recipe.check(records.names)
        self.draws = recipe.draws
        self.remote = getattr(records, "remote", False)  # every example is a request: `lengths` reads many at once
        if hasattr(records, "wanted"):
            records.wanted = used_fields(recipe)
        self.fingerprint = f"{records.fingerprint}/{split}/{self._every}/{recipe}"
        # Other texts of the same pictures have the same features.
        self.pictures_fingerprint = f"{records.fingerprint}/{split}/{self._every}/{recipe.pictures}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Example:
        i = int(i)
        if not 0 <= i < self._length:
            raise IndexError(f"example {i} of {self._length}")
        if self.split == "val":
            i = (i + 1) * self._every - 1
        elif self.split == "train":
            i += i // (self._every - 1)
        return self.recipe.example(self.records[i])


def labels(name: str, paths: Sequence[str]) -> list[str]:
    """What the keys of each file's examples begin with: the source's `name`, and the path below what all files share.

    Keys seed noise and choose whose captions are dropped: no two examples of a mixture may have the same one, and it
    must not matter in which folder the data lies.
    """
    parts = [path.split("/") for path in paths]
    shared = len(os.path.commonprefix([part[:-1] for part in parts]))
    return ["/".join([name, *part[shared:]]) for part in parts]


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """The file of record i and its number there; `ends` has the sums of the files' records."""
    file = int(np.searchsorted(ends, i, side="right"))
    return file, int(i) - (int(ends[file - 1]) if file else 0)


def used_fields(recipe: Recipe) -> frozenset[str] | None:
    """The fields that a recipe's formats name; None where they cannot be told from its formats."""
    names = set()
    for text_format in recipe.formats:
        for _, name, inner, _ in string.Formatter().parse(text_format):
            if inner and "{" in inner:
                return None
            if name is not None:
                names.add(re.split(r"[.\[]", name)[0])
    return None if recipe.recipe == "conversation" else frozenset(names)


def parse_json(data: bytes, key: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        BrokenExample: it is not UTF-8, not JSON or no object.
    """
    value = parse_any_json(data, key)
    if not isinstance(value, dict):
        raise BrokenExample(key, "no JSON object", type(value).__name__)
    return value


def parse_any_json(data: bytes, key: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BrokenExample(key, "not UTF-8", f"byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenExample(key, "not JSON", str(error)) from error


def parse_text(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BrokenExample(key, "not UTF-8", f"byte {error.start}") from error


def encoded(value: Any, key: str) -> EncodedImage:
    """A picture from a field that holds its bytes, or Hugging Face's {"bytes", "path"}.

    Raises:
        BrokenExample: there are no bytes.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if not isinstance(value, (bytes, bytearray, memoryview)) or not len(value):
        raise BrokenExample(key, "a picture is missing", "no bytes")
    return EncodedImage(bytes(value), key)

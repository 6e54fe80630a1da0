"""Folders of pictures with a `metadata.jsonl`, in Hugging Face's convention."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import BrokenExample, identity
from pisces_jax.data.formats.json_files import JsonRecords
from pisces_jax.data.formats.records import Examples, check_split, picture_files
from pisces_jax.data.recipes import Recipe, Record
from pisces_jax.utils.errors import UserError


class ImageFolder(Examples):
    """A source: a folder of pictures and `metadata.jsonl`, with one JSON object per line: `file_name` and any fields.

    `images` names the fields with the pictures' names, two of them for edits. `split` is "train", "val" or "all". A
    picture belongs to "val" by a hash of its name, so that additions to the folder move no other.

    Raises:
        UserError: the folder or its metadata is missing, no line can be used, or the split is empty.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        recipe: Recipe,
        split: str = "all",
        val_share: float = 0.1,
        images: Sequence[str] = ("file_name",),
    ):
        check_split(split)
        if not isinstance(val_share, (int, float)) or not 0 <= val_share <= 1:
            raise UserError(f"val_share={val_share!r} is not a share: give a number from 0 to 1")
        records = _FolderRecords(os.fspath(path).rstrip("/"), images)
        self._chosen, names = records.choose(split, val_share)
        if not len(self._chosen):
            raise UserError(f"the split {split!r} of image folder {path} is empty: add pictures or change the split")
        self._length = len(self._chosen)
        self._use(records, recipe, names, f"{split}/{val_share}")

    def _number(self, i: int) -> int:
        return int(self._chosen[i])


class _FolderRecords(JsonRecords):
    """The lines of a folder's metadata, with keys by the names of pictures."""

    def __init__(self, folder: str, images: Sequence[str]):
        metadata = storage.join(folder, "metadata.jsonl")
        self.name = Path(folder).name
        try:
            super().__init__([metadata], images, folder, self.name)
        except storage.Unreachable as error:
            raise UserError(f"{metadata} cannot be read: set path to an image folder") from error

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        found, _, key = self.object(i)
        name = found.get(self.images[0])
        if not name:
            raise BrokenExample(key, "a field is missing", self.images[0])
        key = f"{self.name}/{_printable(name)}"
        return Record(key, found, picture_files(found, self.images, self.roots[0], key))

    def choose(self, split: str, val_share: float) -> tuple[np.ndarray, Sequence[str] | None]:
        """The lines of a split, and the fields of its first line that has any."""
        chosen, names, usable = [], None, False
        for i in range(len(self)):
            try:
                found = self.object(i)[0]
                name, usable = _printable(found.get(self.images[0], "")), True
            except BrokenExample:  # it is counted where it is read
                found, name = {}, str(i)
            if split == "all" or (_share(name) < val_share) == (split == "val"):
                chosen.append(i)
                names = names or list(found) or None
        if not usable:
            raise UserError(f"no line of {self.paths[0]} is a JSON object: fix the file")
        return np.array(chosen, np.int64), names


def _printable(name: Any) -> str:
    return str(name).encode("utf-8", "replace").decode()


def _share(name: str) -> float:
    """A number in [0, 1) that depends only on `name`."""
    low, high = identity(name).tolist()
    return (low + (high << 32)) / 2**64

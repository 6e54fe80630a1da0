"""What the readers of file formats share: their protocol, the source that a recipe makes of one, and parsing."""

import base64
import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.conversations import sound
from pisces_jax.data.example import FILE_CHANGED, FILE_GONE, BrokenExample, Example
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Recipe, Record
from pisces_jax.utils.errors import UserError

SPLITS = ("train", "val", "all")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class Records(Protocol):
    """A reader of one file format: random access to the records of some files.

    To add a format, write a class with these members in `formats/NAME.py` and add a line to `sources.READERS`. The
    arguments of its constructor are the keys that a config's source may give: by custom `path` (a pattern or several,
    for `storage.expand`) and `images` (a tuple of the names of what holds a record's pictures). An argument `name` gets
    the name of the source. `split` and `val_share` are taken care of (`Examples`), unless the constructor has its own
    `split`. It raises `UserError` for whatever the user must change, such as files without a record.

    Instances are pickled for worker processes and read by several threads at once: keep paths and numbers in them, not
    open files.
    """

    @property
    def names(self) -> Sequence[str] | None:
        """The fields that every record has; None if they are not known before reading."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with the files (`storage.signature`) and with the arguments that choose pictures.

        Caches of lengths and features are found by it.
        """
        ...

    @property
    def remote(self) -> bool:
        """Whether reading a record is a request to a bucket, so that many should be read at once."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        """Record i. No picture is read or decoded before it is called (`Record.pictures`).

        `fields` are the ones that are used (None: perhaps all); a reader may leave out others to save requests. Keys
        begin with `labels`, so that no two examples of a mixture have the same.

        Raises:
            BrokenExample: this record cannot be used (`reading` raises it for failures of the storage).
        """
        ...


class Examples:
    """A source (`layout.Source`): records, made into examples by a recipe.

    With `split` "train" or "val", every k-th record, k = round(1 / val_share), is held out, so that records appended to
    the files later do not move others.

    Raises:
        UserError: an unknown or empty split, a wrong share, or a format that names a field which the records lack.
    """

    def __init__(self, records: Records, recipe: Recipe, split: str = "all", val_share: float = 0.01):
        check_split(split)
        if not isinstance(val_share, (int, float)) or not 0 < val_share <= 0.5:
            raise UserError(f"val_share={val_share!r} is not a share: give a number above 0 and up to 0.5")
        self.split, self._every = split, round(1 / val_share)
        held_out = len(records) // self._every
        self._length = {"train": len(records) - held_out, "val": held_out, "all": len(records)}[split]
        if not self._length:
            raise UserError(f"the split {split!r} is empty: there are only {len(records)} records in all")
        self._use(records, recipe, records.names, f"{split}/{self._every}")

    def _use(self, records: Records, recipe: Recipe, names: Sequence[str] | None, chosen: str) -> None:
        """Takes what `layout.Source` asks for from the records and the recipe; `chosen` says which records are used."""
        if names is not None:
            recipe.check(names)
        self.records, self.recipe = records, recipe
        self.draws, self.remote = recipe.draws, records.remote
        self.fingerprint = f"{records.fingerprint}/{chosen}/{recipe}{recipe.wording}"
        self.pictures_fingerprint: str | None = f"{records.fingerprint}/{chosen}/{recipe.pictures}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Example:
        return self.recipe.example(self.record(i, self.recipe.fields))

    def record(self, i: int, fields: frozenset[str] | None = None) -> Record:
        """What the file holds of example i; of its fields at least `fields`, or all."""
        i = int(i)
        if not 0 <= i < self._length:
            raise IndexError(f"example {i} of {self._length}")
        return self.records.read(self._number(i), fields)

    def _number(self, i: int) -> int:
        """Of the record of example i."""
        if self.split == "val":
            return (i + 1) * self._every - 1
        return i + i // (self._every - 1) if self.split == "train" else i


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose train, val or all")


def labels(name: str, paths: Sequence[str]) -> list[str]:
    """What the keys of each file's examples begin with: the source's `name` and the path below their common folder.

    Keys seed noise and choose whose captions are dropped. So no two examples of a mixture may share one, and keys must
    not depend on the folder in which the data lies.
    """
    parts = [path.split("/") for path in paths]
    shared = len(os.path.commonprefix([part[:-1] for part in parts]))
    return ["/".join([name, *part[shared:]]) for part in parts]


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """The file of record i and its number in it, for `ends`, the cumulative numbers of records of the files."""
    file = int(np.searchsorted(ends, i, side="right"))
    return file, int(i) - (int(ends[file - 1]) if file else 0)


@contextlib.contextmanager
def reading(
    key: str,
    gone: str = FILE_GONE,
    damaged: str = "a damaged file",
    errors: tuple[type[Exception], ...] = (UserError,),
) -> Iterator[None]:
    """Makes what the block raises a `BrokenExample`: of the reason `gone` if the storage failed, else `damaged`."""
    try:
        yield
    except BrokenExample:
        raise
    except storage.Unreachable as error:
        raise BrokenExample(key, gone, str(error)) from error
    except errors as error:
        raise BrokenExample(key, damaged, str(error)) from error


def parse_text(data: bytes, key: str) -> str:
    """UTF-8 text, without white space around it. Raises `BrokenExample` if it is not UTF-8."""
    return _decoded(data, key).strip()


def parse_json(data: bytes, key: str) -> Any:
    """Any JSON value. Raises `BrokenExample` if it is not UTF-8 or not JSON."""
    try:
        return json.loads(_decoded(data, key))
    except (ValueError, RecursionError) as error:
        raise BrokenExample(key, "not JSON", str(error)) from error


def _decoded(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenExample(key, "not UTF-8", f"byte {error.start}") from error


def parse_object(data: bytes, key: str) -> dict[str, Any]:
    """A JSON object. Raises `BrokenExample` if it is something else."""
    value = parse_json(data, key)
    if not isinstance(value, dict):
        raise BrokenExample(key, "not a JSON object", type(value).__name__)
    return value


EITHER = ("image", "images")  # the usual fields of a picture and of several; a record that has both has them once
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}={0,2}\s*")
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # of files of `PICTURES`


def picture(value: Any, root: str, key: str) -> EncodedImage | None:
    """The picture of a field: its bytes, Hugging Face's {"bytes", "path"}, a path below the folder `root`, base64, or
    a data URL. None for a null or an empty one. Whether a file exists shows when the picture is called.

    Raises:
        BrokenExample: the field is something else, a web address, or a path that is not below `root`.
    """
    if isinstance(value, Mapping):
        if not {"bytes", "path"} & value.keys():
            raise BrokenExample(key, "a picture of an unknown form", f"an object with {', '.join(map(str, value))}")
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return EncodedImage(bytes(value), key) if len(value) else None
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        about, comma, data = value[:100].partition(",")
        if about.startswith("data:") and comma and about.endswith(";base64"):
            return EncodedImage(functools.partial(_from_base64, value[len(about) + 1 :], key), key)
        if _BASE64.fullmatch(value) and _from_base64(value[:64], key).startswith(_BEGINNINGS):
            return EncodedImage(functools.partial(_from_base64, value, key), key)
        if storage.is_remote(value) or about.startswith("data:"):
            raise BrokenExample(key, "a picture by its address", f"{value}: download it and give its path")
    return picture_file(value, root, key)


def _from_base64(text: str, key: str) -> bytes:
    try:
        return base64.b64decode(text, b"-_" if "-" in text or "_" in text else None)
    except ValueError as error:
        raise BrokenExample(key, "a picture cannot be decoded", str(error)) from error


def picture_file(name: Any, root: str, key: str) -> EncodedImage:
    """The picture in the file `name` below the folder `root`. Whether it exists shows when it is called.

    Raises:
        BrokenExample: `name` is not a path below `root`.
    """
    if not storage.inside(sound(name, key) if isinstance(name, str) else None):
        raise BrokenExample(key, "a name outside its folder", str(name))
    return EncodedImage(functools.partial(_read_picture, storage.join(root, name), key), key)


def picture_files(fields: Mapping[str, Any], names: Sequence[str], root: str, key: str) -> list[EncodedImage | None]:
    """`picture` for every value in the fields `names`, each of which holds one or a list of them.

    A record with none of these fields has no picture; if it has some, one that it lacks counts as null. Of `EITHER`
    the field that is filled is taken.

    Raises:
        BrokenExample: as `picture`; or both fields of `EITHER` are filled, and neither holds what the other does.
    """
    if not any(name in fields for name in names):
        return []
    if tuple(names) == EITHER:
        filled = sorted((_listed(fields[name]) for name in names if _is_filled(fields.get(name))), key=len)
        if len(filled) == 2 and not all(one in filled[1] for one in filled[0]):
            raise BrokenExample(key, "two fields of pictures", "image and images differ: set images to one of them")
        values = filled[-1:] or [_listed(next(fields[name] for name in reversed(names) if name in fields))]
    else:
        values = [_listed(fields.get(name)) for name in names]
    return [picture(one, root, key) for value in values for one in value]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple)) and not value)


def _read_picture(path: str, key: str) -> bytes:
    with reading(key):
        try:
            return storage.read(path)
        except storage.Missing as error:
            raise BrokenExample(key, "a picture is missing", str(error)) from error


def unchanged(path: str, signature: str, key: str, reason: str = FILE_CHANGED) -> None:
    """Raises `BrokenExample` if a local file is no more what it was when it was opened; a bucket is not asked again."""
    if not storage.is_remote(path) and storage.signature(path) != signature:
        raise BrokenExample(key, reason, path)

"""JSON and JSON Lines: conversations in LLaVA's and ShareGPT's form, questions, captions; and folders of pictures."""

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import FILE_GONE, BrokenExample, Example, identity
from pisces_jax.data.formats.records import SPLITS, labels, locate, parse_json
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Recipe, Record, sound
from pisces_jax.utils.errors import UserError

BLOCK = 2**26  # bytes that are looked through at a time
_lock = threading.Lock()
CUT = -1  # in the place of an object's length: the file ends or breaks in it


class JsonRecords:
    """Records of JSON files (one array of objects) and JSON Lines files; `path` is a pattern or a list of them.

    `images` names the fields that hold a picture's path or a list of them, in the order that a recipe takes them;
    paths are relative to `image_root`, by default the file's own folder. A record may have no picture.

    Raises:
        UserError: a file is missing or holds no object.
    """

    names = None

    def __init__(
        self,
        path: str | Sequence[str],
        images: Sequence[str] = ("image", "images"),
        image_root: str | None = None,
        name: str = "json",
    ):
        self.paths = storage.expand(path)
        self._labels = labels(name, self.paths)
        self.images = tuple(images)
        self._kept: dict[str, bytes] = {}  # what remote files hold
        self.roots = [image_root if image_root is not None else one.rpartition("/")[0] or "." for one in self.paths]
        digest = hashlib.blake2b(digest_size=16)
        spans = []
        for path in self.paths:
            data = storage.read(path)
            if storage.is_remote(path):
                self._kept[path] = data
            digest.update(path.encode())
            digest.update(data)
            spans.append(_spans(data))
            _refuse_one_object(path, data, spans[-1])
            if not (spans[-1][:, 1] >= 0).any():
                raise UserError(f"{path} holds no JSON object, neither one a line nor in an array: change path")
        self._spans = np.concatenate(spans)
        self._ends = np.cumsum([len(each) for each in spans])
        self.fingerprint = f"{digest.hexdigest()}/{self.images}/{self.roots[0]}"

    def __len__(self) -> int:
        return len(self._spans)

    def object(self, i: int) -> tuple[dict[str, Any], int, str]:
        """Object i, its file's number, and its key."""
        file, number = locate(self._ends, i)
        key = f"{self._labels[file]}/{number + 1}"
        start, length = self._spans[i].tolist()
        if length == CUT:
            raise BrokenExample(key, "not JSON", f"{self.paths[file]} breaks off or goes wrong after byte {start}")
        try:
            data = self._bytes(self.paths[file], start, length)
        except storage.Unreachable as error:
            raise BrokenExample(key, FILE_GONE, str(error)) from error
        return parse_json(data, key), file, key

    def _bytes(self, path: str, start: int, length: int) -> bytes:
        if not storage.is_remote(path):
            return storage.read(path, start, length)
        with _lock:  # one thread fetches the file, whole: a request an object would take longer by far
            if path not in self._kept:
                self._kept[path] = storage.read(path)
        return self._kept[path][start : start + length]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # a worker process fetches them itself

    def __getitem__(self, i: int) -> Record:
        fields, file, key = self.object(i)
        return Record(key, fields, self.pictures(fields, file, key))

    def pictures(self, fields: dict[str, Any], file: int, key: str) -> list[EncodedImage]:
        return picture_files(fields, self.images, self.roots[file], key)


def picture_files(fields: dict[str, Any], names: Sequence[str], root: str, key: str) -> list[EncodedImage]:
    """The pictures whose paths below `root` stand in the fields of those names, one or a list in each.

    Raises:
        BrokenExample: a path leads out of `root`. A missing file is found out when its picture is called.
    """
    found: list[EncodedImage] = []
    for name in names:
        value = fields.get(name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is None or one == "":
                continue
            if not storage.inside(sound(one, key) if isinstance(one, str) else None):
                raise BrokenExample(key, "a name outside its folder", str(one))
            found.append(EncodedImage(functools.partial(_read, storage.join(root, one), key), key))
    return found


def _read(path: str, key: str) -> bytes:
    try:
        return storage.read(path)
    except storage.Missing as error:
        raise BrokenExample(key, "a picture is missing", path) from error
    except storage.Unreachable as error:
        raise BrokenExample(key, FILE_GONE, str(error)) from error


def _spans(data: bytes) -> np.ndarray:
    """Start and length of every object, int64 [N, 2]."""
    first = re.search(rb"\S", data[3:] if data[:3] == b"\xef\xbb\xbf" else data)
    if first is None:
        return np.zeros((0, 2), np.int64)
    return _array_spans(data) if first[0] == b"[" else _line_spans(data)


def _line_spans(data: bytes) -> np.ndarray:
    ends = _places(data, ord("\n"))
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1] + 1])
    spans = np.stack([starts, ends - starts], axis=1)
    maybe = np.isin(np.frombuffer(data, np.uint8)[starts], list(b" \t\r\n"))  # a blank line begins with a blank
    blank = [i for i in np.flatnonzero(maybe) if not data[spans[i, 0] : spans[i].sum()].strip()]
    return np.delete(spans, blank, axis=0).astype(np.int64)


def _refuse_one_object(path: str, data: bytes, spans: np.ndarray) -> None:
    """Raises `UserError` where a file of several lines is one object, as `{"annotations": [...]}` is."""
    if len(spans) < 2:
        return
    try:
        parse_json(data[spans[0, 0] : spans[0].sum()], path)
    except BrokenExample:
        try:
            whole = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(whole, dict):
            raise UserError(
                f"{path} is one object, of the fields {', '.join(whole)}: write the array in it, or an object a line"
            ) from None


def _places(data: bytes, byte: int) -> np.ndarray:
    """Where that byte is; by blocks, as comparing takes another byte for each."""
    array = np.frombuffer(data, np.uint8)
    starts = range(0, len(array), BLOCK)
    return np.concatenate([start + np.flatnonzero(array[start : start + BLOCK] == byte) for start in starts])


_SPACE = re.compile(r"[\s,]*")


def _array_spans(data: bytes) -> np.ndarray:
    # As Latin-1 a character is a byte, so that places in the text are places in the file; whether an object is
    # UTF-8 is looked at when it is read.
    text = data.decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    spans = []
    at = text.index("[") + 1
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            break
        try:
            _, end = decode(text, at)
        except (ValueError, RecursionError):
            spans.append((at, CUT))
            break
        spans.append((at, end - at))
        at = end
    return np.array(spans, np.int64).reshape(-1, 2)


class ImageFolder:
    """A source: a folder of pictures with `metadata.jsonl`, a JSON object a line with `file_name` and any fields.

    Hugging Face's convention; an edit's pictures are named by `images`. `split` is "train", "val" or "all"; a picture
    belongs to "val" by a hash of its name, so additions to the folder move nothing.

    Raises:
        UserError: the folder or its metadata is missing, no line of it can be used, or the split is empty.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        recipe: Recipe,
        split: str = "all",
        val_share: float = 0.1,
        images: Sequence[str] = ("file_name",),
    ):
        if split not in SPLITS:
            raise UserError(f"no split {split!r}: choose train, val or all")
        if not isinstance(val_share, (int, float)) or not 0 <= val_share <= 1:
            raise UserError(f"val_share={val_share!r} is no share: give a number from 0 to 1")
        self.path, self.recipe, self.split = os.fspath(path).rstrip("/"), recipe, split
        self.draws = recipe.draws
        try:
            metadata = storage.join(self.path, "metadata.jsonl")
            self._records = JsonRecords([metadata], images, self.path, Path(self.path).name)
        except storage.Unreachable as error:
            raise UserError(
                f"{storage.join(self.path, 'metadata.jsonl')} cannot be read: set path to an image folder"
            ) from error
        chosen, usable = [], 0
        for i in range(len(self._records)):
            try:
                name = _printable(self._records.object(i)[0].get(images[0], ""))
                usable += 1
            except BrokenExample:
                name = str(i)  # it is counted where it is read
            if split == "all" or (_share(name) < val_share) == (split == "val"):
                chosen.append(i)
        if not usable:
            raise UserError(f"no line of {self.path}/metadata.jsonl is a JSON object: mend it")
        if not chosen:
            raise UserError(f"the split {split!r} of image folder {path} is empty: add pictures or change the split")
        self._chosen = np.array(chosen, np.int64)
        fields = next(filter(None, (self._fields(i) for i in chosen)), None)
        if fields is not None:
            recipe.check(fields)
        self.fingerprint = f"{self._records.fingerprint}/{split}/{val_share}/{recipe}"
        self.pictures_fingerprint = f"{self._records.fingerprint}/{split}/{val_share}/{recipe.pictures}"

    def _fields(self, i: int) -> list[str]:
        try:
            return list(self._records.object(i)[0])
        except BrokenExample:
            return []

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> Example:
        fields, _, key = self._records.object(int(self._chosen[i]))
        name = fields.get(self._records.images[0])
        if not name:
            raise BrokenExample(key, "a field is missing", self._records.images[0])
        key = f"{Path(self.path).name}/{_printable(name)}"
        return self.recipe.example(Record(key, fields, self._records.pictures(fields, 0, key)))


def _printable(name: Any) -> str:
    return str(name).encode("utf-8", "replace").decode()


def _share(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    low, high = identity(name).tolist()
    return (low + (high << 32)) / 2**64

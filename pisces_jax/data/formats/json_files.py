"""JSON and JSON Lines files: conversations in LLaVA's or ShareGPT's form, questions, captions."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import BrokenExample
from pisces_jax.data.formats.records import EITHER, labels, locate, parse_object, picture_files, reading, unchanged
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError, cut
from pisces_jax.utils.files import SNIFFED, sniff

CUT = -1  # the length of what follows a place where the file ends or breaks within an object
_lock = threading.Lock()


class JsonRecords:
    """Records of JSON files (arrays of objects) and JSON Lines files; `path` is a pattern or a list of them.

    `images` names the fields that hold a picture or a list of them (`records.picture`), in the order in which a recipe
    takes them; by default it is "image" or "images", whichever is filled. Paths are relative to `image_root`, by
    default the file's own folder. A record may have no picture.

    Raises:
        UserError: a file is missing or holds no object.
    """

    names = None
    remote = False  # a remote file is fetched once, as a whole

    def __init__(
        self,
        path: str | Sequence[str],
        images: Sequence[str] = EITHER,
        image_root: str | None = None,
        name: str = "json",
    ):
        self.paths, self.images = storage.expand(path), tuple(images)
        self._labels = labels(name, self.paths)
        self._fetched: dict[str, bytes] = {}  # the contents of remote files
        self.roots = [image_root if image_root is not None else one.rpartition("/")[0] or "." for one in self.paths]
        digest = hashlib.blake2b(digest_size=16)
        spans = []
        self._signatures = [storage.signature(one) for one in self.paths]
        for one in self.paths:
            data = storage.read(one)
            if (meaning := sniff(data[:SNIFFED])) is not None:
                raise UserError(f"{one} is {meaning}, not JSON")
            if storage.is_remote(one):
                self._fetched[one] = data
            digest.update(one.encode(errors="surrogatepass"))
            digest.update(data)
            spans.append(_spans(data))
            _refuse_one_object(one, data, spans[-1], self.images)
            if not (spans[-1][:, 1] >= 0).any():
                raise UserError(f"{one} holds no JSON object, neither one per line nor in an array: change path")
        self._spans = np.concatenate(spans)
        self._ends = np.cumsum([len(each) for each in spans])
        self.fingerprint = f"{digest.hexdigest()}/{self.images}/{self.roots[0]}"

    def __len__(self) -> int:
        return len(self._spans)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fetched": {}}  # a worker process fetches them itself

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        found, file, key = self.object(i)
        return Record(key, found, picture_files(found, self.images, self.roots[file], key))

    def object(self, i: int) -> tuple[dict[str, Any], int, str]:
        """Object i, the number of its file, and its key.

        Raises:
            BrokenExample: it cannot be read.
        """
        file, number = locate(self._ends, i)
        path, key = self.paths[file], f"{self._labels[file]}/{number + 1}"
        start, length = self._spans[i].tolist()
        if length == CUT:
            raise BrokenExample(key, "not JSON", f"{path} ends or is damaged after byte {start}")
        with reading(key):
            if not storage.is_remote(path):
                unchanged(path, self._signatures[file], key)
                data = storage.read(path, start, length)
            else:
                with _lock:  # one thread fetches the whole file: a request per object would take far longer
                    if path not in self._fetched:
                        self._fetched[path] = storage.read(path)
                data = self._fetched[path][start : start + length]
        return parse_object(data, key), file, key


def _spans(data: bytes) -> np.ndarray:
    """Start and length in bytes of every object, int64 [N, 2]."""
    first = re.search(rb"\S", data[3:] if data[:3] == b"\xef\xbb\xbf" else data)
    if first is None:
        return np.zeros((0, 2), np.int64)
    return _array_spans(data) if first[0] == b"[" else _line_spans(data)


def _line_spans(data: bytes) -> np.ndarray:
    """Of the lines that are not blank, without their line feeds."""
    lengths = np.fromiter(map(len, io.BytesIO(data)), np.int64)
    starts = np.cumsum(lengths) - lengths
    lengths -= 1
    lengths[-1] += not data.endswith(b"\n")
    spans = np.stack([starts, lengths], axis=1)
    maybe = np.isin(np.frombuffer(data, np.uint8)[starts], list(b" \t\r\n"))  # a blank line begins with a blank
    blank = [i for i in np.flatnonzero(maybe) if not data[spans[i, 0] : spans[i].sum()].strip()]
    return np.delete(spans, blank, axis=0)


_BETWEEN = re.compile(r"[\s,]*")


def _array_spans(data: bytes) -> np.ndarray:
    # In Latin-1 a character is a byte, so that places in the text are places in the file. Whether an object is UTF-8
    # is checked when it is read.
    text = data.decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    spans = []
    at = text.index("[") + 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            at = _BETWEEN.match(text, at + 1).end()  # type: ignore[union-attr]
            if at == len(text):
                break
            if text[at] == "[":  # another array, as in a file with an array a line
                at += 1
                continue
        try:
            _, end = decode(text, at)
        except (ValueError, RecursionError):
            spans.append((at, CUT))
            break
        spans.append((at, end - at))
        at = end
    return np.array(spans, np.int64).reshape(-1, 2)


_LISTS = ("conversations", "messages", "texts", *EITHER)  # lists of objects that belong to one record


def _refuse_one_object(path: str, data: bytes, spans: np.ndarray, images: Sequence[str]) -> None:
    """Raises `UserError` where the whole file is one object around its records, such as `{"annotations": [...]}`."""
    if not len(spans) or spans[0, 1] == CUT:
        return
    try:
        whole = parse_object(data[spans[0, 0] : spans[0].sum()], path)
        if len(spans) > 1 or any(isinstance(whole.get(name), str) for name in images):
            return
        if not any(_is_records(value) for name, value in whole.items() if name not in _LISTS):
            return
    except BrokenExample:
        try:
            whole = json.loads(data)
        except (ValueError, RecursionError):
            return
    if not isinstance(whole, dict):
        return
    if _is_records(whole.get("annotations")) and _is_records(whole.get("images")):
        known = next((name for name in ("caption", "text") if name in whole["annotations"][0]), "text")
        advice = (
            "this is COCO's layout: for each annotation write a line with the file_name of its picture, such as "
            f'{{"image": "000000000009.jpg", "{known}": "..."}}'
        )
    else:
        advice = "write only its array, or one object per line"
    raise UserError(f"{path} is one object with the fields {cut(', '.join(whole))}: {advice}")


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, dict) for one in value)

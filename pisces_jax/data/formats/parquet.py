"""Parquet files as Hugging Face writes them, in which a picture is a struct of `bytes` and `path`.

To read one row is to read the row group that holds it, so the groups used last are kept. Small groups make random
access fast; Hugging Face writes 100 rows per group where there are pictures.
"""

import collections
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import BrokenExample
from pisces_jax.data.formats.records import labels, locate, picture, reading, unchanged
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import SNIFFED, sniff

KEPT_BYTES = 256 * 2**20  # of row groups, in each process


class Parquet:
    """Records of Parquet files; `path` is a pattern or a list of them, `images` names the columns of pictures.

    Such a column holds one picture or a list of them (`records.picture`). Paths are relative to `image_root`, by
    default the file's own folder. Labels are given by the names that Hugging Face's schema has for them.

    Raises:
        UserError: a file is missing, is not a Parquet file, or lacks a column.
    """

    remote = False  # one thread reads a whole row group: more of them would wait

    def __init__(
        self,
        path: str | Sequence[str],
        images: Sequence[str] = ("image",),
        image_root: str | None = None,
        name: str = "parquet",
    ):
        self.paths, self.images = storage.expand(path), tuple(images)
        self._labels = labels(name, self.paths)
        self.names: Sequence[str] = []
        self._groups = []  # for each file, the cumulative numbers of rows of its row groups
        self._signatures = [storage.signature(one) for one in self.paths]
        self._features: list[Mapping[str, Any]] = []  # of each file's columns
        self.roots = [image_root if image_root is not None else one.rpartition("/")[0] or "." for one in self.paths]
        words = [] if image_root is None else [image_root]
        for one, signature in zip(self.paths, self._signatures, strict=True):
            words += [one, signature]
            file = _open(one)
            self._features.append(_features(file.schema_arrow.metadata))
            columns = file.schema_arrow.names
            missing = [column for column in self.images if column not in columns]
            if missing:
                raise UserError(f"{one} has no column {missing[0]!r}, only {', '.join(columns)}: set images")
            self.names = [column for column in columns if column not in self.images]
            rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            self._groups.append(np.cumsum([0, *rows])[1:])
        self._ends = np.cumsum([groups[-1] if len(groups) else 0 for groups in self._groups])
        if not self._ends[-1]:
            raise UserError(f"{self.paths[0]} holds no row: change path")
        self.fingerprint = f"{storage.digest([*words, ''])}/{self.images}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        file, number = locate(self._ends, i)
        group, row = locate(self._groups[file], number)
        path, key = self.paths[file], f"{self._labels[file]}/{number}"
        with reading(key, damaged="a damaged row group"):
            unchanged(path, self._signatures[file], key)
            columns = _group(path, self._signatures[file], group)
        features = self._features[file]
        try:
            values = {name: _named(column[row].as_py(), features.get(name)) for name, column in columns.items()}
        except UnicodeDecodeError as error:
            raise BrokenExample(key, "not UTF-8", str(error)) from error
        pictures: list[EncodedImage | None] = []
        for name in self.images:
            value = values.pop(name)
            pictures += [picture(one, self.roots[file], key) for one in (value if isinstance(value, list) else [value])]
        return Record(key, values, pictures)


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """What Hugging Face's `datasets` says of each column in the schema, as {"_type": "ClassLabel", "names": [...]}."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(value: Any, feature: Any) -> Any:
    """A value with the names of its labels in place of their numbers; a label without a name is None."""
    if isinstance(feature, list):  # an older spelling of a list
        feature = {"feature": feature[0] if feature else None}
    if not isinstance(feature, dict) or value is None:
        return value
    if feature.get("_type") == "ClassLabel" and isinstance(names := feature.get("names"), list):
        known = isinstance(value, int) and 0 <= value < len(names)  # a hidden label is -1
        return str(names[value]).replace("_", " ") if known else None
    if isinstance(value, list) and "feature" in feature:
        return [_named(one, feature["feature"]) for one in value]
    if isinstance(value, dict):
        inner = feature.get("feature", feature)  # a sequence of structs may be stored as a struct of lists
        inner = inner if isinstance(inner, dict) else {}
        return {
            name: [_named(o, inner.get(name)) for o in one]
            if isinstance(one, list) and inner is not feature
            else _named(one, inner.get(name))
            for name, one in value.items()
        }
    return value


def _open(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(_source(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise _failed(path, error) from error


def _source(path: str) -> Any:
    """What Arrow opens itself, which is faster, by its path: local files whose names are UTF-8."""
    import pyarrow

    try:
        path.encode()
    except UnicodeEncodeError:
        own = False
    else:
        own = not storage.is_remote(path)
    return path if own else pyarrow.PythonFile(storage.File(path), mode="r")


def _failed(path: str, error: Exception) -> UserError:
    """`storage.Unreachable` if it is the storage that failed, a plain `UserError` of a damaged file."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        meaning = sniff(storage.read(path, 0, SNIFFED))
    except storage.Unreachable as unreachable:
        return unreachable
    if meaning:
        return UserError(f"{path} is {meaning}, not a Parquet file")
    # Arrow raises OSError for damaged bytes too, but then without an error number of the system.
    kind = storage.Unreachable if getattr(error, "errno", None) else UserError
    return kind(f"{path} cannot be read as a Parquet file ({reason}): fix or remove it")


_lock = threading.Lock()
_kept: collections.OrderedDict[tuple[str, str, int], tuple[dict[str, Any], int]] = collections.OrderedDict()


def _group(path: str, signature: str, group: int) -> dict[str, Any]:
    """The columns of a row group of the file as `signature` says. One thread at a time reads; others find it kept."""
    import pyarrow

    place = path, signature, group
    with _lock:
        found = _kept.get(place)
        if found is None:
            try:
                table = _open(path).read_row_group(group)
            except (OSError, pyarrow.ArrowException) as error:
                raise _failed(path, error) from error
            found = {name: table.column(name) for name in table.column_names}, table.nbytes
            _kept[place] = found
        _kept.move_to_end(place)
        while len(_kept) > 1 and sum(size for _, size in _kept.values()) > KEPT_BYTES:
            _kept.popitem(last=False)
        return found[0]

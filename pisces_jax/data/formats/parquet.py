"""Parquet files as Hugging Face writes them, in which a picture is a struct of `bytes` and `path`.

To read one row is to read the row group that holds it, so the groups used last are kept. Small groups make random
access fast; Hugging Face writes 100 rows per group where there are pictures.
"""

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import BrokenExample
from pisces_jax.data.formats.records import encoded, labels, locate, picture_file, reading
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError

KEPT_BYTES = 256 * 2**20  # of row groups, in each process


class Parquet:
    """Records of Parquet files; `path` is a pattern or a list of them, `images` names the columns of pictures.

    Such a column holds one picture or a list of them, each as its bytes or as a path beside the file.

    Raises:
        UserError: a file is missing, is not a Parquet file, or lacks a column.
    """

    remote = False  # one thread reads a whole row group: more of them would wait

    def __init__(self, path: str | Sequence[str], images: Sequence[str] = ("image",), name: str = "parquet"):
        self.paths, self.images = storage.expand(path), tuple(images)
        self._labels = labels(name, self.paths)
        self.names: Sequence[str] = []
        self._groups = []  # for each file, the cumulative numbers of rows of its row groups
        words = []
        for one in self.paths:
            words += [one, storage.signature(one)]
            file = _open(one)
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
            columns = _group(path, group)
        try:
            values = {name: column[row].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            raise BrokenExample(key, "not UTF-8", str(error)) from error
        pictures: list[EncodedImage] = []
        for name in self.images:
            value = values.pop(name)
            for one in value if isinstance(value, list) else [value]:
                pictures += [_picture(one, path, key)] if one is not None else []
        return Record(key, values, pictures)


def _picture(value: Any, path: str, key: str) -> EncodedImage:
    name = value.get("path") if isinstance(value, dict) and not value.get("bytes") else None
    return encoded(value, key) if name is None else picture_file(name, path.rpartition("/")[0] or ".", key)


def _open(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.PythonFile(storage.File(path), mode="r") if storage.is_remote(path) else path
        return pyarrow.parquet.ParquetFile(source)
    except (OSError, pyarrow.ArrowException) as error:
        raise _failed(path, error) from error


def _failed(path: str, error: Exception) -> UserError:
    """`storage.Unreachable` if it is the storage that failed, a plain `UserError` of a damaged file."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Arrow raises OSError for damaged bytes too, but then without an error number of the system.
    kind = storage.Unreachable if getattr(error, "errno", None) else UserError
    return kind(f"{path} cannot be read as a Parquet file ({reason}): fix or remove it")


_lock = threading.Lock()
_kept: collections.OrderedDict[tuple[str, int], tuple[dict[str, Any], int]] = collections.OrderedDict()


def _group(path: str, group: int) -> dict[str, Any]:
    """The columns of a row group. One thread at a time reads; the others find it kept."""
    import pyarrow

    with _lock:
        found = _kept.get((path, group))
        if found is None:
            try:
                table = _open(path).read_row_group(group)
            except (OSError, pyarrow.ArrowException) as error:
                raise _failed(path, error) from error
            found = {name: table.column(name) for name in table.column_names}, table.nbytes
            _kept[path, group] = found
        _kept.move_to_end((path, group))
        while len(_kept) > 1 and sum(size for _, size in _kept.values()) > KEPT_BYTES:
            _kept.popitem(last=False)
        return found[0]

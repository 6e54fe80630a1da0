"""Parquet files as Hugging Face writes them: a picture is a struct of `bytes` and `path`.

Reading one row reads the row group that holds it, so the groups used last are kept. Small groups make random access
fast; Hugging Face writes 100 rows a group where there are pictures.
"""

import collections
import functools
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pisces_jax.data import storage
from pisces_jax.data.example import FILE_GONE, BrokenExample
from pisces_jax.data.formats.records import encoded, labels
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError

KEPT_BYTES = 256 * 2**20  # of row groups, in each process


class Parquet:
    """Records of Parquet files. `path` is a pattern or a list of them; `images` names the columns of pictures.

    A column may hold one picture or a list of them, each with its bytes or a path beside the file.

    Raises:
        UserError: a file is missing or no Parquet file, or lacks a column.
    """

    def __init__(self, path: str | Sequence[str], images: Sequence[str] = ("image",), name: str = "parquet"):
        self.paths, self.images = storage.expand(path), tuple(images)
        self._labels = labels(name, self.paths)
        rows, digest = [], hashlib.blake2b(digest_size=16)
        self.names: Sequence[str] = []
        for number, one in enumerate(self.paths):
            digest.update(f"{one}\0{storage.signature(one)}\0".encode())
            file = _open(one)
            names = file.schema_arrow.names
            missing = [name for name in self.images if name not in names]
            if missing:
                raise UserError(f"{one} has no column {missing[0]!r}, only {', '.join(names)}: set images")
            self.names = [name for name in names if name not in self.images]
            groups = file.metadata.num_row_groups
            rows += [(number, group, file.metadata.row_group(group).num_rows) for group in range(groups)]
        self._groups = np.array(rows, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self._ends) or not self._ends[-1]:
            raise UserError(f"{self.paths[0]} holds no row: change path")
        self.fingerprint = f"{digest.hexdigest()}/{self.images}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        place = int(np.searchsorted(self._ends, i, side="right"))
        file, group, rows = self._groups[place].tolist()
        row = i - (int(self._ends[place]) - rows)
        path = self.paths[file]
        key = f"{self._labels[file]}/{i - self._first(file)}"
        try:
            values = {name: column[row].as_py() for name, column in _group(path, group).items()}
        except storage.Unreachable as error:
            raise BrokenExample(key, FILE_GONE, str(error)) from error
        except UserError as error:
            raise BrokenExample(key, "a damaged row group", str(error)) from error
        except UnicodeDecodeError as error:
            raise BrokenExample(key, "not UTF-8", str(error)) from error
        pictures: list[EncodedImage] = []
        for name in self.images:
            value = values.pop(name)
            for one in value if isinstance(value, list) else [value]:
                pictures += [self._picture(one, path, key)] if one is not None else []
        return Record(key, values, pictures)

    def _first(self, file: int) -> int:
        place = int(np.searchsorted(self._groups[:, 0], file))
        return int(self._ends[place - 1]) if place else 0

    @staticmethod
    def _picture(value: Any, path: str, key: str) -> EncodedImage:
        name = value.get("path") if isinstance(value, dict) and not value.get("bytes") else None
        if name is None:
            return encoded(value, key)
        if not storage.inside(name):
            raise BrokenExample(key, "a name outside its folder", name)
        folder = path.rpartition("/")[0] or "."
        return EncodedImage(functools.partial(_picture_file, storage.join(folder, name), key), key)


def _picture_file(path: str, key: str) -> bytes:
    try:
        return storage.read(path)
    except storage.Missing as error:
        raise BrokenExample(key, "a picture is missing", path) from error
    except storage.Unreachable as error:
        raise BrokenExample(key, FILE_GONE, str(error)) from error


class _Remote:
    """A remote file for Arrow, with our time limits."""

    def __init__(self, path: str):
        self._path, self._size, self._at, self.closed = path, storage.size(path), 0, False

    def read(self, length: int = -1) -> bytes:
        data = storage.read(self._path, self._at, length if length >= 0 else self._size - self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _open(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.PythonFile(_Remote(path), mode="r") if storage.is_remote(path) else path
        return pyarrow.parquet.ParquetFile(source)
    except (OSError, pyarrow.ArrowException) as error:
        raise _failed(path, error) from error


def _failed(path: str, error: Exception) -> UserError:
    """Of a damaged file a `UserError`; `storage.Unreachable` where it is the storage that failed."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Arrow raises OSError for damaged bytes too, but to that the system has given no number.
    kind = storage.Unreachable if getattr(error, "errno", None) else UserError
    return kind(f"{path} cannot be read as a Parquet file ({reason}): mend or remove it")


_lock = threading.Lock()
_kept: collections.OrderedDict[tuple[str, int], tuple[dict[str, Any], int]] = collections.OrderedDict()


def _group(path: str, group: int) -> dict[str, Any]:
    """The columns of a row group; one thread at a time reads, the others find it kept."""
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

"""Random access to the records of ArrayRecord files, of which a process keeps only a few open.

array_record's own data source (which Grain and TensorFlow Datasets use) keeps every file open that it has read, and
goes on reading a file that was replaced.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pisces_jax.data import storage
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import SNIFFED, sniff

OPEN_READERS = 64  # each has a descriptor


class Span(NamedTuple):
    """`length` records of a file, from record `first`."""

    path: str
    first: int
    length: int


class RecordFiles:
    """The records of several spans, one span after the other; picklable. Files are opened when they are read."""

    def __init__(self, spans: Sequence[Span]):
        self._spans = list(spans)
        self._ends = np.cumsum([span.length for span in spans], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._spans else 0

    def __getitem__(self, i: int) -> bytes:
        """
        Raises:
            storage.Unreachable: the file is gone or cannot be read.
            UserError: the record is damaged.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        path, first, length = self._spans[place := int(np.searchsorted(self._ends, i, side="right"))]
        position = first + i - int(self._ends[place]) + length
        try:
            return _reader(path, storage.signature(path)).read([position])[0]
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # "Corrupted" is what the library says of wrong bytes; anything else may be a failure of the storage.
            kind = UserError if "Corrupted" in reason else storage.Unreachable
            raise kind(f"record {position} of {path} cannot be read ({reason}): fix or replace the file") from error


def count_records(path: str) -> int:
    """How many records a file holds.

    Raises:
        UserError: it is missing, or not a complete ArrayRecord file.
    """
    reader = _reader(path, storage.signature(path))
    if not reader.ok():  # it would count none
        if (meaning := sniff(storage.read(path, 0, SNIFFED))) is not None:
            raise UserError(f"{path} is {meaning}, not an ArrayRecord file")
        raise UserError(f"{path} cannot be read as ArrayRecord: fix or remove it, or change path")
    return reader.num_records()


# With the signature among the arguments, a file that was replaced is opened again. A reader that the cache drops lives
# on until nobody reads with it.
@functools.lru_cache(OPEN_READERS)
def _reader(path: str, signature: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(os.fsencode(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768)

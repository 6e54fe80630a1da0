"""Named arrays in one file that is memory-mapped: indices and lengths, shared by all worker processes of a machine."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic

_MAGIC = b"pisces-arrays-1\n"
_ALIGN = 64


class Stored(np.ndarray):
    """An array that is a view of a file: it is pickled as the file's name, so worker processes share its memory."""

    place: tuple[str, str] | None = None  # of slices and results None: they pickle as any array

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.place is None else (_reopen, self.place)


def _reopen(path: str, name: str) -> np.ndarray:
    found = read_arrays(path)
    if found is None:
        raise UserError(f"{path} is gone: start again, and it is made again")
    return found[1][name]


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes all of it or nothing. `about` is anything that JSON holds."""
    described, start = {}, 0
    for name, array in arrays.items():
        described[name] = [array.dtype.str, list(array.shape), start]
        start += -(-array.nbytes // _ALIGN) * _ALIGN
    header = json.dumps({"about": dict(about), "arrays": described, "bytes": start}).encode()
    pieces: list[bytes | memoryview] = [_MAGIC, struct.pack("<Q", len(header)), header]
    pieces.append(bytes(-sum(map(len, pieces)) % _ALIGN))
    for array in arrays.values():
        pieces += [np.ascontiguousarray(array).data.cast("B") if array.size else b"", bytes(-array.nbytes % _ALIGN)]
    write_atomic(path, pieces)


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What `write_arrays` wrote, the arrays as read-only views of the file; None where no whole file of that form is.

    Only the pages that are looked at are read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            total = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0]
            if length > total:
                return None
            header = json.loads(file.read(length))
            start = -(-file.tell() // _ALIGN) * _ALIGN
            if total < start + header["bytes"]:
                return None
            data = np.memmap(file, np.uint8, "r", start, header["bytes"]) if header["bytes"] else np.zeros(0, np.uint8)
    except (OSError, ValueError, KeyError, struct.error):
        return None
    arrays = {}
    for name, (dtype, shape, offset) in header["arrays"].items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        array = data[offset : offset + size].view(dtype).reshape(shape).view(Stored)
        array.place = os.path.abspath(path), name
        arrays[name] = array
    return header["about"], arrays

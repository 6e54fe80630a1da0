"""Named arrays in one memory-mapped file: the lengths and indices that all worker processes of a machine share.

The files have the safetensors format. Its library writes and checks them, but reading with it copies every array into
each process, so the views are made here.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import replacing

log = logging.getLogger(__name__)
_KINDS = {"I": "int", "U": "uint", "F": "float"}  # "U16" is np.uint16


class Stored(np.ndarray):
    """A view of a file. It is pickled as the file's name, so worker processes share its memory."""

    place: tuple[str, str] | None = None  # None for slices and results, which pickle like any array

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.place is None else (_reopen, self.place)


def _reopen(path: str, name: str) -> np.ndarray:
    found = read_arrays(path, check=False)  # the process that sent it has checked it
    if found is None:
        raise UserError(f"{path} is gone: start again to make it anew")
    return found[1][name]


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file atomically; `about` is any JSON.

    Raises:
        OSError: the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        try:
            text = json.dumps(about)
            save_file(contiguous, temporary, {"about": text, "checksum": _checksum(text, contiguous)})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number) if code else str(error)) from error


def _checksum(about: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()


def read_arrays(path: str | os.PathLike, *, check: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What `write_arrays` wrote, the arrays as read-only views; None for a missing file, one that is cut or damaged, or
    another format: the caller makes it anew.

    Args:
        check: reads all of it once, and compares it with its checksum (files from before there were any pass). Without,
            only the pages that are used are read from the disk.
    """
    try:
        with safe_open(path, "numpy") as file:  # checks the header and the file's size
            metadata = file.metadata()
            about = json.loads(metadata["about"])
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        del header["__metadata__"]
        arrays = {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            dtype = np.dtype(_KINDS[entry["dtype"][0]] + entry["dtype"][1:])
            array = data[start + first : start + end].view(dtype).reshape(entry["shape"]).view(Stored)
            array.place = os.path.abspath(path), name
            arrays[name] = array
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    known = metadata.get("checksum")
    if check and known is not None and known != _checksum(metadata["about"], arrays):
        log.warning("%s is damaged: it is not used, and made anew", path)
        return None
    return about, arrays

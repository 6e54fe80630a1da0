"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomic(path: Path, data: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Writes the whole file or none of it, with the permissions of any new file; makes its folder.

    `data` may also be pieces, to be written one after the other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(data, str):
                data = data.encode()
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
        os.chmod(temporary, 0o666 & ~umask())  # a temporary file is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The process's mask of permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def synchronize(path: Path) -> None:
    """Waits until a file is on its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Atomic writes: a file appears with its whole content, or not at all."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives an empty temporary file beside `path`, which replaces `path` if the block ends without an error.

    The parent folder is created. The temporary file's name is unique among all processes on all hosts that share the
    folder. The new file has the default permissions of the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp lets only the owner read it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def synchronize(path: Path) -> None:
    """Returns when the content of a file is on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file atomically; `data` may be an iterable of pieces, written one after the other."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if isinstance(data, str):
            data = data.encode()
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)

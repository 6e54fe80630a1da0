"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, to be written in the block, that takes its place when the block ends well.

    It has the permissions of any new file, and a name of its own among all processes on all hosts that share the
    folder, which is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
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


def write_atomic(path: Path, data: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Writes the whole file or none of it; `data` may also be pieces, to be written one after the other."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if isinstance(data, str):
            data = data.encode()
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)

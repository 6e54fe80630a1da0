"""A folder that can be believed: its manifest has the size and SHA-256 of every file in it, and a hash of itself.

Its first line is JSON with `files` (path -> [bytes, SHA-256]), its second the SHA-256 of the first.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pisces_jax.utils.files import sha256

MANIFEST = "MANIFEST"
THREADS = 8
# Smaller files are checked before anything is read by them: they say how the large ones are read.
SMALL = 2**20


def write_manifest(folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Hashes every file below `folder`, many at once, and writes the manifest last. `about` is any JSON.

    What was hashed is on the disk before the manifest is.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda path: sha256(path, on_disk=True), paths))
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(paths, hashes, strict=True)
    }
    line = json.dumps({**(about or {}), "files": files}, sort_keys=True)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        ValueError: the manifest is not what was written.
        OSError: it is missing or cannot be read.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")  # a UnicodeDecodeError is a ValueError
    line, _, rest = text.partition("\n")
    if rest != f"{hashlib.sha256(line.encode()).hexdigest()}\n":
        raise ValueError("its second line is not the hash of the first")
    return json.loads(line)


def wrong_size(folder: Path, files: Mapping[str, Any]) -> str | None:
    """The first file that is missing or of another size than the manifest's `files` say, in words; None without one."""
    for name, (size, _) in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
    return None


def wrong_content(folder: Path, files: Mapping[str, Any], names: Iterable[str] | None = None) -> str | None:
    """The first of the files `names` (by default all) whose content is not what was written, in words; None without."""

    def check(name: str) -> str | None:
        try:
            return None if sha256(folder / name) == files[name][1] else f"{name} has other content"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(check, files if names is None else names)), None)

"""Paths as users give them, atomic writes (a file appears whole or not at all), and what a file really is."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pisces_jax.utils.errors import UserError


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~name` written out, whoever gives it: a shell does so only where a word begins.

    Raises:
        UserError: nobody knows that home folder.
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path and not os.path.exists(path):
        raise UserError(f"{path} names a home folder that this machine does not know: give the whole path")
    return expanded


def local_path(text: str) -> Path:
    """A path on this machine, with `~` expanded: for everything that is not read through `data.storage`.

    Raises:
        UserError: it is the address of a bucket or web page, or in a home folder that nobody knows.
    """
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        raise UserError(f"{text} is not on this machine: give a local path, such as a folder where it is mounted")
    return Path(expand_home(text))


def user_cache(name: str) -> Path | None:
    """The user's folder for what can be made again; None for a user without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pisces_jax" / name
    except RuntimeError:  # no HOME, and the system does not know the user
        return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives an empty temporary file beside `path`, which replaces `path` if the block ends without an error.

    The parent folder is created. The temporary file's name is unique among all processes on all hosts that share the
    folder. The new file has the default permissions of the process.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp lets only the owner read it
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            error.filename = str(path)  # which the user knows; a write that fails names no file at all
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


_BLOCK = 2**20  # bytes read at a time


def sha256(path: Path, *, on_disk: bool = False) -> str:
    """The SHA-256 of a file's content; with `on_disk`, once the content is on the disk.

    Raises:
        OSError: it cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
        if on_disk:
            os.fsync(file.fileno())
    return digest.hexdigest()


def checksum_of(path: Path) -> Path:
    """The file beside `path` with its SHA-256, as `sha256sum` writes and checks it."""
    return path.with_name(f"{path.name}.sha256")


def write_checksum(content: Path, path: Path) -> None:
    """Writes the checksum of `path`, whose content is that of `content`: before that file takes its name."""
    write_atomic(checksum_of(path), f"{sha256(content)}  {path.name}\n")


def is_as_written(path: Path) -> bool:
    """Whether a file has the checksum that stands beside it, or none does."""
    try:
        known = checksum_of(path).read_text(errors="replace")
    except FileNotFoundError:
        return True
    return known.split()[:1] == [sha256(path)]


SNIFFED = 512  # bytes that `sniff` looks at

# What files turn out to be where another format was expected, by their first bytes.
_BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer without the data (run git lfs pull)"),
    (b"\x1f\x8b", "compressed by gzip (unpack it)"),
    (b"BZh", "compressed by bzip2 (unpack it)"),
    (b"\xfd7zXZ", "compressed by xz (unpack it)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd (unpack it)"),
    (b"\x04\x22\x4d\x18", "compressed by lz4 (unpack it)"),
    (b"PK\x03\x04", "a zip archive (unpack it), or a pickle of PyTorch"),
    (b"\xff\xfe", "text in UTF-16 (convert it to UTF-8)"),
    (b"\xfe\xff", "text in UTF-16 (convert it to UTF-8)"),
)
_UTF16 = re.compile(rb"[\[{\"<]\0[^\0]\0|\0[\[{\"<]\0[^\0]")  # without a mark
_PAGE = re.compile(rb"\s*<(!doctype html|html|head|\?xml)", re.IGNORECASE)


def sniff(first_bytes: bytes) -> str | None:
    """What a file that a reader refused really is, for the reader's message; None if nothing odd is seen.

    To be asked after the reader failed: a safetensors file whose header has 65,279 bytes begins as UTF-16 does.

    Args:
        first_bytes: the beginning of the file, `SNIFFED` bytes or more where it has them.

    Returns:
        The end of a sentence that begins with the file's name and "is", such as "a git-lfs pointer ...".
    """
    for beginning, meaning in _BEGINNINGS:
        if first_bytes.startswith(beginning):
            return meaning
    if _UTF16.match(first_bytes):
        return _BEGINNINGS[-1][1]
    start = first_bytes.removeprefix(b"\xef\xbb\xbf")
    if _PAGE.match(start):
        return "a web page (the download failed: fetch the file itself)"
    if first_bytes and not first_bytes[:SNIFFED].strip(b"\0"):
        return "only zeros (the download broke off: fetch it again)"
    return None

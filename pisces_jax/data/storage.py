"""Bytes from local paths and from buckets (`gs://` and whatever else fsspec knows), with time limits and retries.

A remote request asks for at most `BLOCK` bytes. One that takes longer than `TIME_LIMIT` is abandoned and repeated, up
to `ATTEMPTS` times with growing pauses. So nothing waits for ever, and a large file may still come over a slow line.
Credentials are the user's own, as gcsfs finds them.
"""

import concurrent.futures
import errno
import glob
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from pisces_jax.utils.errors import UserError, cut

TIME_LIMIT = 30.0  # seconds for one remote request
BLOCK = 2**24  # bytes in one request
ATTEMPTS = 4
# A name that is no file's, now or another time.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)

T = TypeVar("T")


class Unreachable(UserError):
    """A file that does not exist or cannot be read; the message names it."""


class Missing(Unreachable):
    """A file that does not exist."""


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def inside(name: Any) -> bool:
    """Whether `name` is a relative path that stays below its folder."""
    if not isinstance(name, str) or not name or os.path.isabs(name) or "\0" in name or is_remote(name):
        return False
    return os.path.normpath(name).split(os.sep)[0] not in ("..", ".")


def expand(pattern: str | os.PathLike | Sequence[str]) -> list[str]:
    """The paths of one pattern or several: `{00..99}` and `{a,b}` are written out, `*` is looked up and sorted.

    What exists is taken as it is: `[1]` in the name of a folder is no pattern.

    Raises:
        UserError: no file matches.
    """
    patterns = [os.fspath(one) for one in ([pattern] if isinstance(pattern, (str, os.PathLike)) else pattern)]
    paths: list[str] = []
    for each in patterns:
        known = _existing(each)
        for rest in _braces(each[len(known) :]):
            if not re.search(r"[*?\[]", rest):
                paths.append(known + rest)
            elif is_remote(each):
                find = lambda system, inner: map(system.unstrip_protocol, sorted(system.glob(inner)))  # noqa: E731
                paths += _request(known + rest, find)
            else:
                paths += sorted(glob.glob(glob.escape(known) + rest))
    if not paths:
        raise UserError(f"no file matches {cut(', '.join(patterns)) or 'an empty list of patterns'}: change path")
    return paths


def _existing(pattern: str) -> str:
    """The beginning of a pattern that is the name of something, as far as it goes: up to a slash, or all of it."""
    if not re.search(r"[*?\[{]", pattern):
        return pattern
    if is_remote(pattern):
        return pattern if _request(pattern, lambda system, inner: system.exists(inner)) else ""
    ends = [len(pattern), *(found.end() for found in reversed(list(re.finditer("/", pattern))))]
    return next((pattern[:end] for end in ends if os.path.exists(pattern[:end])), "")


def _braces(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        words = [f"{i:0{len(span[1])}d}" for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        words = found[1].split(",")
    return [pattern[: found.start()] + word + rest for word in words for rest in _braces(pattern[found.end() :])]


def digest(words: Iterable[str]) -> str:
    """A hash of `words` in their order."""
    return hashlib.blake2b("\0".join(words).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def signature(path: str) -> str:
    """A string that changes when the file changes: made of its size and time, or of what the bucket says of it.

    Raises:
        Unreachable: the file does not exist or cannot be read.
    """
    if is_remote(path):
        about = _request(path, lambda system, inner: system.info(inner))
        return digest(str(about.get(name)) for name in ("size", "etag", "md5Hash", "generation", "mtime", "created"))
    status = _stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def size(path: str) -> int:
    """In bytes.

    Raises:
        Unreachable: the file does not exist or cannot be read.
    """
    if is_remote(path):
        return int(_request(path, lambda system, inner: system.size(inner)))
    return _stat(path).st_size


def read(path: str, start: int = 0, length: int | None = None) -> bytes:
    """Bytes `start` to `start + length` of a file, or fewer where it ends before; without `length`, up to its end.

    Raises:
        Unreachable: the file does not exist, cannot be read, or is remote and did not answer in time.
    """
    first = _block(path, start, BLOCK if length is None else min(length, BLOCK))
    if len(first) < BLOCK or length == BLOCK:
        return first
    end = size(path) if length is None else min(size(path), start + length)
    whole = io.BytesIO()  # its bytes are taken out without a copy
    whole.write(first)
    while (at := start + whole.tell()) < end and (piece := _block(path, at, min(BLOCK, end - at))):
        whole.write(piece)
    return whole.getvalue()


class File(io.RawIOBase):
    """A file, local or remote, as a Python file object for the libraries that want one. Each read is one `read`."""

    def __init__(self, path: str):
        self._path, self._size, self._at = path, size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, length: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if length is None or length < 0 else min(length, left)
        data = read(self._path, self._at, wanted) if wanted else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _block(path: str, start: int, length: int) -> bytes:
    if is_remote(path):
        return _request(path, lambda system, inner: system.cat_file(inner, start=start, end=start + length))
    try:
        # Opened anew each time: faster than to make sure that a cached descriptor is still that of the file.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            pieces = []
            while length > 0 and (piece := os.pread(descriptor, length, start)):  # which may give less than asked for
                pieces.append(piece)
                start, length = start + len(piece), length - len(piece)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreachable(path, error) from error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: str, error: OSError) -> Unreachable:
    kind = Missing if error.errno in _NO_FILE or isinstance(error, FileNotFoundError) else Unreachable
    return kind(f"{cut(path, 150)} cannot be read ({error.strerror or cut(error)}): put it back or change path")


def _request(path: str, ask: Callable[[Any, str], T]) -> T:
    """The answer of `ask(file system, path inside it)`.

    Each attempt runs in a thread of its own, which is left behind when it hangs: fsspec itself sets no time limit.
    """
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        extra = " (for gs://, pip install 'pisces-jax[gcs]')" if path.startswith("gs://") else ""
        raise UserError(f"{path} needs a package that is not installed{extra}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is on no known kind of storage ({error}): change path") from error

    def attempt(answer: concurrent.futures.Future[T]) -> None:
        try:
            answer.set_result(ask(system, inner))
        except BaseException as error:  # noqa: B036 - the thread that waits raises it
            answer.set_exception(error)

    reason = ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(0.5 * 2**number)
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        threading.Thread(target=attempt, args=(answer,), daemon=True).start()
        try:
            return answer.result(TIME_LIMIT)
        except (FileNotFoundError, PermissionError) as error:
            raise _unreachable(path, error) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if answer.done() else f"no answer in {TIME_LIMIT:g} s"
    raise Unreachable(f"{path} cannot be read in {ATTEMPTS} attempts ({reason}): check the network or change path")

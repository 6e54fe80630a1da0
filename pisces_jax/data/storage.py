"""Bytes from local paths and from buckets (`gs://`, anything that fsspec knows), with time limits and retries.

A local file is read with `pread` from a descriptor that stays open. A remote request asks for `BLOCK` bytes at most;
where it takes longer than `TIME_LIMIT` it is given up and tried again, `ATTEMPTS` times in all, waiting longer each
time: nothing waits for ever, and a large file may come over a slow line. Credentials are the user's own, as gcsfs finds
them.
"""

import collections
import glob
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pisces_jax.utils.errors import UserError

TIME_LIMIT = 30.0  # seconds that one remote request may take
BLOCK = 2**24  # bytes that one request asks for
ATTEMPTS = 4
OPEN_FILES = 128  # descriptors that a process keeps

T = TypeVar("T")


class Unreachable(UserError):
    """A file that is not there or cannot be read; the message names it."""


class Missing(Unreachable):
    """A file that is surely not there."""


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def inside(name: Any) -> bool:
    """Whether a relative path of that name stays below its folder."""
    if not isinstance(name, str) or not name or os.path.isabs(name) or "\0" in name or is_remote(name):
        return False
    return os.path.normpath(name).split(os.sep)[0] not in ("..", ".")


def expand(pattern: str | os.PathLike | Sequence[str]) -> list[str]:
    """Paths from one pattern or several, sorted: `{00..99}` and `{a,b}` are written out, `*` is looked up.

    Raises:
        UserError: nothing is there.
    """
    patterns = [os.fspath(pattern)] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    paths: list[str] = []
    for one in (p for each in patterns for p in _braces(each)):
        if not re.search(r"[*?\[]", one):
            paths.append(one)
        elif is_remote(one):
            system, inner = _system(one)
            paths += [system.unstrip_protocol(p) for p in sorted(_patiently(lambda: system.glob(inner), one))]  # noqa: B023
        else:
            paths += sorted(glob.glob(one))
    if not paths:
        raise UserError(f"no file matches {', '.join(patterns) or 'no pattern'}: change path")
    return paths


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


def signature(path: str) -> str:
    """Changes when the file changes: its size and time, or what the bucket says of it.

    Raises:
        Unreachable: it is not there.
    """
    if is_remote(path):
        system, inner = _system(path)
        about = _patiently(lambda: system.info(inner), path)
        marks = [str(about.get(name)) for name in ("size", "etag", "md5Hash", "generation", "mtime", "created")]
        return hashlib.blake2b("\0".join(marks).encode(), digest_size=16).hexdigest()
    try:
        about = os.stat(path)
    except OSError as error:
        raise Unreachable(f"{path} cannot be read ({error.strerror}): change path") from error
    return f"{about.st_size}-{about.st_mtime_ns}"


def size(path: str) -> int:
    """In bytes.

    Raises:
        Unreachable: it is not there.
    """
    if is_remote(path):
        system, inner = _system(path)
        return int(_patiently(lambda: system.size(inner), path))
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise Unreachable(f"{path} cannot be read ({error.strerror}): change path") from error


def read(path: str, start: int = 0, length: int | None = None) -> bytes:
    """Bytes `start` to `start + length` of a file, or fewer where it ends before; with no `length`, to its end.

    Raises:
        Unreachable: it is not there, or it is remote and did not answer in time.
    """
    first = _block(path, start, BLOCK if length is None else min(length, BLOCK))
    if len(first) < BLOCK or length == BLOCK:
        return first
    end = size(path) if length is None else min(size(path), start + length)
    whole = io.BytesIO()  # which hands over its bytes without a copy
    whole.write(first)
    while (at := start + whole.tell()) < end and (piece := _block(path, at, min(BLOCK, end - at))):
        whole.write(piece)
    return whole.getvalue()


def _block(path: str, start: int, length: int) -> bytes:
    if is_remote(path):
        system, inner = _system(path)
        return _patiently(lambda: system.cat_file(inner, start=start, end=start + length), path)
    try:
        pieces = []
        with _opened(path) as file:  # some file systems give less than is asked for
            while length > 0 and (piece := os.pread(file.number, length, start)):
                pieces.append(piece)
                start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    except OSError as error:
        kind = Missing if isinstance(error, FileNotFoundError) else Unreachable
        raise kind(f"{path} cannot be read ({error.strerror}): put it back or change path") from error


class _File:
    """An open descriptor that is closed when nobody uses it and the cache has let it go."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)
        self.users, self.dropped = 0, False

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            self.users -= 1
            _close_if_idle(self)


_lock = threading.Lock()
_files: collections.OrderedDict[str, _File] = collections.OrderedDict()


def _close_if_idle(file: _File) -> None:
    if file.dropped and not file.users:
        os.close(file.number)


def _opened(path: str) -> _File:
    with _lock:
        file = _files.get(path)
        # A file that was removed or replaced must not live on in an old descriptor.
        if file is not None and not _same(file, path):
            del _files[path]
            file.dropped = True
            _close_if_idle(file)
            file = None
        if file is None:
            file = _files[path] = _File(path)
        _files.move_to_end(path)
        file.users += 1
        while len(_files) > OPEN_FILES:
            _, old = _files.popitem(last=False)
            old.dropped = True
            _close_if_idle(old)
        return file


def _same(file: _File, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.number), os.stat(path))
    except OSError:
        return False


def _system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path inside it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        extra = " (for gs://, pip install 'pisces-jax[gcs]')" if path.startswith("gs://") else ""
        raise UserError(f"{path} needs a package that is not installed{extra}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is on no known kind of storage ({error}): change path") from error


def _patiently(request: Callable[[], T], path: str) -> T:
    """The answer to a remote request, each attempt in a thread of its own that is left behind when it hangs."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        answer: list[T] = []
        raised: list[BaseException] = []

        def ask(answer: list[T] = answer, raised: list[BaseException] = raised) -> None:
            try:
                answer.append(request())
            except BaseException as error:  # noqa: B036 - it is raised again below
                raised.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(TIME_LIMIT)
        if answer:
            return answer[0]
        if raised and isinstance(raised[0], (FileNotFoundError, PermissionError)):
            kind = Missing if isinstance(raised[0], FileNotFoundError) else Unreachable
            raise kind(f"{path} cannot be read ({raised[0]}): change path") from raised[0]
        reason = f"{type(raised[0]).__name__}: {raised[0]}" if raised else f"no answer in {TIME_LIMIT:g} s"
    raise Unreachable(f"{path} cannot be read in {ATTEMPTS} attempts ({reason}): see to the network or change path")

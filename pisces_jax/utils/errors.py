"""Mistakes that a user can fix, told apart from bugs of the program."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence


class UserError(Exception):
    """A mistake of the user: its message is one sentence that says what to change."""


def cut(value: object, most: int = 300) -> str:
    """`value` as text for a message: of a long one, its beginning and its length."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}… of {len(text):,} characters"


# What the system refuses because of the machine, whoever asks: no bug of the program.
_DISK = "free some space, or write to another disk"
_RIGHTS = "change its permissions, or give another path"
_PATH = "give another path"
_REFUSED = {
    errno.ENOSPC: _DISK, errno.EDQUOT: _DISK, errno.EFBIG: _DISK,
    errno.EROFS: _RIGHTS, errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS,
    errno.ENOTDIR: _PATH, errno.EISDIR: _PATH, errno.EEXIST: _PATH, errno.ENAMETOOLONG: _PATH,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}  # fmt: skip


def refusal(error: OSError) -> str | None:
    """What the machine refused and what to change, as a sentence; None for an error of another kind."""
    if error.errno not in _REFUSED:
        return None
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror}: {_REFUSED[error.errno]}"


def listed(items: Sequence[object], most: int = 8, separator: str = ", ") -> str:
    """At most `most` items for a message, and how many more there are."""
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*map(str, items[:most]), *rest])


def run_command(main: Callable[[], None]) -> None:
    """Runs `main`; a `UserError` becomes one line on standard error and exit status 1, without a traceback.

    So does what the machine refuses (`refusal`), wherever it shows.
    """
    _prepare_output()
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if (words := refusal(error)) is None:
            raise
        _fail(words)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    finally:
        with contextlib.suppress(OSError), reader_may_leave():
            sys.stdout.flush()


def _fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1)


def _prepare_output() -> None:
    """Gives the process both streams, where its parent closed one, and lets them take any text.

    A terminal may know ASCII alone, and a file's name need not be UTF-8: what cannot be written is escaped (`\\xd7`).
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, standard output may lose its reader (`... | head`): what is printed from then on goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

"""Mistakes that a user can fix, told apart from bugs of the program."""

import contextlib
import errno
import io
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

# Exit statuses (docs/launch.md). From 75 on, the same command continues: 75 is EX_TEMPFAIL of sysexits.h.
FAILED, PREEMPTED, STUCK, LOST = 1, 75, 76, 77
AGAIN = "run the same command again to continue"


class Preempted(KeyboardInterrupt):
    """A run was asked to stop, and has saved."""


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

    So does what the machine refuses (`refusal`), wherever it shows. A process of several tells the others why it ends.
    """
    _prepare_output()
    try:
        main()
        _part(0)
    except UserError as error:
        _end(FAILED, f"error: {error}")
    except OSError as error:
        if (words := refusal(error)) is None:
            _fail_with_traceback(error)
        _end(FAILED, f"error: {words}")
    except Preempted:
        print(f"interrupted: {AGAIN}", file=sys.stderr)
        _part(PREEMPTED)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        _end(130, f"interrupted: {AGAIN}")
    except Exception as error:
        _fail_with_traceback(error)
    finally:
        with contextlib.suppress(OSError), reader_may_leave():
            sys.stdout.flush()


# Tells the other processes of a run that this one ends, with its exit status and a sentence; None: there are no others.
farewell: Callable[[int, str], None] | None = None
goodbye: Callable[[], None] | None = None  # waits for them, where all have come to an end
hanging = False  # a thread waits for storage or a service that never answers: the process ends without it


def leave(status: int, sentence: str) -> NoReturn:
    """Ends the process at once, from any thread, whatever the others do: its workers, too. It unwinds nothing."""
    with contextlib.suppress(Exception):
        print(sentence, file=sys.stderr, flush=True)
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        for worker in multiprocessing.active_children():
            worker.kill()
        if farewell is not None:
            farewell(status, sentence.removeprefix("error: "))
    os._exit(status)


# How collectives and JAX's service say that the other side is gone.
_OF_OTHERS = re.compile(r"gloo|nccl|socket closed|connection (reset|closed|refused)|coordination service", re.I)


def _end(status: int, sentence: str) -> NoReturn:
    if farewell is not None or hanging:  # Python's own end would wait
        leave(status, sentence)
    print(sentence, file=sys.stderr)
    sys.exit(status)


def _part(status: int) -> None:
    """Ends with the other processes, where all have come to an end."""
    if goodbye is not None:
        goodbye()
    if hanging:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _fail_with_traceback(error: Exception) -> NoReturn:
    if farewell is None and not hanging:
        raise error
    if farewell is not None and _OF_OTHERS.search(str(error)):
        time.sleep(5.0)  # the others may say more, and this process then ends in the thread that hears them
        leave(LOST, f"another process of this run is gone: {cut(' '.join(str(error).split()), 150)}; {AGAIN}")
    traceback.print_exception(error)
    leave(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


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

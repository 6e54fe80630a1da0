"""A lock on a folder that one command at a time may write: it names its owner, and ends with its owner."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pisces_jax.utils.errors import UserError

NAME = ".lock"
BEAT = 5.0  # seconds between signs of life, for hosts that do not see each other's file locks
SILENT = 30.0  # seconds without one after which another host's lock is taken over


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for the block; creates it where it is missing, and removes it again if it is left empty.

    The lock is the file's `flock`, which ends with its process however that ends, so a dead owner on this host never
    blocks. Storage that hosts share may not share file locks: there the owner touches the file again and again, and the
    lock of another host is taken over once the file has stayed untouched for `SILENT` seconds.

    Raises:
        UserError: another command holds it; the message names its host and process.
        OSError: the folder cannot be written.
    """
    if sys.platform == "win32":  # which has no such locks
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    handle = _take(path, folder)
    ended = threading.Event()
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
        threading.Thread(target=_beat, args=(handle, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock ends: who waits for this file then sees that it is gone
            if made and not any(folder.iterdir()):
                folder.rmdir()
        os.close(handle)


def _take(path: Path, folder: Path) -> int:
    """The open file of the lock.

    Raises:
        UserError: another command holds it.
    """
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            raise UserError(_refusal(folder, owner)) from None
        except OSError:  # this file system has no locks
            if _alive_here(owner := _owner(handle)):
                os.close(handle)
                raise UserError(_refusal(folder, owner)) from None
        owner = _owner(handle)
        if owner and owner.get("host") != socket.gethostname() and _touched(handle):
            os.close(handle)
            raise UserError(_refusal(folder, owner))
        try:
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:  # its owner has just ended, and with it this file
            pass
        os.close(handle)


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    who = f"process {owner['process']} on {owner['host']}" if {"process", "host"} <= owner.keys() else "another process"
    return f"{folder} is in use by {who}: wait until it ends or stop it, or choose another --workdir"


def _owner(handle: int) -> dict[str, Any]:
    """What the file says of its owner; empty if nothing that can be read."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _alive_here(owner: dict[str, Any]) -> bool:
    process = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(process, int) or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _touched(handle: int) -> bool:
    """Whether the owner on another host shows that it is alive."""
    before, end = os.fstat(handle).st_mtime_ns, time.monotonic() + SILENT
    while time.monotonic() < end:
        time.sleep(BEAT / 10)
        if os.fstat(handle).st_mtime_ns != before:
            return True
    return False


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(handle)

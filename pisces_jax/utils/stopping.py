"""When a run stops before its end: signals, which it answers at any moment, and a watch over steps that never return.

Signals are heard by a thread, so that they count while the main thread compiles or waits in a collective. A first one
asks the run to save and stop; where nothing would be lost (before the first step), and at the second one, the process
ends at once. It leaves nothing behind that a killed process would not leave.
"""

import contextlib
import faulthandler
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from pisces_jax.utils import companions, errors

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the run was asked to stop, in this process or another one."""

    def __init__(self, command: bool) -> None:
        self._command = command
        self._signals = 0
        self._working = False
        self._limit, self._last = 0.0, time.monotonic()
        self.asked = False

    def begun(self) -> None:
        """From now on, until `working` ends, there is something to save: a first signal asks for it, and waits."""
        self._working = True

    @contextlib.contextmanager
    def working(self, seconds: float) -> Iterator[None]:
        """Watches the steps of a run.

        Args:
            seconds: if `reached` is not called for so long, the process is stuck: it shows where, and ends. 0: never.
        """
        self._limit, self._last = seconds, time.monotonic()
        over = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, args=(over,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            over.set()
            self._working = False

    def reached(self) -> bool:
        """Whether to save and stop here. With several processes all call this equally often, and stop together."""
        self._last = time.monotonic()
        together = companions.current
        if together is None:
            return self.asked
        if together.reached():
            self.asked = True
            return True
        return False

    def handle(self, number: int, frame: Any) -> None:
        """In the main thread. In a command the thread that listens does it all."""
        if self._command:
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def heard(self, number: int) -> None:
        """In the listening thread."""
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals == 1 and self._working:
            if companions.current is None:
                self.asked = True
            else:
                companions.current.ask()
            return
        lost = "what is since the last checkpoint will be done again" if self._working else "nothing is lost"
        errors.leave(errors.PREEMPTED, f"stopped at once by {name}: {lost}; {errors.AGAIN}")

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self._limit / 4)):
            silent = time.monotonic() - self._last
            if silent > self._limit:
                with contextlib.suppress(Exception):  # standard error may be no file
                    faulthandler.dump_traceback(all_threads=True)
                words = f"stuck: no step has ended for {silent:.0f} s (limits.step_seconds); above is where; "
                errors.leave(errors.STUCK, words + errors.AGAIN)


_of_command: Stop | None = None


@contextlib.contextmanager
def listening(command: bool = False) -> Iterator[Stop]:
    """Hears SIGINT and SIGTERM. A run inside a command that listens shares what that one hears.

    Args:
        command: this process is a command: it may be ended at once. Otherwise a second signal is a KeyboardInterrupt.
    """
    global _of_command
    if _of_command is not None:
        yield _of_command
        return
    stop = Stop(command)
    previous = {s: signal.signal(s, stop.handle) for s in SIGNALS}
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    if command:
        _of_command = stop
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(ours, stop), name="signals", daemon=True).start()
    try:
        yield stop
    finally:
        if command:
            signal.set_wakeup_fd(-1)
            _of_command = None
        theirs.close()
        for s, handler in previous.items():
            signal.signal(s, handler)


def _listen(ours: socket.socket, stop: Stop) -> None:
    with ours:
        while heard := ours.recv(1):
            if heard[0] in SIGNALS:
                stop.heard(heard[0])

"""The processes of a run, beside the collectives: that they live, why one ended, and on which step all stop.

They talk through the key-value store of JAX's coordination service, which process 0 holds, from a thread of their own:
it goes on while the main thread compiles, or waits in a collective for a process that is gone. Process 0 decides, the
others ask it twice a second.
"""

import contextlib
import json
import threading
import time
from typing import Any

from pisces_jax.utils import errors

POLL = 0.5  # seconds between questions
GRACE = 1.0  # seconds that a process has to end by itself, when another one has ended
SHUTDOWN = 60  # seconds that processes wait for each other when all is done
PREFIX = "pisces_jax"


class Companions:
    """This process's side. `client` is JAX's client of the coordination service.

    Args:
        silent: a process that has not been heard of for so many seconds counts as gone.
    """

    def __init__(self, client: Any, process: int, processes: int, silent: float) -> None:
        self._client, self._process, self._processes, self._silent = client, process, processes, silent
        self._lock = threading.Lock()
        self._tick = 0  # how often `reached` was called
        self._asked = self._frozen = self._leaving = False
        self._agreed: int | None = None
        self._decided = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}  # process 0: the last beat of each other one, and when
        self._started = time.monotonic()
        self._gone = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="companions", daemon=True)
        self._watcher.start()

    def ask(self) -> None:
        """Asks all processes to stop together; from any thread."""
        self._asked = True

    def reached(self) -> bool:
        """Whether all processes stop here. They call this equally often, each where the others do.

        Once one of them has asked, each waits here until it is known how far the furthest one is, and goes on to the
        call after that.
        """
        with self._lock:
            self._tick += 1
            frozen = self._frozen
        if frozen:
            self._decided.wait()
        return self._agreed is not None and self._tick >= self._agreed

    def farewell(self, status: int, sentence: str) -> None:
        """Tells the others that this process ends before the run does. At most some seconds, also if nobody listens."""
        self._leaving = True
        ended = json.dumps({"status": status, "sentence": sentence, "process": self._process})
        teller = threading.Thread(target=self._tell, args=(ended,), daemon=True)
        teller.start()
        teller.join(GRACE)
        if self._process == 0:
            time.sleep(GRACE + 3 * POLL)  # the store goes with this process: the others shall have read it, and gone

    def leave(self) -> None:
        """Waits for the others, which are about to end too, and closes the connection."""
        import jax

        self._leaving = True
        self._gone.set()
        # Python ends threads that come back from C++ while it ends itself, and C++ aborts the process for it.
        self._watcher.join(5.0)
        if self._watcher.is_alive():
            errors.hanging = True
        jax.distributed.shutdown()

    def _tell(self, ended: str) -> None:
        with contextlib.suppress(Exception):  # process 0 may have gone first
            self._set("verdict/end" if self._process == 0 else f"end/{self._process}", ended)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{PREFIX}/{key}", value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[str, str]:
        beginning = f"{PREFIX}/{folder}/"
        return {k.removeprefix(beginning): v for k, v in self._client.key_value_dir_get(beginning)}

    def _watch(self) -> None:
        failed = None
        for beat in range(2**60):
            try:
                self._look(str(beat))
                failed = None
            except Exception:  # the service's own errors have no common type that is public
                now = time.monotonic()
                failed = failed or now
                if not self._leaving and now - failed > self._silent:
                    self._end(errors.LOST, "process 0 cannot be reached")
            if self._leaving or self._gone.wait(POLL):
                return

    def _look(self, beat: str) -> None:
        if self._process:
            self._set(f"beat/{self._process}", beat)
        if self._asked:
            self._set(f"ask/{self._process}", "1")
            self._asked = False
        if self._frozen and self._agreed is None:
            with self._lock:
                tick = self._tick
            self._set(f"tick/{self._process}", str(tick))
        if self._process == 0:
            self._decide()
        verdict = self._get("verdict")
        if "end" in verdict and not self._leaving:
            ended = json.loads(verdict["end"])
            if ended["process"] != self._process:
                self._end(ended["status"], f"process {ended['process']} ended: {ended['sentence']}")
        if "stop" in verdict:
            self._frozen = True
        if "agreed" in verdict and self._agreed is None:
            self._agreed = int(verdict["agreed"])
            self._decided.set()

    def _decide(self) -> None:
        """Process 0: what holds for all."""
        now = time.monotonic()
        beats, ended = self._get("beat"), self._get("end")
        for i in map(str, range(1, self._processes)):
            beat, since = self._heard.get(i, ("", self._started))
            if beats.get(i, "") != beat:
                self._heard[i] = beats[i], now
            elif now - since > self._silent and not ended:
                silent = {"status": errors.LOST, "sentence": f"not heard of for {now - since:.0f} s", "process": int(i)}
                ended[i] = json.dumps(silent)
        if ended:
            self._set("verdict/end", next(iter(ended.values())))
        if self._get("ask"):
            self._set("verdict/stop", "1")
            ticks = self._get("tick")
            if len(ticks) == self._processes and self._agreed is None:
                self._set("verdict/agreed", str(1 + max(map(int, ticks.values()))))

    def _end(self, status: int, sentence: str) -> None:
        """Ends this process because of another one, unless it does so itself, with a sentence of its own."""
        time.sleep(GRACE)
        if not self._leaving:
            errors.leave(status, sentence)


current: Companions | None = None


def join(client: Any, process: int, processes: int, silent: float) -> None:
    """Starts to listen; what ends this process from now on is told to the others."""
    global current
    current = Companions(client, process, processes, silent)
    errors.farewell, errors.goodbye = current.farewell, current.leave

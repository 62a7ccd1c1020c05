"""Ends a rank that hangs: without it one stuck rank holds a whole cluster in a collective for ever.

Whoever works calls beat() at least every `seconds`. When the beats stop, all threads' stacks go to stderr, status.json
says why, and the process ends with code 1. Ranks that wait for the stuck one stop beating too, so all that can run do
the same; one that cannot, such as a stopped process, is killed by its neighbours on the machine. A second timer inside
faulthandler needs no interpreter lock: it ends even a rank whose C code keeps it.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SLOW_PHASE_FACTOR = 10
"""How many times longer a phase may take that is not a plain step: compiling, drawing, loading."""
GRACE = 4.0
"""Seconds that a neighbour gets to end by itself, and after which the second timer fires."""


def process_group_timeout(seconds: float) -> float:
    """Time limit of the process group: the watchdog speaks first."""
    return 2 * seconds * SLOW_PHASE_FACTOR


class Watchdog:
    def __init__(self, seconds: float, rank: int, local_pids: list[int], on_hang: Callable[[str], None]) -> None:
        """`neighbours`: process numbers of the other ranks here. on_hang(text) is called once, before the end."""
        self.seconds, self.rank, self._local_pids, self._on_hang = seconds, rank, local_pids, on_hang
        self._limit = seconds * SLOW_PHASE_FACTOR  # loading and the first step, which compiles
        self.heartbeat()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self._limit + GRACE, exit=True)

    def begin_regular_steps(self) -> None:
        """The first step is done: from now on `seconds` hold."""
        self._limit = self.seconds
        self.heartbeat()

    @contextmanager
    def extended_limit(self) -> Iterator[None]:
        """For phases that rightly take long. All ranks must leave them together."""
        before, self._limit = self._limit, self.seconds * SLOW_PHASE_FACTOR
        self.heartbeat()
        try:
            yield
        finally:
            self._limit = before
            self.heartbeat()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 10)):
            waited = time.monotonic() - self._last
            if waited > self._limit:
                text = (
                    f"rank {self.rank} made no progress for {waited:.0f} s (limit {self._limit:.0f} s); stacks follow"
                )
                print(f"error: {text}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                self._on_hang(text.removesuffix("; stacks follow"))
                self._kill_local_ranks()
                os._exit(1)

    def _kill_local_ranks(self) -> None:
        """After the time they need to do all this themselves."""
        faulthandler.cancel_dump_traceback_later()
        time.sleep(GRACE)
        for pid in self._local_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

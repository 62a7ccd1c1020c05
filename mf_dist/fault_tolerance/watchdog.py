"""Ends a rank that hangs: without it one stuck rank blocks a whole cluster in a collective forever.

The trainer calls heartbeat() at least every `seconds`. When heartbeats stop, the stacks of all threads go to stderr,
status.json records why, and the process exits with code 1. Ranks that wait for the stuck one stop their heartbeats too,
so all that can run do the same; one that cannot, such as a stopped process, is killed by the other ranks of its
machine. A second timer inside faulthandler needs no interpreter lock: it ends even a rank whose C code holds it.
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
"""How much longer than a step a phase may take that is none: compiling, drawing samples, loading."""
GRACE = 4.0
"""Seconds that the machine's other ranks get to end by themselves, and after which the second timer fires."""


def process_group_timeout(seconds: float) -> float:
    """Timeout of the process group, in seconds: longer than the watchdog's limit, which reports first."""
    return 2 * seconds * SLOW_PHASE_FACTOR


class Watchdog:
    def __init__(self, seconds: float, rank: int, local_pids: list[int], on_hang: Callable[[str], None]) -> None:
        """`local_pids`: the other ranks' processes on this machine. on_hang(text) is called once, before the exit."""
        self.seconds, self.rank, self._local_pids, self._on_hang = seconds, rank, local_pids, on_hang
        self._limit = seconds * SLOW_PHASE_FACTOR  # loading and the first step, which compiles
        self.heartbeat()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        self._last_heartbeat = time.monotonic()
        faulthandler.dump_traceback_later(self._limit + GRACE, exit=True)

    def begin_regular_steps(self) -> None:
        """Called after the first step: from now on the limit is `seconds`."""
        self._limit = self.seconds
        self.heartbeat()

    @contextmanager
    def extended_limit(self) -> Iterator[None]:
        """For phases that may take long. All ranks must leave them together."""
        previous, self._limit = self._limit, self.seconds * SLOW_PHASE_FACTOR
        self.heartbeat()
        try:
            yield
        finally:
            self._limit = previous
            self.heartbeat()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 10)):
            waited = time.monotonic() - self._last_heartbeat
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
        """Kills the machine's other ranks that have not ended by themselves within GRACE seconds."""
        faulthandler.cancel_dump_traceback_later()
        time.sleep(GRACE)
        for pid in self._local_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

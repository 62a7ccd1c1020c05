"""Why a run ended, in RUN/status.json: exit codes do not survive torchrun, so launchers read this file alone.

    {"status": "finished", "step": 1200, "reason": "", "starts_without_progress": 0, ...}

status: starting (a launcher prepares it) | running | finished (all steps done) | stopped (asked to; start again to go
on) | failed | crash_loop (failed again and again without a new checkpoint; do not start again by machine).
"refused": true beside failed: a mistake in the call, which will fail again. "stopped_by" beside stopped: who asked
(border.Stop). Written by rename, hence never half.

RUN/history.jsonl keeps every start and end, and warnings between them, for people (mf_dist/report).
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mf_dist.runtime.atomic_files import write_json
from mf_dist.runtime.errors import CrashLoopError, UnrecordedError, UserError

MAX_STARTS = 3
"""Starts in a row without a new checkpoint before the run counts as a crash loop."""
NO_REASON = "it ended without a word, as by kill -9 or a lost node"


def _starts(entry: dict[str, Any]) -> int:
    """Without progress, up to this entry. A person's stop and a preemption begin the count anew; a time limit that
    leaves no time for a step does not."""
    said = entry.get("status")
    counts = said in ("starting", "running", "failed") or entry.get("stopped_by") in ("TIME", "SIGUSR1")
    return int(entry.get("starts_without_progress", 0)) if counts else 0


class Status:
    """The file of one run. begin on rank 0 at a start; end on whichever rank knows; a lock lets one at a time."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "status.json"

    def read(self) -> dict[str, Any]:
        """What it says; empty where it is missing or damaged."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        numbers = ("step", "committed_step", "starts_without_progress")
        if not isinstance(found, dict) or any(not isinstance(found.get(name, 0), int) for name in numbers):
            return {}
        return found

    def mark_starting(self) -> None:
        """A launcher prepares a start, which begin() will count. One prepared before that never came so far is counted
        here. UserError where that makes a crash loop."""
        with self._locked():
            before = self.read()
            starts = _starts(before) + (before.get("status") == "starting")
            step, reason = before.get("committed_step", 0), str(before.get("reason") or NO_REASON)
            if starts >= MAX_STARTS:
                raise self._crash_loop(step, starts, reason)
            self._write("starting", step, reason, committed_step=step, starts_without_progress=starts)

    def conclude(self, reason: str, asked: str = "") -> dict[str, Any]:
        """After the last process of a start is gone: what was not said by these themselves. `reason`: what the launcher
        saw; `asked`: the signal that told it to stop, which excuses a start that never trained. Returns the entry."""
        with self._locked():
            before = self.read()
            said, step = before.get("status"), before.get("committed_step", 0)
            starts = before.get("starts_without_progress", 0) + (said == "starting")
            kept = {"committed_step": step, "starts_without_progress": starts}
            if said == "starting" and asked:
                self._write_and_append("stopped", step, f"{asked} before work began", **kept, stopped_by=asked)
            elif said in ("starting", "running"):
                self._write_and_append("failed", step, reason, **kept)
            before = self.read()
            if _starts(before) >= MAX_STARTS and not before.get("refused"):
                self._crash_loop(step, starts, str(before["reason"]))
            return self.read()

    def begin(self, step: int) -> None:
        """Counts a start from checkpoint `step`; UserError for the one that makes a crash loop. A start after a crash
        loop was declared is a person's, and counts from 1 again."""
        with self._locked():
            self._begin(step)

    def _begin(self, step: int) -> None:
        before = self.read()
        starts = 1 + (_starts(before) if before.get("committed_step") == step else 0)
        if starts > MAX_STARTS:
            raise self._crash_loop(step, starts - 1, str(before.get("reason") or NO_REASON))
        self._write_and_append("running", step, "", committed_step=step, starts_without_progress=starts)

    def _crash_loop(self, step: int, starts: int, reason: str) -> UserError:
        """Declares it, and has the words for who asked."""
        text = f"{MAX_STARTS} starts brought no new checkpoint after step {step}; the last one failed: {reason}"
        self._write_and_append("crash_loop", step, text, committed_step=step, starts_without_progress=starts)
        return CrashLoopError(f"crash loop: {text}. Mend that, then start again")

    def checkpoint_committed(self, step: int) -> None:
        """A checkpoint of this step is safe."""
        with self._locked():
            self._write("running", step, "", committed_step=step, starts_without_progress=0)

    def lock_run(self) -> None:
        """Keeps this run to this process until it ends; UserError where another has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self.path.with_name("run.lock"), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = self.read()
            raise UnrecordedError(
                f"{self.path.parent} is being trained by process {found.get('pid')} on {found.get('host')}; "
                "stop that first, or choose another run_dir"
            ) from None
        except OSError:  # a file system without locks
            pass

    def unlock_run(self) -> None:
        """Gives the run back before this process ends."""
        os.close(self._held)

    def refuse(self, reason: str, has_begun: bool) -> None:
        """A mistake in the call ended the start; `has_begun` tells whether begin() had counted it. It does not count,
        and "refused" says that starting again by machine is pointless."""
        with self._locked():
            before = self.read()
            if has_begun and before.get("status") != "running":
                return  # another rank was faster, or it is a crash loop
            step, starts = before.get("committed_step", 0), before.get("starts_without_progress", 0) - has_begun
            self._write_and_append(
                "failed", step, reason, committed_step=step, starts_without_progress=starts, refused=True
            )

    def end(self, status: str, step: int, reason: str = "", **more: Any) -> None:
        """finished, stopped or failed. The first to fail says why; later words do not replace it."""
        with self._locked():
            before = self.read()
            if status == "failed" and before.get("status") != "running":
                return
            kept = {name: before.get(name, 0) for name in ("committed_step", "starts_without_progress")}
            self._write_and_append(status, step, reason, **kept, **more)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process reads and writes meanwhile; on a disk without room or locks we go on without."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError:
            yield
            return
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def note(self, step: int, text: str) -> None:
        """Something happened at `step` that a reader of the run should know."""
        self._append_history({"note": text, "step": step})

    def _write_and_append(self, status: str, step: int, reason: str, **more: Any) -> None:
        self._write(status, step, reason, **more)
        self._append_history({"status": status, "step": step, "reason": reason, **more})

    def _append_history(self, entry: dict[str, Any]) -> None:
        entry |= {"time": time.time(), "host": socket.gethostname()}
        with suppress(OSError), open(self.path.with_name("history.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _write(self, status: str, step: int, reason: str, **more: Any) -> None:
        entry = {"status": status, "step": step, "reason": reason, **more}
        entry |= {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):  # a full or read-only disk is reported where it hinders
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, entry)

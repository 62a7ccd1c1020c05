"""Why a run ended, in RUN/status.json: exit codes do not survive torchrun, so launchers read only this file.

    {"status": "finished", "step": 1200, "reason": "", "starts_without_progress": 0, ...}

status: starting (a launcher prepares it) | running | finished (all steps done) | stopped (on request; start again to
continue) | failed | crash_loop (repeated failures without a new checkpoint; must not be restarted automatically).
"refused": true with failed: a mistake in the call, which will fail again. "stopped_by" with stopped: the name of the
stop.Stop. Written atomically, by rename.

RUN/history.jsonl keeps every start and end, and warnings in between, for people (mf_dist/report).
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
NO_REASON = "it ended without recording a reason, as after kill -9 or a lost node"


def _starts_without_progress(entry: dict[str, Any]) -> int:
    """Starts without progress up to this entry. A stop by a person and a preemption reset the count; a time limit too
    short for a step does not."""
    status = entry.get("status")
    counts = status in ("starting", "running", "failed") or entry.get("stopped_by") in ("TIME", "SIGUSR1")
    return int(entry.get("starts_without_progress", 0)) if counts else 0


def _open_lock(path: Path) -> int:
    """A descriptor of the lock file, created as the umask says. One that another user made, in a folder that this user
    may write, is opened for reading, which is enough to lock it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not os.access(path.parent, os.W_OK):
            raise
        return os.open(path, os.O_RDONLY)


class Status:
    """The status file of one run. Rank 0 calls begin at a start; any rank may call end. A lock serializes access."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "status.json"
        self._run_lock: int | None = None

    def read(self) -> dict[str, Any]:
        """The file's entry; empty if the file is missing or damaged."""
        try:
            entry = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        numbers = ("step", "committed_step", "starts_without_progress")
        if not isinstance(entry, dict) or any(not isinstance(entry.get(name, 0), int) for name in numbers):
            return {}
        return entry

    def mark_starting(self) -> None:
        """A launcher prepares a start, which begin() will count. An earlier one that never reached begin() is counted
        here. Raises UserError if that makes a crash loop."""
        with self._locked():
            before = self.read()
            starts = _starts_without_progress(before) + (before.get("status") == "starting")
            step, reason = before.get("committed_step", 0), str(before.get("reason") or NO_REASON)
            if starts >= MAX_STARTS:
                raise self._crash_loop(step, starts, reason)
            self._write("starting", step, reason, committed_step=step, starts_without_progress=starts)

    def conclude(self, reason: str, stop_signal: str = "") -> dict[str, Any]:
        """Called when the last process of a start has exited: records what the processes did not record themselves.
        `reason`: what the launcher observed; `stop_signal`: the signal that told the launcher to stop, which excuses a
        start that never trained. Returns the entry."""
        with self._locked():
            before = self.read()
            status, step = before.get("status"), before.get("committed_step", 0)
            starts = before.get("starts_without_progress", 0) + (status == "starting")
            counts = {"committed_step": step, "starts_without_progress": starts}
            if status == "starting" and stop_signal:
                text = f"{stop_signal} before work began"
                self._write_and_append("stopped", step, text, **counts, stopped_by=stop_signal)
            elif status in ("starting", "running"):
                self._write_and_append("failed", step, reason, **counts)
            after = self.read()
            if _starts_without_progress(after) >= MAX_STARTS and not after.get("refused"):
                self._crash_loop(step, starts, str(after["reason"]))
            return self.read()

    def begin(self, step: int) -> None:
        """Counts a start from checkpoint `step`; raises UserError if that makes a crash loop. A start after a recorded
        crash loop was made by a person, and the count begins at 1 again."""
        with self._locked():
            before = self.read()
            starts = 1 + (_starts_without_progress(before) if before.get("committed_step") == step else 0)
            if starts > MAX_STARTS:
                raise self._crash_loop(step, starts - 1, str(before.get("reason") or NO_REASON))
            self._write_and_append("running", step, "", committed_step=step, starts_without_progress=starts)

    def _crash_loop(self, step: int, starts: int, reason: str) -> UserError:
        """Records a crash loop; returns the error for the caller to raise."""
        text = f"{MAX_STARTS} starts brought no new checkpoint after step {step}; the last one failed: {reason}"
        self._write_and_append("crash_loop", step, text, committed_step=step, starts_without_progress=starts)
        return CrashLoopError(f"crash loop: {text}. Fix the cause, then start again")

    def checkpoint_committed(self, step: int) -> None:
        """Records that the checkpoint of this step is complete; resets the count of starts."""
        with self._locked():
            self._write("running", step, "", committed_step=step, starts_without_progress=0)

    def lock_run(self) -> None:
        """Locks the run for this process until it ends. Raises UnrecordedError if another process holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._run_lock = _open_lock(self.path.with_name("run.lock"))
        try:
            fcntl.flock(self._run_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self.read()
            raise UnrecordedError(
                f"{self.path.parent} is being trained by process {holder.get('pid')} on {holder.get('host')}; "
                "stop that first, or choose another run_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        # else a forked process, such as the data loader's, would hold it for seconds after a kill -9 of this one
        os.register_at_fork(after_in_child=self.unlock_run)

    def unlock_run(self) -> None:
        """Releases the lock before this process ends."""
        if self._run_lock is not None:
            os.close(self._run_lock)
            self._run_lock = None

    def refuse(self, reason: str, has_begun: bool) -> None:
        """Records that a mistake in the call ended the start; `has_begun`: begin() has counted it. The start does not
        count, and "refused" tells launchers not to retry."""
        with self._locked():
            before = self.read()
            if has_begun and before.get("status") != "running":
                return  # recorded by another rank, or a crash loop
            step, starts = before.get("committed_step", 0), before.get("starts_without_progress", 0) - has_begun
            self._write_and_append(
                "failed", step, reason, committed_step=step, starts_without_progress=starts, refused=True
            )

    def end(self, status: str, step: int, reason: str = "", **more: Any) -> None:
        """Records finished, stopped or failed. The first failure is the reason; later ones do not replace it."""
        with self._locked():
            before = self.read()
            if status == "failed" and before.get("status") != "running":
                return
            counts = {name: before.get(name, 0) for name in ("committed_step", "starts_without_progress")}
            self._write_and_append(status, step, reason, **counts, **more)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Excludes other processes from reading and writing; does nothing on a disk without free space or locks."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_lock(self.path.with_suffix(".lock"))
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
        """Adds an event at `step` to the history, such as a warning."""
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
        with suppress(OSError):  # a full or read-only disk is reported by the writes that need it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, entry)

"""The current status of a run. status.json alone is not enough: a killed run leaves it, a refused call replaces it."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from mf_dist.report.collect import Run, Table, number

RECENT = 3600.0
"""Seconds since its last activity within which a run counts as alive if its lock is not visible."""


def current_entry(run: Run) -> Table:
    """The entry with the run's status: status.json, or, if that records a refused call, the newest entry of
    history.jsonl that does not belong to a refused call. Empty if there is none."""
    if not run.status.get("refused"):
        return run.status
    entries: list[Table] = []
    for entry in run.history:
        if "status" not in entry:
            continue
        if not entry.get("refused"):
            entries.append(entry)
        elif entries and entries[-1]["status"] == "running" and ends(entry, entries[-1]):
            entries.pop()
    return entries[-1] if entries else {}


def ends(entry: Table, start: Table) -> bool:
    """Whether this end belongs to that start. A call may be refused while another trains; only a call that had begun
    subtracts its own start from the count (Status.refuse)."""
    if not entry.get("refused"):
        return True
    starts = number(start.get("starts_without_progress")) or 0
    is_same_step = entry.get("committed_step") == start.get("committed_step")
    return is_same_step and number(entry.get("starts_without_progress")) == starts - 1


def is_alive(run: Run, start: Table) -> bool:
    """Whether the run with this start still trains: whether its lock is held (Status.lock_run) or, without locks or if
    the run is on another machine, whose locks may not be visible, whether it was active within RECENT."""
    held = _is_held(run.folder / "run.lock")
    if held or (held is False and start.get("host") == socket.gethostname()):
        return bool(held)
    return time.time() - last_activity(run, start) < RECENT


def last_activity(run: Run, start: Table) -> float:
    """When the run last wrote, seconds since the epoch: its newest line, or its start."""
    try:
        written = (run.folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        written = 0.0
    return max(written, number(start.get("time")) or 0.0)


def ago(seconds: Any) -> str:
    """Age of a time since the epoch, such as "5 min ago"."""
    age = max(0.0, time.time() - seconds)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if age >= 2 * length:
            return f"{age / length:.0f} {unit} ago"
    return f"{age:.0f} s ago"


def _is_held(lock: Path) -> bool | None:
    """Whether a process holds the lock; None if the file system has no locks. Takes a shared lock, which does not block
    other readers, and releases it at once."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)

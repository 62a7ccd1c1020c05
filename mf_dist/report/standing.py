"""How a run stands at this moment: status.json alone does not tell, since a killed run and a refused call leave it."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from mf_dist.report.collect import Run, Table, number

RECENT = 3600.0
"""Seconds since the last sign of life in which a run of another machine counts as alive, where no lock tells."""


def standing(run: Run) -> Table:
    """The entry that tells how the run stands: status.json, but where that tells of a refused call, the newest entry of
    history.jsonl that is not that call's; empty where there is none."""
    if not run.status.get("refused"):
        return run.status
    left: list[Table] = []
    for entry in run.history:
        if "status" not in entry:
            continue
        if not entry.get("refused"):
            left.append(entry)
        elif left and left[-1]["status"] == "running" and ends(entry, left[-1]):
            left.pop()
    return left[-1] if left else {}


def ends(entry: Table, start: Table) -> bool:
    """Whether this end is of that start. A call may be refused while another trains: only one that had begun takes the
    count of its own start back (Status.refuse)."""
    if not entry.get("refused"):
        return True
    starts = number(start.get("starts_without_progress")) or 0
    is_same_step = entry.get("committed_step") == start.get("committed_step")
    return is_same_step and number(entry.get("starts_without_progress")) == starts - 1


def is_alive(run: Run, start: Table) -> bool:
    """Whether the run that began so still trains. Its lock tells (Status.hold); where none does, or the run is of
    another machine whose locks are not seen here, a recent sign of life."""
    held = _is_held(run.folder / "run.lock")
    if held or (held is False and start.get("host") == socket.gethostname()):
        return bool(held)
    return time.time() - last_sign(run, start) < RECENT


def last_sign(run: Run, start: Table) -> float:
    """When the run last wrote, seconds since the epoch: its newest line, or its start."""
    try:
        written = (run.folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        written = 0.0
    return max(written, number(start.get("time")) or 0.0)


def ago(seconds: Any) -> str:
    """Of a time since the epoch: "5 min ago"."""
    past = max(0.0, time.time() - seconds)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if past >= 2 * length:
            return f"{past / length:.0f} {unit} ago"
    return f"{past:.0f} s ago"


def _is_held(lock: Path) -> bool | None:
    """None where the disk has no locks. A shared lock, for no time at all: other readers have theirs beside it."""
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

"""Why a run ended, in RUN/status.json: exit codes do not survive torchrun, so launchers read this file alone.

    {"status": "finished", "step": 1200, "reason": "", "starts_without_progress": 0, ...}

status: running | finished (all steps done) | stopped (asked to; start again to go on) | failed | crash_loop (failed
again and again without a new checkpoint; do not start again by machine). Written by rename, hence never half.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mf_dist.data.shard_writer import write_json
from mf_dist.errors import UserError

MAX_STARTS = 3
"""Starts in a row without a new checkpoint before the run counts as a crash loop."""


class Status:
    """The file of one run. begin on rank 0 at a start; end on whichever rank knows."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "status.json"

    def read(self) -> dict[str, Any]:
        """What it says; empty where it is missing or damaged."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def begin(self, step: int) -> None:
        """Counts a start from checkpoint `step`; UserError for the one that makes a crash loop. A start after a crash
        loop was declared is a person's, and counts from 1 again."""
        before = self.read()
        starts = 1
        if before.get("status") in ("running", "failed") and before.get("committed_step") == step:
            starts += int(before.get("starts_without_progress", 0))
        reason = str(before.get("reason") or "it ended without a word, as by kill -9 or a lost node")
        if starts > MAX_STARTS:
            text = f"{MAX_STARTS} starts brought no new checkpoint after step {step}; the last one failed: {reason}"
            self._write("crash_loop", step, text, committed_step=step, starts_without_progress=starts - 1)
            raise UserError(f"crash loop: {text}. Mend that, then start again")
        self._write("running", step, "", committed_step=step, starts_without_progress=starts)

    def committed(self, step: int) -> None:
        """A checkpoint of this step is safe."""
        self._write("running", step, "", committed_step=step, starts_without_progress=0)

    def end(self, status: str, step: int, reason: str = "") -> None:
        """finished, stopped or failed. The first to fail says why; later words do not replace it."""
        before = self.read()
        if status == "failed" and before.get("status") != "running":
            return
        kept = {name: before.get(name, 0) for name in ("committed_step", "starts_without_progress")}
        self._write(status, step, reason, **kept)

    def _write(self, status: str, step: int, reason: str, **more: Any) -> None:
        entry = {"status": status, "step": step, "reason": reason, **more}
        entry |= {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, entry)
        except OSError:
            pass  # a full or read-only disk is reported where it hinders: the status is the last to know

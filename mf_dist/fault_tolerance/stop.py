"""Agreement of all ranks at step boundaries: whether to stop, and the outcome of the background save.

A signal may reach a single rank, and the state is consistent only between two steps. So each rank records what it sees,
one small all-reduce on CPUs (which waits for no GPU) at each step boundary takes the maximum, and all ranks act alike.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from mf_dist.runtime.launch import RECEIVED_SIGNALS

MARGIN = 120.0
"""Seconds before a time limit at which the run stops; the supervisor adds twice the duration of the last save."""


class Stop(IntEnum):
    """Reasons to stop, in increasing priority."""

    NO = 0
    TIME = 1
    FILE = 2
    SIGUSR1 = 3
    SIGTERM = 4

    def describe(self, stop_file: Path) -> str:
        return {
            Stop.NO: "",
            Stop.TIME: "the time limit is near",
            Stop.FILE: f"{stop_file} exists; remove it to go on",
            Stop.SIGUSR1: "SIGUSR1",
            Stop.SIGTERM: "SIGTERM",
        }[self]


def _end_of_job(warns: bool) -> float:
    """SLURM_JOB_END_TIME, in seconds since 1970; infinity where it is not set. A past one was left in the environment
    by another job: it is ignored, with a warning if `warns`."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if not text.isdecimal():
        return float("inf")
    if float(text) > time.time():
        return float(text)
    if warns:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(text)))
        print(f"warning: SLURM_JOB_END_TIME={text} ({when}) is past: ignored", file=sys.stderr, flush=True)
    return float("inf")


class StopAgreement:
    def __init__(self, run_dir: Path, is_rank_zero: bool, max_hours: float, timeout: timedelta) -> None:
        self.stop_file, self._is_rank_zero, self._signal = run_dir / "STOP", is_rank_zero, Stop.NO
        max_end = time.time() + 3600 * max_hours if max_hours else float("inf")
        self._end_time = min(_end_of_job(is_rank_zero), max_end)
        self.margin = MARGIN
        world = dist.get_world_size()
        self._group = (
            dist.new_group(backend="gloo", timeout=timeout) if world > 1 and dist.get_backend() != "gloo" else None
        )
        self._is_alone = world == 1
        self._previous_handlers = {
            number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        for early in RECEIVED_SIGNALS:
            self._record(early, None)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._signal = max(self._signal, Stop[signal.Signals(number).name])

    def agree(self, save_failed: bool, save_runs: bool) -> tuple[Stop, bool, bool]:
        """Called by every rank at every step boundary. Over all ranks: the reason to stop of the highest priority,
        whether a save failed, and whether a save runs."""
        flags = torch.tensor([int(self._own_reason()), int(save_failed), int(save_runs)])
        if not self._is_alone:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return Stop(int(flags[0])), bool(flags[1]), bool(flags[2])

    def _own_reason(self) -> Stop:
        if self._is_rank_zero and not self._signal:
            if self.stop_file.exists():
                return Stop.FILE
            if time.time() > self._end_time - self.margin:
                return Stop.TIME
        return self._signal

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

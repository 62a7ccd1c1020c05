"""What all ranks agree on between two steps: whether to stop, and how the save in the background fares.

A signal may reach one rank alone, and only between two steps is the state whole. So each rank notes what it sees, one
small all-reduce on CPUs (which waits for no GPU) at each border takes the maximum, and all act alike.
"""

import os
import signal
import time
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from mf_dist.runtime.launch import RECEIVED_SIGNALS

MARGIN = 120.0
"""Seconds before a time limit at which the run stops, if its last save took no longer."""


class Stop(IntEnum):
    """Reasons to stop, the weightiest last."""

    NO = 0
    TIME = 1
    FILE = 2
    SIGUSR1 = 3
    SIGTERM = 4

    def words(self, stop_file: Path) -> str:
        return {
            Stop.NO: "",
            Stop.TIME: "the time limit is near",
            Stop.FILE: f"{stop_file} exists; remove it to go on",
            Stop.SIGUSR1: "SIGUSR1",
            Stop.SIGTERM: "SIGTERM",
        }[self]


class StopAgreement:
    def __init__(self, run_dir: Path, is_rank_zero: bool, max_hours: float, timeout: timedelta) -> None:
        self.stop_file, self._is_first, self._signal = run_dir / "STOP", is_rank_zero, Stop.NO
        ends = [float(os.environ[name]) for name in ("SLURM_JOB_END_TIME",) if os.environ.get(name, "").isdigit()]
        self._ends = min([*ends, *([time.time() + 3600 * max_hours] if max_hours else [])], default=float("inf"))
        self.margin = MARGIN
        world = dist.get_world_size()
        self._group = (
            dist.new_group(backend="gloo", timeout=timeout) if world > 1 and dist.get_backend() != "gloo" else None
        )
        self._is_alone = world == 1
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        for early in RECEIVED_SIGNALS:
            self._note(early, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = max(self._signal, Stop[signal.Signals(number).name])

    def agree(self, save_failed: bool, save_runs: bool) -> tuple[Stop, bool, bool]:
        """Called by every rank at every border: the weightiest reason to stop, and whether it holds on any rank."""
        table = torch.tensor([int(self._own()), int(save_failed), int(save_runs)])
        if not self._is_alone:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
        return Stop(int(table[0])), bool(table[1]), bool(table[2])

    def _own(self) -> Stop:
        if self._is_first and not self._signal:
            if self.stop_file.exists():
                return Stop.FILE
            if time.time() > self._ends - self.margin:
                return Stop.TIME
        return self._signal

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

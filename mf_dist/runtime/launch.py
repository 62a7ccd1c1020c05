"""Which process of how many this is, as torchrun, srun or another launcher says by its variables. No torch."""

import atexit
import os
import re
import signal
import sys
from types import FrameType
from typing import NamedTuple, NoReturn

from mf_dist.runtime.errors import UserError

RECEIVED_SIGNALS: list[signal.Signals] = []
"""Signals that came since hear_signals()."""


def record_signals() -> None:
    """From here on SIGTERM and SIGUSR1 are noted in HEARD, for the trainer to obey at its first border: they may come
    while a job that starts is still importing."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    RECEIVED_SIGNALS.append(signal.Signals(number))


class LaunchedRank(NamedTuple):
    rank: int
    world_size: int
    local_rank: int


def rank_from_environment() -> LaunchedRank:
    """From RANK, WORLD_SIZE and LOCAL_RANK; without a launcher, the only process. UserError where they clash."""
    _adopt_srun_variables()
    numbers = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, alone)
        if not text.isdigit():
            raise UserError(f"environment variable {name} is {text!r}, expected a whole number; start with torchrun")
        numbers.append(int(text))
    place = LaunchedRank(*numbers)
    if place.rank >= max(1, place.world_size) or place.world_size < 1:
        raise UserError(
            f"RANK {place.rank} is not below WORLD_SIZE {place.world_size}; start with torchrun, or unset both"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if place.world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE is {place.world_size}, but {missing[0]} is not set; start with torchrun")
    return place


def _adopt_srun_variables() -> None:
    """Gives the tasks of an srun that started them without torchrun torch's variables, from SLURM's. Task 0 is on the
    first node of the step; the port follows from job and step. A shell by srun --pty has the terminal alone."""
    said = os.environ
    if "RANK" in said or "SLURM_PTY_PORT" in said or said.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    first = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?(?:,|$)", said.get("SLURM_STEP_NODELIST", ""))
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    if any(not said.get(name, "").isdigit() for name in names):
        return
    if not first and "MASTER_ADDR" not in said:
        raise UserError(f"cannot tell the first node of {said.get('SLURM_STEP_NODELIST')!r}; set MASTER_ADDR to it")
    tasks, rank, local_rank, job, step = (said[name] for name in names)
    said.update(RANK=rank, WORLD_SIZE=tasks, LOCAL_RANK=local_rank)
    if first:
        said.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    said.setdefault("MASTER_PORT", str(30_000 + (int(job) * 16 + int(step)) % 10_000))  # torchrun's are below


def exit_without_finalization(code: int) -> NoReturn:
    """Ends this process of a launch without Python's finalization: Gloo's threads outlive the process group, since
    DeepSpeed holds on to it, and one that asks for the interpreter while it shuts down aborts a run that ended well."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

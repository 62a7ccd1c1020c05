"""Rank and world size from a launcher's environment variables, early signals, exit. Does not import torch."""

import atexit
import os
import re
import signal
import sys
import threading
from types import FrameType
from typing import NamedTuple, NoReturn

from mf_dist.runtime.errors import UserError

EXIT_SECONDS = 60.0
"""How long the exit hooks of libraries may take."""
RECEIVED_SIGNALS: list[signal.Signals] = []
"""Signals received since record_signals()."""


def record_signals() -> None:
    """From here on SIGTERM and SIGUSR1 are appended to RECEIVED_SIGNALS, and StopAgreement takes them over: they may
    arrive while a starting job is still importing."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    RECEIVED_SIGNALS.append(signal.Signals(number))


class LaunchedRank(NamedTuple):
    rank: int
    world_size: int
    local_rank: int


def rank_from_environment() -> LaunchedRank:
    """From RANK, WORLD_SIZE and LOCAL_RANK; else rank 0 of 1. Raises UserError if they are inconsistent."""
    _adopt_srun_variables()
    numbers = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UserError(f"environment variable {name} is {text!r}, expected a whole number; start with torchrun")
        numbers.append(int(text))
    launched = LaunchedRank(*numbers)
    if launched.rank >= max(1, launched.world_size) or launched.world_size < 1:
        raise UserError(
            f"RANK {launched.rank} is not below WORLD_SIZE {launched.world_size}; start with torchrun, or unset both"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched.world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE is {launched.world_size}, but {missing[0]} is not set; start with torchrun")
    port = os.environ.get("MASTER_PORT", "")
    if launched.world_size > 1 and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(f"environment variable MASTER_PORT is {port!r}, expected a number from 1 to 65535")
    return launched


def world_size_variable() -> str:
    """The environment variable that gave the number of ranks, for messages."""
    env = os.environ
    is_from_srun = "TORCHELASTIC_RUN_ID" not in env and env.get("SLURM_STEP_NUM_TASKS") == env.get("WORLD_SIZE")
    return "SLURM_STEP_NUM_TASKS" if is_from_srun else "WORLD_SIZE"


def _adopt_srun_variables() -> None:
    """Sets torch's variables from SLURM's in tasks that srun started without torchrun. Task 0 is on the first node of
    the step; the port is derived from job and step. In a shell of srun --pty nothing is set."""
    env = os.environ
    if "RANK" in env or "SLURM_PTY_PORT" in env or env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    first = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?(?:,|$)", env.get("SLURM_STEP_NODELIST", ""))
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    if any(not env.get(name, "").isdecimal() for name in names):
        return
    if not first and "MASTER_ADDR" not in env:
        raise UserError(f"cannot determine the first node of {env.get('SLURM_STEP_NODELIST')!r}; set MASTER_ADDR to it")
    tasks, rank, local_rank, job, step = (env[name] for name in names)
    env.update(RANK=rank, WORLD_SIZE=tasks, LOCAL_RANK=local_rank)
    if first:
        env.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    env.setdefault("MASTER_PORT", str(30_000 + (int(job) * 16 + int(step)) % 10_000))  # torchrun's are below


def exit_without_finalization(code: int) -> NoReturn:
    """Ends this process without Python's finalization: DeepSpeed keeps the process group and with it Gloo's threads,
    and one that requests the interpreter lock during finalization aborts a run that succeeded. A library's exit hook
    may wait for a server: all of them together get EXIT_SECONDS."""
    sys.stdout.flush()
    sys.stderr.flush()
    limit = threading.Timer(EXIT_SECONDS, os._exit, [code])
    limit.daemon = True
    limit.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

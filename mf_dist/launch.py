"""Which process of how many this is, as torchrun (or any launcher that sets its variables) says. No torch."""

import atexit
import os
import signal
import sys
from types import FrameType
from typing import NamedTuple, NoReturn

from mf_dist.errors import UserError

HEARD: list[signal.Signals] = []
"""Signals that came since hear_signals()."""


def hear_signals() -> None:
    """From here on SIGTERM and SIGUSR1 are noted in HEARD, for the trainer to obey at its first border: they may come
    while a job that starts is still importing."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    HEARD.append(signal.Signals(number))


class Place(NamedTuple):
    rank: int
    world_size: int
    local_rank: int


def launched_place() -> Place:
    """From RANK, WORLD_SIZE and LOCAL_RANK; without a launcher, the only process. UserError where they clash."""
    numbers = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, alone)
        if not text.isdigit():
            raise UserError(f"environment variable {name} is {text!r}, expected a whole number; start with torchrun")
        numbers.append(int(text))
    place = Place(*numbers)
    if place.rank >= max(1, place.world_size) or place.world_size < 1:
        raise UserError(
            f"RANK {place.rank} is not below WORLD_SIZE {place.world_size}; start with torchrun, or unset both"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if place.world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE is {place.world_size}, but {missing[0]} is not set; start with torchrun")
    return place


def leave(code: int) -> NoReturn:
    """Ends this process of a launch without Python's finalization: Gloo's threads outlive the process group, since
    DeepSpeed holds on to it, and one that asks for the interpreter while it shuts down aborts a run that ended well."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

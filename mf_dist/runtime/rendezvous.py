"""Meets the launcher's other ranks. It waits in Python, so that a signal ends a process that waits for ranks that never
come: torch's own waiting is in C++, where no signal handler runs."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mf_dist.runtime.errors import UserError
from mf_dist.runtime.launch import RECEIVED_SIGNALS, LaunchedRank, world_size_variable

PATIENCE = 5.0
"""Seconds after which a rank says for what it waits."""


def meet(launched: LaunchedRank, timeout: float) -> Store:
    """The store of all ranks, at MASTER_ADDR and MASTER_PORT, once every rank has come to it. Rank 0 serves it, or
    torchrun's agent. Raises UserError if that fails, or after `timeout` seconds."""
    address, port, world_size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launched.world_size
    where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    serves = launched.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_until(lambda: _answers(address, port), lambda: f"rank 0 at {where}", timeout, PATIENCE)
    try:
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:  # torch's network errors are
        raise UserError(f"cannot use {where}: {str(error).strip().splitlines()[0]}") from None
    store.add("joined", 1)

    def missing() -> str:
        variable = world_size_variable()
        return (
            f"{world_size - store.add('joined', 0)} of {world_size} ranks ({variable}={world_size}; if no launcher has "
            f"started this process: unset {variable})"
        )

    patience = PATIENCE if launched.rank == 0 else timeout
    _wait_until(lambda: store.add("joined", 0) >= world_size, missing, timeout, patience)
    return store


def _wait_until(condition: Callable[[], bool], what: Callable[[], str], timeout: float, patience: float) -> None:
    """Prints after `patience` seconds what it waits for. Ends this process by a signal that it has received; raises
    UserError after `timeout` seconds."""
    begin, is_said = time.monotonic(), False
    while not condition():
        for received in RECEIVED_SIGNALS:
            signal.signal(received, signal.SIG_DFL)
            os.kill(os.getpid(), received)
        waited = time.monotonic() - begin
        if waited > timeout:
            raise UserError(f"waited {waited:.0f} s for {what()}")
        if waited > patience and not is_said:
            is_said = True
            print(f"waiting for {what()}", file=sys.stderr, flush=True)
        time.sleep(0.02 if waited < 1 else 0.2)


def _answers(address: str, port: int) -> bool:
    """Whether a process listens there."""
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True

"""status.json of a tool in a job, like that of a run: MF_DIST_STATUS names its folder, mf_dist.jobs.attempt reads it.
If the variable is not set, as outside of jobs, nothing is written. Does not import torch.

A step is a finished shard or block of images; each is its own checkpoint.
"""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mf_dist.fault_tolerance.status import Status
from mf_dist.runtime.errors import UserError, is_disk_fault
from mf_dist.runtime.launch import rank_from_environment
from mf_dist.runtime.output import when_output_is_lost
from mf_dist.runtime.paths import shell_expansion

STATUS_VARIABLE = "MF_DIST_STATUS"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(BaseException):
    """A signal asked the tool to stop."""


def reports_status(main: Callable[[], int | None]) -> Callable[[], int | None]:
    """Makes `main` record its start and its end; of several ranks, only rank 0 does. SIGTERM and SIGUSR1 stop it with
    exit code 3; complete files are kept."""

    @functools.wraps(main)
    def run() -> int | None:
        if not _reports():
            return main()
        status = _status()
        status.begin(_step(status))
        when_output_is_lost(lambda sentence: status.note(_step(status), sentence))
        for number in SIGNALS:
            signal.signal(number, _stop)
        try:
            code = main()
        except StopRequested as stop:
            status.end("stopped", _step(status), str(stop), stopped_by=str(stop))
            print(f"stopped by {stop}; run the same command again to continue")
            return 3
        except BaseException as error:
            _record_failure(status, error)
            raise
        status.end("finished", _step(status))
        return code

    return run


def count_finished_unit() -> None:
    """Records that one more shard or block is complete."""
    if _reports():
        status = _status()
        status.checkpoint_committed(_step(status) + 1)


def _status() -> Status:
    return Status(Path(shell_expansion(os.environ[STATUS_VARIABLE])))


def _reports() -> bool:
    return STATUS_VARIABLE in os.environ and rank_from_environment().rank == 0


def _step(status: Status) -> int:
    return int(status.read().get("committed_step", 0))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for repeated in SIGNALS:  # launchers repeat them, which must not interrupt the shutdown
        signal.signal(repeated, signal.SIG_IGN)
    raise StopRequested(signal.Signals(number).name)


def _record_failure(status: Status, error: BaseException) -> None:
    if isinstance(error, SystemExit) and not error.code:  # --help
        status.end("finished", _step(status))
    elif isinstance(error, SystemExit):
        status.refuse("invalid command line, see above", has_begun=True)
    elif isinstance(error, UserError) and not is_disk_fault(error):
        status.refuse(str(error), has_begun=True)
    else:
        status.end("failed", _step(status), str(error) or type(error).__name__)

"""The status of a tool in a job, and the verdict that its launcher draws from it."""

import contextlib
import errno
import os
import signal

import pytest
from conftest import VAE, encode

from mf_dist.fault_tolerance.status import MAX_STARTS, Status
from mf_dist.fault_tolerance.tool_status import STATUS_VARIABLE, reports_status
from mf_dist.jobs.attempt import begin_tool, judge
from mf_dist.runtime.errors import UserError


@pytest.fixture
def status(tmp_path, monkeypatch):
    """The status of a job; restores the signal handlers that the tool installs."""
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "job"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield Status(tmp_path / "job")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(status, main, stop_signal=""):
    """One start of the job; returns the launcher's verdict on it."""
    assert begin_tool(status.path.parent).word == "go"
    with contextlib.suppress(Exception, SystemExit):
        reports_status(main)()
    return judge(status.conclude("srun ended with code 1", stop_signal))


def raising(error, cause=None):
    def main():
        try:
            raise cause or error
        except Exception:
            raise error from None

    return main


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("main", "word"),
    [
        (lambda: None, "finished"),
        (raising(SystemExit(0)), "finished"),
        (raising(SystemExit(2)), "refused"),
        (raising(UserError("no such VAE")), "refused"),
        (raising(UserError("cannot read"), FileNotFoundError(errno.ENOENT, "gone")), "refused"),
        (raising(UserError("cannot read"), OSError(errno.EIO, "broken")), "retry"),
        (raising(OSError(errno.ENOSPC, "full")), "retry"),
        (raising(RuntimeError("out of memory")), "retry"),
        (signalled(signal.SIGUSR1), "resume"),
        (signalled(signal.SIGTERM), "stopped"),
    ],
)
def test_the_verdict_follows_from_how_the_tool_ended(status, main, word):
    assert start(status, main).word == word


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*status.json; make room there"):
        begin_tool(tmp_path / "file" / "job")


def test_without_a_job_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    assert reports_status(lambda: 5)() == 5 and not any(tmp_path.iterdir())


def test_starts_that_make_nothing_end_in_a_crash_loop(status):
    for number in range(1, MAX_STARTS + 1):
        assert start(status, raising(RuntimeError("out of memory"))).word == ("retry" if number < 3 else "failed")
    assert status.read()["status"] == "crash_loop"


def test_a_time_limit_too_short_for_a_shard_is_not_retried_forever(status):
    verdicts = [start(status, signalled(signal.SIGUSR1), "SIGUSR1").word for _ in range(MAX_STARTS)]
    assert verdicts == ["resume", "resume", "failed"]


def test_a_start_that_makes_a_shard_is_progress(status, images, tmp_path):
    """Real shards by the real encoder, which each time finds another one missing, then fails with out of memory."""
    out = tmp_path / "latents"

    def main():
        encode(images, out, VAE)
        raise RuntimeError("out of memory")

    for number in range(2 * MAX_STARTS):
        assert start(status, main) == (
            "retry",
            f"failed at step {number + 3}: out of memory (start 0 since the last checkpoint)",
        )
        (out / "shard-00001.tar").unlink()
    assert status.read()["committed_step"] == 2 + 2 * MAX_STARTS

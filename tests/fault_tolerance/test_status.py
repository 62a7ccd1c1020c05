"""status.json: how a run ended, and when starting again is pointless."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT

from mf_dist.fault_tolerance.status import Status
from mf_dist.runtime.errors import UserError


def test_the_first_failure_is_the_reason(tmp_path):
    status = Status(tmp_path / "run")
    status.begin(0)
    assert status.read()["status"] == "running"
    status.end("failed", 3, "the cause")
    status.end("failed", 3, "a consequence on another rank")
    assert (status.read()["status"], status.read()["reason"]) == ("failed", "the cause")


def test_three_starts_without_a_checkpoint_are_a_crash_loop(tmp_path):
    status = Status(tmp_path)
    for start in (1, 2, 3):
        status.begin(5)
        assert status.read()["starts_without_progress"] == start
    with pytest.raises(UserError, match="crash loop: 3 starts brought no new checkpoint after step 5.*kill -9"):
        status.begin(5)
    status.end("failed", 5, "refused")
    assert status.read()["status"] == "crash_loop"
    status.begin(5)  # by a person
    assert status.read()["starts_without_progress"] == 1


@pytest.mark.parametrize("between", ["committed", "stopped", "newer"])
def test_progress_or_a_request_to_stop_resets_the_count(tmp_path, between):
    status = Status(tmp_path)
    for step in (5, 5, 5):
        status.begin(step)
    if between == "committed":
        status.checkpoint_committed(6)
    if between == "stopped":
        status.end("stopped", 5, "SIGTERM")
    status.begin(6 if between != "stopped" else 5)
    assert status.read()["starts_without_progress"] == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\0", '{"status": "failed", "committed_step": 1, "starts_without_progress": null}']
)
def test_a_damaged_file_counts_as_missing(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    Status(tmp_path).begin(1)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"


def test_a_reader_never_sees_a_partial_file(tmp_path):
    """Four processes write at once, as the ranks of a run may, while one reads."""
    status = Status(tmp_path)
    status.begin(0)
    writer = (
        "from pathlib import Path; from mf_dist.fault_tolerance.status import Status\n"
        f"for i in range(50): Status(Path({str(tmp_path)!r}))._write('running', i, 'x' * 5000)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", writer]) for _ in range(4)]
    while any(process.poll() is None for process in processes):
        json.loads((tmp_path / "status.json").read_text())
    assert all(process.returncode == 0 for process in processes)


def test_a_run_belongs_to_one_process(tmp_path):
    import subprocess
    import sys

    code = "from pathlib import Path; from mf_dist.fault_tolerance.status import Status; Status(Path({!r})).lock_run()"
    code = code.format(str(tmp_path))
    Status(tmp_path).begin(0)
    holder = Status(tmp_path)
    holder.lock_run()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is being trained by process" in done.stderr and done.returncode == 1


def test_a_forked_process_does_not_hold_the_run(tmp_path):
    """As the data loader's processes, which live on for seconds after a kill -9 of the run."""
    from multiprocessing import get_context

    first, second, context = Status(tmp_path), Status(tmp_path), get_context("fork")
    first.lock_run()
    has_started = context.Event()
    child = context.Process(target=lambda: (has_started.set(), time.sleep(60)), daemon=True)
    child.start()
    try:
        assert has_started.wait(30)
        with pytest.raises(UserError, match="is being trained by process"):
            second.lock_run()
        first.unlock_run()
        second.lock_run()
    finally:
        child.kill()
        child.join()


def test_mistakes_in_the_call_do_not_make_a_crash_loop(tmp_path):
    status = Status(tmp_path)
    status.refuse("no dataset", has_begun=False)
    assert (status.read()["status"], status.read()["refused"], status.read()["starts_without_progress"]) == (
        "failed",
        True,
        0,
    )
    for _ in range(5):
        status.begin(0)
        status.refuse("no such VAE", has_begun=True)
        status.refuse("the same on rank 1", has_begun=True)
        assert status.read()["starts_without_progress"] == 0 and status.read()["reason"] == "no such VAE"
    status.begin(0)
    status.end("failed", 0, "a crash")
    status.begin(0)
    assert status.read()["starts_without_progress"] == 2


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        status = Status(tmp_path / "run")
        status.lock_run()
        status.begin(0)
        status.unlock_run()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert modes == dict.fromkeys(("run.lock", "status.lock", "status.json", "history.jsonl"), 0o666 & ~umask)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_colleague_of_the_group_can_lock_a_run_whose_lock_only_its_owner_may_write():
    """As older versions made it. In a folder that the colleague may not write, the lock is refused."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # unlike tmp_path's
        check_colleague(Path(name) / "run")


def check_colleague(run):
    Status(run).lock_run()
    (run / "run.lock").chmod(0o644)
    code = (
        "import os, sys; from pathlib import Path; from mf_dist.fault_tolerance.status import Status\n"
        "os.setgroups([]); os.setgid(4321); os.setuid(5002)\n"
        "Status(Path(sys.argv[1])).lock_run()"
    )

    def lock():
        done = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True)
        return (done.stderr.splitlines() or [""])[-1]

    os.chown(run, 0, 4321)
    run.chmod(0o2775)
    assert "being trained by process" in lock()
    run.chmod(0o755)
    assert "Permission denied" in lock() and "run.lock" in lock()

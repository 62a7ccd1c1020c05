"""The verdict before and after a start of a job, from its status.json alone."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from mf_dist.config.schema import load_config
from mf_dist.fault_tolerance.status import MAX_STARTS, Status
from mf_dist.jobs.attempt import begin, end, judge
from mf_dist.runtime.errors import UnrecordedError, UserError


@pytest.fixture
def config(tiny_config):
    return load_config(str(tiny_config), [])


def test_the_verdict_follows_from_the_entry():
    for entry, word in (
        ({"status": "finished", "step": 6}, "finished"),
        ({"status": "stopped", "stopped_by": "SIGUSR1"}, "resume"),
        ({"status": "stopped", "stopped_by": "TIME"}, "resume"),
        ({"status": "stopped", "stopped_by": "SIGTERM"}, "stopped"),
        ({"status": "stopped", "stopped_by": "FILE"}, "stopped"),
        ({"status": "failed", "reason": "out of memory"}, "retry"),
        ({"status": "failed", "reason": "no dataset", "refused": True}, "refused"),
        ({"status": "crash_loop", "reason": "3 starts"}, "failed"),
        ({}, "failed"),
    ):
        assert judge(entry).word == word, entry


def test_starts_that_die_before_training_end_in_a_crash_loop(config):
    """No process of the run recorded anything."""
    for start in range(1, MAX_STARTS + 1):
        assert begin(config, 1).word == "go"
        verdict = end(config, "srun ended with code 1")
        assert verdict.word == ("retry" if start < MAX_STARTS else "failed")
        assert "srun ended with code 1" in verdict.reason
    assert begin(config, 1).word == "go"  # by a person
    assert end(config, "again").word == "retry"


def test_job_scripts_that_die_themselves_end_in_a_crash_loop(config):
    """The batch node is lost each time: nothing records how a start ended."""
    for _ in range(MAX_STARTS):
        begin(config, 1)
    with pytest.raises(UserError, match="crash loop: 3 starts brought no new checkpoint"):
        begin(config, 1)


def test_a_preempted_start_is_no_crash(config):
    for _ in range(2 * MAX_STARTS):
        begin(config, 1)
        assert end(config, "", "SIGTERM") == ("stopped", "stopped at step 0: SIGTERM before work began")


@pytest.mark.parametrize("where", ["before training", "before a step"])
def test_a_time_limit_too_short_for_a_step_is_not_retried_forever(config, where):
    for start in range(1, MAX_STARTS + 1):
        begin(config, 1)
        if where == "before a step":
            status = Status(Path(config.run_dir))
            status.begin(0)
            status.end("stopped", 0, "the time limit is near", stopped_by="TIME")
        assert end(config, "", "SIGUSR1").word == ("resume" if start < MAX_STARTS else "failed")
    assert Status(Path(config.run_dir)).read()["status"] == "crash_loop"


def test_what_the_run_recorded_is_not_replaced(config, tiny_config):
    status = Status(Path(config.run_dir))
    begin(config, 1)
    status.begin(0)
    status.end("failed", 3, "the cause")
    assert end(config, "srun ended with code 1").reason.startswith("failed at step 3: the cause (start 1 ")
    begin(config, 1)
    status.begin(0)
    assert status.read()["starts_without_progress"] == 2
    status.checkpoint_committed(5)
    status.end("stopped", 5, "SIGUSR1", stopped_by="SIGUSR1")
    assert end(config, "srun ended with code 1", "SIGUSR1") == ("resume", "stopped at step 5: SIGUSR1")
    begin(config, 1)
    status.begin(5)
    status.end("finished", 40, samples_seen=90)  # in smaller batches; the rest is less than one of 16
    assert begin(config, 1).word == "finished"
    assert begin(load_config(str(tiny_config), ["train.total_images=112"]), 1).word == "go"
    assert begin(load_config(str(tiny_config), ["train.total_images=960"]), 1).word == "go"  # a longer run


def test_a_run_that_another_process_holds_is_waited_for(config):
    """The lock of a lost node is released late."""
    imports = "import time; from pathlib import Path; from mf_dist.fault_tolerance.status import Status"
    code = f"{imports}; Status(Path({config.run_dir!r}))"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}.lock_run(); print(1, flush=True); time.sleep(60)"], stdout=-1
    )
    holder.stdout.readline()
    with pytest.raises(UnrecordedError, match="is being trained by"):
        begin(config, 1, patience=0.1)
    threading.Timer(0.5, holder.kill).start()
    start = time.monotonic()
    assert begin(config, 1, patience=30).word == "go" and time.monotonic() - start < 20
    holder.wait()


def test_the_command_answers_in_one_line(tiny_config, tmp_path):
    def attempt(*arguments):
        command = [sys.executable, "-m", "mf_dist.jobs.attempt", *map(str, arguments)]
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
        return done.stdout.strip()

    assert attempt("begin", "--ranks", 2, tiny_config) == f"go {tmp_path}/run"
    assert attempt("end", "--reason", "preflight: n2", tiny_config).startswith(
        "retry failed at step 0: preflight: n2 (start 1"
    )
    assert attempt("begin", "--ranks", 3, tiny_config).startswith(
        "refused train.batch_size 16 is not a multiple of 3 ranks"
    )
    assert json.loads((tmp_path / "run/status.json").read_text())["refused"] is True
    (tmp_path / "run/STOP").touch()
    assert attempt("begin", tiny_config) == f"stopped {tmp_path}/run/STOP exists; remove it to go on"
    assert attempt("begin", tmp_path / "gone.yaml").startswith("refused cannot read config")
    odd = f"{tmp_path}/größe\x1b"
    assert attempt("begin", tiny_config, f"run_dir={odd}") == f"go {odd}"  # not escaped, as for a terminal


def test_a_run_that_another_job_holds_is_not_concluded(config):
    status = Status(Path(config.run_dir))
    status.lock_run()
    status.begin(0)
    with pytest.raises(UserError, match="is being trained by"):
        end(config, "srun ended with code 1", patience=0.1)
    assert status.read()["status"] == "running"
    status.unlock_run()
    assert end(config, "srun ended with code 1").word == "retry"


def test_data_that_this_node_lacks_are_left_to_the_preflight(tiny_config):
    """Although the config takes the shape of the latents from them."""
    assert begin(load_config(str(tiny_config), ["data.path=/nowhere"]), 1).word == "go"


def test_an_unavailable_disk_is_named(tiny_config):
    output = run_python("-m", "mf_dist.jobs.attempt", "begin", tiny_config, "run_dir=/proc/nope").stdout
    assert output.startswith("failed /proc/nope: No such file")

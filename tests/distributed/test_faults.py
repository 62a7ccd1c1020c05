"""Whatever kills a run, the same command continues it to the same result. Real processes, real signals, real files.

TORTURE=1 (make torture) runs every trial; otherwise a seeded sample.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_python
from processes import (
    FULL,
    STEPS,
    assert_same_end,
    largest_difference,
    losses,
    run_history,
    status,
    tensors,
    valid_steps,
)

pytestmark = [pytest.mark.dist, pytest.mark.alone]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("trial", range(100 if FULL else 6))
def test_kill_9_at_a_random_moment(zygote, whole, config, tmp_path, trial):
    """Even trials at any time, odd ones during a save: at a write, fsync or rename."""
    g = np.random.default_rng(trial)
    ranks, run, log = 1 + trial // 4 % 2, tmp_path / "run", tmp_path / "log"
    reference = whole(ranks)
    if trial % 4 == 1:
        moment = {"io": int(g.integers(1, 1500 // ranks))}
    elif trial % 4 == 3:
        moment = {"call": str(g.choice(["fsync", "rename"])), "nth": int(g.integers(1, 50 // ranks))}
    else:
        moment = {"seconds": float(g.uniform(0.05, 2.0))}
    codes = zygote.run(log, [config], ranks, [{"do": "kill", "rank": int(g.integers(ranks)), **moment}])
    assert -9 in codes or set(codes) == {0}, log.read_text()
    was_saving = bool(list((run / "checkpoints").glob("*.tmp"))) if run.exists() else False
    committed = valid_steps(run)[-1:] or [0]
    claimed = [int(line.split("step-")[1][:8]) for line in log.read_text().splitlines() if line.startswith("saved")]
    assert committed >= claimed[-1:], "what was reported as saved must exist"
    log_length = len(log.read_text())
    assert set(zygote.run(log, [config], ranks)) == {0}, log.read_text()
    origin = f"from step-{committed[0]:08d}" if committed[0] else "from scratch"
    assert origin in log.read_text()[log_length:]
    assert_same_end(run, reference)
    assert not list((run / "checkpoints").glob("*.tmp")) and not list(run.glob("report.html.*"))
    assert run_history(run)[-1][1] == "finished" and (run / "report.html").is_file()
    print(f"trial {trial}: {moment}, exit codes {codes}, {'in a save' if was_saving else 'between saves'}")


STOPS = {"first step": 1, "next to a save": 5, "after a save": 6, "end of an epoch": 150 // 16, "in an epoch": 22}
COMBINATIONS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
SAMPLE = {(1, "bf16", "first step"), (2, "fp32", "end of an epoch"), (3, "bf16", "next to a save")}


@pytest.mark.parametrize("moment", STOPS)
@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_stopped_at_any_step_boundary_and_resumed(zygote, whole, config, tmp_path, stage, precision, moment):
    """Two ranks, accumulation 2; SIGTERM reaches one of them before the boundary, and both exit with code 0."""
    if not FULL and (stage, precision, moment) not in SAMPLE:
        pytest.skip("make torture")
    options = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "train.micro_batch=4"]
    reference, step = whole(2, *options), STOPS[moment]
    fault = {"do": ["term", "usr1"][step % 2], "step": step, "rank": step % 2}
    assert zygote.run(tmp_path / "log", [config, *options], 2, [fault]) == [0, 0], (tmp_path / "log").read_text()
    run = tmp_path / "run"
    assert status(run)["status"] == "stopped" and status(run)["step"] == step and valid_steps(run)[-1] == step
    assert "SIG" in status(run)["reason"]
    assert zygote.run(tmp_path / "log", [config, *options], 2) == [0, 0]
    assert_same_end(run, reference)


def test_other_world_sizes_and_stages_continue_with_the_same_batches(zygote, whole, config, tmp_path):
    """World size 4 -> 2 -> 1 and stage 1 -> 3 -> 2; 3 ranks are refused with the divisors. Only rounding differs."""
    reference, run, log = whole(1), tmp_path / "run", tmp_path / "log"
    for images, ranks, stage in ((160, 4, 1), (320, 2, 3), (480, 1, 2)):
        options = [f"train.total_images={images}", f"engine.zero_stage={stage}"]
        assert set(zygote.run(log, [config, *options], ranks)) == {0}, log.read_text()
    ours, theirs = losses(run), losses(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        tolerance = 1e-6 if a["step"] in (1, 11, 21) else 1e-4
        assert a["raw_loss_r_equals_t"] == pytest.approx(b["raw_loss_r_equals_t"], rel=tolerance), a["step"]
        assert a["raw_loss_r_below_t"] == pytest.approx(b["raw_loss_r_below_t"], rel=tolerance), a["step"]
    assert 0 < largest_difference(tensors(run, STEPS), tensors(reference, STEPS)) < 1e-4
    assert set(zygote.run(tmp_path / "log3", [config], 3)) == {2}
    assert (
        "train.batch_size 16 is not a multiple of 3 ranks x train.micro_batch 5 = 15" in (tmp_path / "log3").read_text()
    )


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_zero3_resumes_where_ranks_do_not_divide_the_weights(zygote, config, tmp_path, precision):
    """3 and 5 ranks, whose last partition is padded, from stages 1 and 2 and to them. A run that only loads and saves
    keeps every bit of the weights' fp32 masters, moments and EMAs."""
    run, log = tmp_path / "run", tmp_path / "log"
    batch = ["train.batch_size=60", f"engine.precision={precision}", "checkpoint.every_images=60", "checkpoint.keep=9"]
    for images, ranks, stage in ((60, 1, 1), (120, 3, 3), (180, 5, 3), (240, 3, 2), (300, 5, 3), (360, 1, 1)):
        options = [*batch, f"train.total_images={images}", f"engine.zero_stage={stage}"]
        assert set(zygote.run(log, [config, *options], ranks)) == {0}, log.read_text()
    assert zygote.run(log, [config, *batch, "train.total_images=360", f"run_dir={tmp_path / 'alone'}"]) == [0]
    alone = losses(tmp_path / "alone")
    for line, other in zip(losses(run), alone, strict=True):
        assert line["raw_loss_r_below_t"] == pytest.approx(other["raw_loss_r_below_t"], rel=1e-4)
    before = tensors(run, 6)
    skip = [{"poison": "gradient", "step": 7, "rank": rank} for rank in range(3)]  # the step is left out: nothing moves
    options = [*batch, "train.total_images=420", "engine.zero_stage=3"]
    assert set(zygote.run(log, [config, *options], 3, skip)) == {0}, log.read_text()
    assert largest_difference(tensors(run, 7), before) == 0


@pytest.mark.parametrize("where", ["loss", "gradient", "tangent"])
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_non_finite_numbers_on_one_rank_leave_the_step_out(zygote, config, tmp_path, where, stage, precision):
    if not FULL and (stage, where) not in {(1, "loss"), (2, "gradient"), (3, "tangent")}:
        pytest.skip("make torture")
    options = [
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "train.total_images=96",
        "checkpoint.every_images=16",
        "checkpoint.keep=9",
    ]
    poison = {"poison": where, "step": 4, "rank": 1}
    assert zygote.run(tmp_path / "log", [config, *options], 2, [poison]) == [0, 0], (tmp_path / "log").read_text()
    run = tmp_path / "run"
    before, after, later = (tensors(run, step) for step in (3, 4, 5))
    assert largest_difference(before, after) == 0 and largest_difference(after, later) > 0
    assert [line["skipped_steps"] for line in losses(run)] == [0, 0, 0, 1, 1, 1]
    assert "step 4: step left out: the gradient is not finite (1 left out in a row)" in (tmp_path / "log").read_text()
    assert all(np.isfinite(array).all() for array in tensors(run, 6).values())
    assert losses(run)[3]["loss"] is None and losses(run)[4]["loss"] is not None


def test_too_many_steps_left_out_in_a_row_end_the_run(zygote, config, tmp_path):
    poisons = [{"poison": "loss", "step": step} for step in range(7, 12)]
    assert zygote.run(tmp_path / "log", [config], 1, poisons) == [2]
    run, last_line = tmp_path / "run", (tmp_path / "log").read_text().splitlines()[-1]
    assert last_line.startswith("error: training diverged: 5 steps in a row were left out, the last at step 11")
    assert status(run)["status"] == "failed" and "diverged" in status(run)["reason"] and valid_steps(run) == [5, 10]


@pytest.mark.parametrize("action", ["clip", "skip"])
def test_a_spike_is_clipped_or_left_out_also_after_resuming(zygote, config, tmp_path, action):
    """With a factor just above 1 ordinary noise is a spike, from the 21st step on."""
    options = ["optim.spike_factor=1.05", f"optim.spike_action={action}", "train.max_skipped=30"]
    assert zygote.run(tmp_path / "log", [config, *options]) == [0], (tmp_path / "log").read_text()
    name = {"clip": "clipped_steps", "skip": "skipped_steps"}[action]
    counts = [line[name] for line in losses(tmp_path / "run")]
    assert counts[19] == 0 and 0 < counts[-1] <= 10
    reference = (tmp_path / "run").rename(tmp_path / "reference")
    for _ in range(2):
        assert zygote.run(tmp_path / "log", [config, *options], 1, [{"do": "term", "step": 23}]) == [0]
    assert_same_end(tmp_path / "run", reference)


DISK_FAULTS = [
    {"do": do, "call": call, "nth": nth}
    for do, call in (("ENOSPC", "write"), ("EIO", "write"), ("EIO", "fsync"), ("EIO", "rename"), ("short", "write"))
    for nth in (range(3, 800, 40) if call == "write" else range(1, 41, 2))
]


@pytest.mark.parametrize(
    "fault", DISK_FAULTS if FULL else DISK_FAULTS[3::20], ids=lambda f: "-".join(map(str, f.values()))
)
def test_a_failed_save_leaves_training_and_the_previous_checkpoint(zygote, whole, config, tmp_path, fault):
    """The disk fails once, somewhere in the first five saves: that save is lost with a warning, training continues, the
    next save succeeds."""
    log, run = tmp_path / "log", tmp_path / "run"
    assert zygote.run(log, [config], 1, [fault]) == [0], log.read_text()
    assert_same_end(run, whole(1))
    (warning,) = [line for line in log.read_text().splitlines() if line.startswith("warning: cannot write")]
    assert str(run) in warning and warning.endswith("MiB free there; earlier checkpoints are untouched")
    assert valid_steps(run) in ([25, 30], [20, 30])
    assert [row[3] for row in run_history(run) if row[1] == "warning"] == [warning[9:].partition("; earlier")[0]]


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_stays_full_or_read_only(zygote, config, tmp_path, kind):
    """A real small tmpfs, and a real read-only mount of it (root writes through permission bits)."""
    mount, log = tmp_path / "mount", tmp_path / "log"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        argv = [config, f"run_dir={mount / 'run'}", "checkpoint.every_images=160"]
        assert zygote.run(log, [*argv, "train.total_images=160"]) == [0]
        if kind == "full":
            free = shutil.disk_usage(mount).free
            (mount / "filler").write_bytes(bytes(free - 300_000))
            assert zygote.run(log, [*argv, "train.total_images=640"]) == [2]
            assert "MiB free, checkpoints need" in log.read_text()
            (mount / "filler").write_bytes(bytes(free - 1_300_000))
        else:
            subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        assert zygote.run(log, [*argv, "train.total_images=640"]) == [2], log.read_text()
        error = log.read_text().splitlines()[-1]
        assert str(mount) in error and error.startswith("error: ")
        assert 10 in valid_steps(mount / "run")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_crash_loop_stops_and_can_be_restarted_by_hand(zygote, config, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    for start in range(3):
        assert zygote.run(log, [config], 1, [{"do": "raise", "step": 3}]) == [1]
        assert status(run)["status"] == "failed" and status(run)["reason"] == "injected fault"
        assert status(run)["starts_without_progress"] == start + 1
    assert zygote.run(log, [config]) == [2]
    assert status(run)["status"] == "crash_loop"
    assert "\nerror: crash loop: 3 starts brought no new checkpoint after step 0" in log.read_text()
    assert zygote.run(log, [config]) == [0] and status(run)["status"] == "finished"
    ends = ["crash loop: not started again", "started", "finished"]
    assert [row[1] for row in run_history(run)] == [*["started", "failed"] * 3, *ends]


@pytest.mark.parametrize("how", ["file", "clock"])
def test_a_stop_file_and_the_time_limit_stop_the_run(zygote, whole, config, tmp_path, how):
    log, run, reference = tmp_path / "log", tmp_path / "run", whole(1)
    if how == "file":
        run.mkdir()
        (run / "STOP").touch()
    options = ["train.max_hours=0.01"] if how == "clock" else []  # less than stop.MARGIN
    assert zygote.run(log, [config, *options]) == [0]
    assert status(run)["status"] == "stopped" and status(run)["step"] == 0
    assert ("STOP exists; remove it" if how == "file" else "the time limit is near") in status(run)["reason"]
    (run / "STOP").unlink(missing_ok=True)
    assert zygote.run(log, [config]) == [0]
    assert_same_end(run, reference)


def torchrun(config, log, faults, *options, launcher=()):
    """Exit code and seconds of the run under the real launcher; asserts that no process of it is left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher]
    command += [Path(__file__).with_name("zygote.py"), json.dumps(faults), config, *options]
    start = time.monotonic()
    with open(log, "w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=ENV, timeout=200).returncode
    seconds = time.monotonic() - start
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(config).encode() in p.read_bytes()]
    assert not left, "orphans"
    return code, seconds


HANG = 6.0
START_UP = 25.0
"""Seconds that launching two processes may take on two cores."""


@pytest.mark.parametrize("launcher", [["--shutdown-timeout=2"], []], ids=["short-shutdown", "plain"])
@pytest.mark.parametrize("do", ["freeze", "sleep", "kill", "exit", "raise"])
def test_a_rank_that_hangs_or_dies_ends_the_job(config, tmp_path, do, launcher):
    if not FULL and (do, bool(launcher)) not in {("freeze", True), ("sleep", True), ("kill", False)}:
        pytest.skip("make torture")
    log, fault = tmp_path / "log", {"do": do, "step": 5, "rank": 1}
    code, seconds = torchrun(config, log, [fault], f"train.hang_seconds={HANG:.0f}", launcher=launcher)
    text, entry = log.read_text(), status(tmp_path / "run")
    assert code != 0 and entry["status"] == "failed", text
    assert seconds < START_UP + HANG + (10 if launcher else 40)
    if do in ("freeze", "sleep"):
        running = {"freeze": [0], "sleep": [0, 1]}[do]
        assert "made no progress for" in entry["reason"]
        assert any(f"error: rank {rank} made no progress for" in text for rank in running) and "Current thread" in text
        assert "in _one_step" in text or "in agree" in text  # where it hung


def test_no_false_alarm_while_sampling_takes_long(config, tmp_path):
    options = ["train.hang_seconds=2", "log.sample_every_images=160", "train.total_images=320"]
    code, _ = torchrun(config, tmp_path / "log", [{"draw": 6}], *options)
    assert code == 0 and status(tmp_path / "run")["status"] == "finished", (tmp_path / "log").read_text()


def test_a_writer_that_hangs_is_detected(zygote, config, tmp_path):
    """fsync never returns, as on a dead mount: the next save waits for it, and the watchdog ends the run."""
    log, fault = tmp_path / "log", {"do": "sleep", "call": "fsync", "nth": 4}
    assert zygote.run(log, [config, "train.hang_seconds=1"], 1, [fault]) == [1]
    assert "made no progress for" in status(tmp_path / "run")["reason"] and "Current thread" in log.read_text()


def test_the_last_save_is_retried(zygote, whole, config, tmp_path):
    fault = {"do": "EIO", "call": "fsync", "nth": 3}
    assert zygote.run(tmp_path / "log", [config, "checkpoint.every_images=100000"], 1, [fault]) == [0]
    assert valid_steps(tmp_path / "run") == [STEPS] and "warning: cannot write" in (tmp_path / "log").read_text()


def test_a_disk_without_room_for_a_line_or_a_picture(zygote, config, tmp_path):
    """metrics.jsonl on /dev/full, and writing pictures fails: warnings, and the weights are saved."""
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    options = ["log.sample_every_images=480", "train.total_images=480"]
    assert zygote.run(log, [config, "train.total_images=16"]) == [0]  # the link survives a start from a checkpoint
    (run / "metrics.jsonl").unlink(missing_ok=True)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    (run / "samples").write_text("in the way")
    assert zygote.run(log, [config, *options]) == [0], log.read_text()
    assert "warning: cannot write" in log.read_text() and valid_steps(run)[-1] == STEPS


@pytest.mark.parametrize("signal_name", ["TERM", "USR1"])
def test_a_signal_to_the_whole_group_spares_the_loaders(whole, config, tmp_path, signal_name):
    """torchrun and SLURM signal every process, those of the data loader too. Here the group of one run."""
    log, run = tmp_path / "log", tmp_path / "run"
    command = [sys.executable, "-m", "mf_dist.train", config, "data.num_workers=2", "train.total_images=160000"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=file, stderr=file, start_new_session=True)
    while "step 3/" not in log.read_text() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, getattr(signal, f"SIG{signal_name}"))
    assert process.wait(60) == 0, log.read_text()
    assert status(run)["status"] == "stopped" and valid_steps(run)[-1] == status(run)["step"]
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(config).encode() in p.read_bytes()]
    assert not left, "loader processes outlived the run"


def session(leader):
    """Pids of the processes of a session that have not ended."""
    pids = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rsplit(")", 1)[1].split()[:4]
            pids |= {int(path.parent.name)} if int(number) == leader and state != "Z" else set()
    return pids


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.long)])
def test_loaders_that_are_not_forked_end_with_the_trainer_only(config, tmp_path, method):
    """From python 3.14 on a fork server is their parent. SIGTERM to all processes but the trainer, which goes on; then
    kill -9 of the trainer."""
    log = tmp_path / "log"
    start = (
        "import multiprocessing, sys, mf_dist.train as t; multiprocessing.set_start_method(sys.argv.pop(1)); t.main()"
    )
    command = [sys.executable, "-c", start, method, config, "data.num_workers=2", "train.total_images=160000"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=file, stderr=file, start_new_session=True)
    while "step 3/" not in log.read_text() and process.poll() is None:
        time.sleep(0.02)
    others = session(process.pid) - {process.pid}
    assert len(others) >= 2
    for pid in others:
        os.kill(pid, signal.SIGTERM)
    step = int(log.read_text().rsplit("\nstep ", 1)[1].split("/")[0])
    while f"step {step + 20}/" not in log.read_text():  # more than are loaded ahead
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while left := session(process.pid):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.1)


def test_a_refused_start_is_in_the_status(config, tmp_path):
    command = [
        "-m",
        "mf_dist.train",
        config,
        f"data.path={tmp_path / 'gone'}",
        "model.latent_size=8",
        "model.latent_channels=4",
        "model.num_classes=10",
    ]
    run_python(*command, expect=2)
    assert (
        status(tmp_path / "run")["status"] == "failed" and "no finished dataset" in status(tmp_path / "run")["reason"]
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_log_disk_does_not_end_a_run(zygote, whole, config, tmp_path, ranks):
    """Every line of every rank is lost, which the history says once."""
    assert set(zygote.run("/dev/full", [config], ranks)) == {0}
    assert_same_end(tmp_path / "run", whole(ranks))
    notes = [row for row in run_history(tmp_path / "run") if row[1] == "warning"]
    assert len(notes) == 1 and "standard output cannot be written (No space left on device)" in notes[0][3]

"""slurm/train_xl.sh submitted to a real SLURM, with real signals, lost nodes and preemption."""

import json
import os
import re
import signal
import sys
import time

import pytest
from jobs import STEPS, Jobs, assert_whole_curve
from processes import largest_difference, losses, status, tensors

pytestmark = pytest.mark.slurm


@pytest.fixture
def jobs(cluster, tmp_path, latents, images):
    jobs = Jobs(cluster, tmp_path, latents, images)
    yield jobs
    cluster.ask("scancel", "--user=root")
    cluster.wait_idle()
    jobs.wait(lambda: not jobs.orphans(), 10, f"the end of {jobs.orphans()}")


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory, latents, images):
    """An undisturbed run: one job on two nodes with two ranks each."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("undisturbed"), latents, images)
    job = jobs.train("--nodes=2")
    assert jobs.wait_end(job) == "COMPLETED", jobs.log()
    assert_whole_curve(jobs.run)
    return jobs


def assert_resumed_at(jobs, step):
    assert f"resuming {jobs.run} from step-{step:08d}" in jobs.log()


def assert_same_end(jobs, undisturbed):
    """Every bit of weights, moments and EMA, and the whole curve."""
    assert_whole_curve(jobs.run)
    assert largest_difference(tensors(jobs.run, STEPS), tensors(undisturbed.run, STEPS)) == 0
    assert losses(jobs.run) == losses(undisturbed.run)


@pytest.mark.slurm_ci
def test_two_nodes_give_the_losses_of_one_process(undisturbed, tmp_path, zygote):
    """The same global batch without SLURM."""
    assert undisturbed.last_line() == f"finished at step {STEPS}"
    alone, overrides = tmp_path / "alone", [f"run_dir={tmp_path / 'alone'}", "train.total_images=800"]
    argv = ["configs/imagenet256_xl2.yaml", *undisturbed.overrides, *overrides]
    assert zygote.run(tmp_path / "log", argv) == [0], (tmp_path / "log").read_text()
    assert_same_losses(losses(undisturbed.run), losses(alone))


def assert_same_losses(ours, alone):
    """Equal except for rounding, which grows with the steps."""
    assert len(ours) >= 50 and len(alone) == 50
    for a, b in zip(ours[:50], alone, strict=True):
        for name in ("raw_loss_r_equals_t", "raw_loss_r_below_t"):
            assert a[name] == pytest.approx(b[name], rel=1e-6 if a["step"] == 1 else 1e-3), a["step"]


def test_one_node_with_a_local_disk(jobs, undisturbed):
    jobs.site(f"LOCAL_SCRATCH={jobs.folder}/scratch")
    job = jobs.train("--nodes=1", overrides=("train.total_images=800",))
    assert jobs.wait_end(job) == "COMPLETED", jobs.log()
    assert f"staged 3 of 3 shards in {jobs.folder}/scratch" in jobs.log()
    assert_same_losses(losses(undisturbed.run), losses(jobs.run))


@pytest.mark.slurm_ci
def test_usr1_saves_requeues_and_resumes(jobs, undisturbed):
    job = jobs.train("--nodes=2")
    jobs.wait_step(20)
    jobs.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    jobs.wait(lambda: status(jobs.run)["status"] == "stopped", 30, "the save")
    step = status(jobs.run)["step"]
    assert 20 <= step < STEPS
    assert jobs.wait_end(job) == "COMPLETED", jobs.log()
    assert jobs.field(job, "Restarts") == "1"
    assert f"requeued: stopped at step {step}: SIGUSR1" in jobs.log()
    assert_resumed_at(jobs, step)
    assert_same_end(jobs, undisturbed)


def test_usr1_before_training_begins_requeues(jobs):
    """Also, data.stage on the command line takes precedence over the site's LOCAL_SCRATCH."""
    jobs.site(f"LOCAL_SCRATCH={jobs.folder}/scratch")
    job = jobs.train("--nodes=2", overrides=("data.stage=off",))
    jobs.wait((jobs.run / "status.json").exists, 30, "the preflight")
    jobs.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    jobs.wait(lambda: f"job {job} start 1" in jobs.log(), 90, "the restart")
    assert "requeued: stopped at step 0: SIGUSR1 before work began" in jobs.log()
    assert not (jobs.folder / "scratch").exists()


@pytest.mark.slurm_ci
def test_a_node_without_power_is_replaced(jobs, undisturbed):
    """Two of three nodes; the checkpoint of step 100 is the newest when the second one dies."""
    job = jobs.train("--nodes=2")
    jobs.wait_step(120)
    jobs.cluster.cut_power("n2")
    try:
        assert jobs.wait_end(job, 180) == "COMPLETED", jobs.log()
        assert jobs.field(job, "NodeList") == "n[1,3]"
        assert_resumed_at(jobs, 100)
        assert_same_end(jobs, undisturbed)
    finally:
        print(jobs.log())
        jobs.cluster.start_node("n2")


def test_a_batch_node_without_power_is_replaced(jobs, undisturbed):
    """The job script and srun die with n1: SLURM alone is left to requeue."""
    job = jobs.train("--nodes=2")
    jobs.wait_step(120)
    assert jobs.field(job, "BatchHost") == "n1"
    jobs.cluster.cut_power("n1")
    try:
        assert jobs.wait_end(job, 180) == "COMPLETED", jobs.log()
        assert jobs.field(job, "NodeList") == "n[2-3]" and jobs.field(job, "Restarts") == "1"
        assert_resumed_at(jobs, 100)
        assert_same_end(jobs, undisturbed)
    finally:
        jobs.cluster.start_node("n1")


def test_preemption_saves_and_resumes(jobs, undisturbed):
    job = jobs.train("--nodes=2")
    jobs.wait_step(50)
    urgent = jobs.cluster.ask(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o/dev/null", "--wrap=sleep 3"
    )
    jobs.wait(lambda: jobs.field(urgent.strip(), "JobState") == "RUNNING", 30, "the urgent job")
    step = status(jobs.run)["step"]
    assert status(jobs.run)["stopped_by"] == "SIGTERM" and step >= 50
    assert jobs.wait_end(job) == "COMPLETED", jobs.log()
    assert_resumed_at(jobs, step)
    assert_same_end(jobs, undisturbed)


def test_requeued_by_scontrol(jobs, undisturbed):
    job = jobs.train("--nodes=2")
    jobs.wait_step(50)
    jobs.cluster.ask("scontrol", "requeue", job)
    jobs.wait(lambda: status(jobs.run)["status"] == "stopped", 30, "the save")
    step = status(jobs.run)["step"]
    assert jobs.wait_end(job) == "COMPLETED", jobs.log()
    assert jobs.field(job, "Restarts") == "1"
    assert_resumed_at(jobs, step)
    assert_same_end(jobs, undisturbed)


def test_cancelled_jobs_save_and_are_not_requeued(jobs, undisturbed):
    """scancel --signal=TERM, the next sbatch; a plain scancel, the next sbatch."""
    for options, state in ((["--signal=TERM"], "FAILED"), ([], "CANCELLED")):
        reached = status(jobs.run)["step"] if jobs.run.exists() else 0
        job = jobs.train("--nodes=2")
        jobs.wait_step(reached + 50)
        jobs.cluster.ask("scancel", *options, job)
        assert jobs.wait_end(job) == state, jobs.log()
        jobs.wait(lambda: status(jobs.run)["status"] == "stopped", 15, "the save")
        assert jobs.field(job, "Restarts") == "0" and status(jobs.run)["stopped_by"] == "SIGTERM"
        assert jobs.last_line().startswith(f"stopped at step {status(jobs.run)['step']}: SIGTERM"), jobs.log()
    step = status(jobs.run)["step"]
    assert jobs.wait_end(jobs.train("--nodes=2")) == "COMPLETED"
    assert_resumed_at(jobs, step)
    assert_same_end(jobs, undisturbed)


@pytest.mark.parametrize(("do", "within"), [("kill", 60), ("stop", 90)])
def test_a_rank_that_dies_or_hangs_ends_the_job(jobs, do, within):
    """Limits: 60 s after kill -9; hang_seconds (15) and the watchdog's further steps for one that hangs."""
    job = jobs.train("--nodes=2", "--no-requeue")
    jobs.wait_step(30)
    victim = [pid for pid in jobs.cluster.processes("n2", str(jobs.run)) if "mf_dist.train" in jobs.command(pid)][-1]
    os.kill(victim, signal.SIGKILL if do == "kill" else signal.SIGSTOP)
    start = time.monotonic()
    assert jobs.wait_end(job) == "FAILED" and jobs.field(job, "ExitCode") == "1:0", jobs.log()
    assert time.monotonic() - start < within
    assert jobs.last_line().startswith("failed at step"), jobs.log()
    assert ("made no progress for" if do == "stop" else "onnection") in jobs.last_line()


def test_a_bad_node_is_named_and_excluded(jobs, undisturbed):
    """n2 alone has no room for staged shards, in a job that may not be requeued; then n2 cannot see the shards, and the
    job is requeued to n1 and n3."""
    scratch = jobs.folder / "scratch"
    scratch.mkdir()
    jobs.site(f"LOCAL_SCRATCH={scratch}")
    with jobs.broken_disk("n2", scratch):
        job = jobs.train("--nodes=2", "--no-requeue")
        assert jobs.wait_end(job) == "FAILED", jobs.log()
        assert jobs.last_line().startswith(f"failed at step 0: preflight: n2: staging: {scratch} has ")
        assert "GiB free, the shards need" in jobs.last_line()
    jobs.site("")
    with jobs.broken_disk("n2", jobs.latents):
        job = jobs.train("--nodes=2")
        assert jobs.wait_end(job) == "COMPLETED", jobs.log()
        why = f"preflight: n2: shards: no finished dataset at '{jobs.latents}'"
        assert f"requeued without n2: failed at step 0: {why}" in jobs.log()
        assert jobs.field(job, "ExcNodeList") == "n2" and jobs.field(job, "NodeList") == "n[1,3]"
        assert_same_end(jobs, undisturbed)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_batch_node_may_be_the_bad_one(jobs, nodes):
    """n1 cannot see the shards, which is no mistake of the user, although a single node cannot know."""
    with jobs.broken_disk("n1", jobs.latents):
        job = jobs.train(f"--nodes={nodes}", overrides=("train.total_images=800",))
        assert jobs.wait_end(job) == "COMPLETED", jobs.log()
        why = f"preflight: n1: shards: no finished dataset at '{jobs.latents}'"
        assert f"requeued without n1: failed at step 0: {why}" in jobs.log()
        assert jobs.field(job, "NodeList") == ("n2" if nodes == 1 else "n[2-3]")


def test_a_node_with_a_broken_card_is_named(jobs):
    """SLURM reaches n2 by its first network card; the second one, which the ranks use, is down."""
    jobs.site("GLOO_SOCKET_IFNAME=ib0 NPROC_PER_NODE=1 PREFLIGHT_SECONDS=120")
    jobs.cluster.run_on("n2", "ip", "link", "set", "ib0", "down")
    try:
        job = jobs.train("--nodes=3", "--no-requeue", overrides=("train.batch_size=24",))
        assert jobs.wait_end(job, 300) == "FAILED", jobs.log()
        assert "testing pairs of nodes" in jobs.log()
        assert jobs.last_line().startswith(
            "failed at step 0: preflight: n2: the all-reduce with either neighbour fails (start 1 "
        ), jobs.log()
    finally:
        jobs.cluster.run_on("n2", "ip", "link", "set", "ib0", "up")


def test_a_preflight_that_hangs_is_ended(jobs):
    """Every torchrun of the all-reduce is frozen, so that none of them can detect it."""
    jobs.site("PREFLIGHT_SECONDS=40")
    job = jobs.train("--nodes=2", "--no-requeue")
    frozen: set[int] = set()

    def freeze():
        for name in ("n1", "n2"):
            pids = jobs.cluster.processes(name, str(jobs.run))
            agents = [pid for pid in pids if "-m torch.distributed.run --local-addr" in jobs.command(pid)]
            for pid in {p for p in agents if jobs.command(p).startswith(sys.executable)} - frozen:
                os.kill(pid, signal.SIGSTOP)
                frozen.add(pid)
        return len(frozen) >= 2

    jobs.wait(freeze, 90, "the all-reduce")
    start = time.monotonic()
    assert jobs.wait_end(job) == "FAILED", jobs.log()
    assert time.monotonic() - start < 90
    assert "the all-reduce over all nodes failed, not done within PREFLIGHT_SECONDS=40" in jobs.last_line()


def test_sigterm_before_ranks_handle_signals_ends_the_job(jobs):
    """In the preflight, and while torchrun starts the ranks."""
    for is_reached, reason in (
        (lambda: status(jobs.run)["status"] == "starting", "SIGTERM before work began"),
        (lambda: "preflight is good" in jobs.log(), ": SIGTERM"),
    ):
        job = jobs.train("--nodes=2", overrides=("train.total_images=160000",))
        jobs.wait(lambda is_reached=is_reached: (jobs.run / "status.json").exists() and is_reached(), 90, "that moment")
        jobs.cluster.ask("scancel", "--signal=TERM", job)
        assert jobs.wait_end(job, 90) == "FAILED" and jobs.field(job, "ExitCode") == "3:0", jobs.log()
        assert jobs.field(job, "Restarts") == "0" and status(jobs.run)["stopped_by"] == "SIGTERM"
        assert jobs.last_line().startswith("stopped at step ") and reason in jobs.last_line()


def test_a_crash_at_every_start_ends_in_a_crash_loop(jobs):
    """A package that no rank can import: the run never records anything itself."""
    broken = jobs.folder / "broken"
    broken.mkdir()
    (broken / "deepspeed.py").write_text("raise RuntimeError('broken on purpose')\n")
    jobs.site(f"PYTHONPATH={broken}")
    job = jobs.train("--nodes=1")
    assert jobs.wait_end(job, 240) == "FAILED", jobs.log()
    assert jobs.field(job, "Restarts") == "2" and status(jobs.run)["status"] == "crash_loop"
    assert jobs.log().count("requeued: failed") == 2
    assert jobs.last_line().startswith("failed: crash_loop at step 0: 3 starts brought no new checkpoint")


def test_nothing_to_do(jobs):
    """A finished run, a STOP file and mistakes in the call end the job at once, in the right state."""
    jobs.run.mkdir()
    (jobs.run / "STOP").touch()
    finished = {"status": "finished", "step": STEPS, "reason": "", "committed_step": STEPS}
    for options, site, state, why in (
        ((), "", "FAILED", f"{jobs.run}/STOP exists; remove it to go on"),
        (("model.depth=0",), "", "FAILED", "refused: "),
        (
            ("data.path=/nowhere",),
            "",
            "FAILED",
            "refused: preflight: on all nodes, shards: no finished dataset at '/now",
        ),
        ((), "\nunset NPROC_PER_NODE SLURM_GPUS_ON_NODE", "FAILED", "refused: SLURM names no GPUs and "),
        ((), "", "COMPLETED", f"finished {jobs.run} has finished, at step {STEPS}; nothing to do"),
    ):
        jobs.site(site)
        if options:
            (jobs.run / "STOP").unlink(missing_ok=True)
        if state == "COMPLETED":
            (jobs.run / "status.json").write_text(json.dumps(finished))
        start = time.monotonic()
        job = jobs.train("--nodes=2", overrides=options)
        assert jobs.wait_end(job, 60) == state, jobs.log()
        assert time.monotonic() - start < 40 and jobs.field(job, "Restarts") == "0"
        assert why in jobs.last_line()


def test_an_array_task_requeues_only_itself_and_the_stop_file_stops_all(jobs):
    """Tasks 1 and 2, one at a time, are the same run. USR1 to the first requeues it behind the second."""
    array = jobs.train("--nodes=2", "--array=1-2%1", overrides=("train.total_images=160000",))
    jobs.wait_step(20)
    jobs.cluster.ask("scancel", "--batch", "--signal=USR1", f"{array}_1")
    jobs.wait(lambda: f"job {array}_2 start 0" in jobs.log(), 60, "the second task")
    reached = status(jobs.run)["step"]
    jobs.wait_step(reached + 5)
    (jobs.run / "STOP").touch()
    for task in (f"{array}_1", f"{array}_2"):
        jobs.wait(lambda task=task: jobs.field(task, "JobState") == "FAILED", 60, f"the end of {task}")
        assert jobs.field(task, "Restarts") == ("1" if task == f"{array}_1" else "0")
    assert jobs.last_line() == f"{jobs.run}/STOP exists; remove it to go on"
    assert status(jobs.run)["stopped_by"] == "FILE"


def test_the_time_limit_itself(jobs):
    """SLURM's own signal, which comes up to a minute early. Versions newer than Debian's also set SLURM_JOB_END_TIME,
    at which the run would stop first."""
    jobs.site("SLURM_JOB_END_TIME=")
    job = jobs.train("--nodes=2", "--time=1", "--signal=B:USR1@10", overrides=("train.total_images=160000",))
    jobs.wait(lambda: f"job {job} start 1" in jobs.log(), 150, "the restart")
    assert "SIGUSR1: the time limit is near" in jobs.log()
    assert re.search(r"requeued: stopped at step \d+: SIGUSR1", jobs.log())
    assert status(jobs.run)["starts_without_progress"] == 0

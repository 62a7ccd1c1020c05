"""The other job scripts on a real SLURM: the encode array, the evaluation, the pipeline; and sbatch of all."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FEATURES, ROOT, VAE, encode, run_python
from jobs import STEPS, Jobs
from processes import status

pytestmark = pytest.mark.slurm
SCRIPTS = ["train_xl.sh", "train_b4.sh", "encode_latents.sh", "fid_eval.sh"]
CPU = ["--gres=gpu:4", "--cpus-per-task=8"]


@pytest.fixture
def jobs(cluster, tmp_path, latents, images):
    return Jobs(cluster, tmp_path, latents, images)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".npz")}


def test_an_encode_array_with_a_task_killed_makes_the_same_bytes(jobs, images, tmp_path):
    """Four tasks, two per node; one is killed as soon as it runs, another one gets SIGUSR1: both requeue themselves."""
    out, options = tmp_path / "latents", ["--vae", VAE, "--resolution", "32", "--shard-size", "10", "--batch", "5"]
    call = ["--array=0-3", *CPU, "slurm/encode_latents.sh", "--images", images, "--out", out, *options]
    array = jobs.submit(*call)
    victims: list[int] = []

    def find_victims():
        for name in jobs.cluster.names:
            pids = jobs.cluster.processes(name, str(out))
            victims.extend(p for p in pids if jobs.command(p).startswith(f"{sys.executable} tools/encode"))
        return victims

    jobs.wait(find_victims, 60, "a task's process")
    killed = int(re.search(rb"SLURM_ARRAY_TASK_ID=(\d)", Path(f"/proc/{victims[0]}/environ").read_bytes()).group(1))
    os.kill(victims[0], signal.SIGKILL)
    signalled = (killed + 1) % 4
    jobs.wait(lambda: f"job {array}_{signalled} start 0" in jobs.log(), 30, "the other task")
    jobs.cluster.ask("scancel", "--batch", "--signal=USR1", f"{array}_{signalled}")
    for task in range(4):
        assert jobs.wait_end(f"{array}_{task}", 120) == "COMPLETED", jobs.log()
    restarts = [jobs.field(f"{array}_{task}", "Restarts") for task in range(4)]
    assert restarts == ["1" if task in (killed, signalled) else "0" for task in range(4)]
    assert re.search(r"requeued: stopped at step \d+: SIGUSR1", jobs.log())
    assert re.search(r"requeued: failed at step \d+: srun ended with code 137 before the tool said why", jobs.log())
    assert len({jobs.field(f"{array}_{task}", "NodeList") for task in range(4)}) > 1
    run_python("tools/latents.py", "verify", out)
    encode(images, tmp_path / "alone", shard_size=10, batch=5)
    assert files(out) == files(tmp_path / "alone") and len(files(out)) == 30


def test_a_disk_fault_is_retried_until_it_is_a_crash_loop(jobs, images, tmp_path):
    """The disk of the shards is full, which is no mistake in the call."""
    out = tmp_path / "latents"
    out.mkdir()
    with jobs.broken_disk("n1", out):
        call = ["--array=0", "--nodelist=n1", *CPU, "slurm/encode_latents.sh", "--images", images, "--out", out]
        array = jobs.submit(*call, "--vae", VAE, "--resolution", "32", "--shard-size", "10")
        assert jobs.wait_end(f"{array}_0", 180) == "FAILED", jobs.log()
    assert jobs.field(f"{array}_0", "Restarts") == "2" and jobs.log().count("requeued: failed at step 0") == 2
    assert jobs.last_line().startswith("failed: crash_loop at step 0: 3 starts brought no new checkpoint")
    assert "No space left on device" in jobs.last_line()


def test_the_whole_pipeline_is_one_command(jobs, images, tmp_path):
    """Encode, train, evaluate; the training is requeued once, and the evaluation waits for its final end."""
    data, common = tmp_path / "latents", f"--output={tmp_path}/job.log"
    jobs.site(
        f"\nENCODE_SBATCH=({common} --array=0-1 {' '.join(CPU)}) EVAL_SBATCH=({common} {' '.join(CPU)})"
        f"\nTRAIN_SBATCH=({common} --nodes=2)"
    )
    overrides = [o for o in jobs.overrides if not o.startswith(("run_dir", "data.path"))]
    command = ["slurm/pipeline.sh", "slurm/train_b4.sh", jobs.run, data, "--images", images, "--vae", VAE]
    command += ["--resolution", "32", "--shard-size", "60", "--", *overrides, "model.patch_size=2"]
    output = jobs.cluster.ask(*command, env=jobs.env, cwd=ROOT)
    _, train, _, last = re.findall(r"^\w+ (\d+)", output, re.MULTILINE)
    jobs.wait_step(20, 180)
    jobs.cluster.ask("scancel", "--batch", "--signal=USR1", train)
    assert jobs.wait_end(last, 240) == "COMPLETED", jobs.log()
    assert jobs.field(train, "Restarts") == "1" and status(jobs.run)["step"] == STEPS
    measured = json.loads((jobs.run / "eval/metrics.json").read_text())
    assert sorted((entry["nfe"], entry["step"]) for entry in measured) == [(1, STEPS), (2, STEPS)]


def test_jobs_that_cannot_run_leave_the_queue(jobs, images, tmp_path):
    """Encode is refused; the dependent jobs are removed, and nothing stays in the queue."""
    command = ["slurm/pipeline.sh", "slurm/train_b4.sh", jobs.run, tmp_path / "latents", "--images", "/nowhere"]
    jobs.site(f"\nENCODE_SBATCH=(--output={tmp_path}/job.log --array=0-1)")
    assert jobs.cluster.ask(*command, "--vae", VAE, "--resolution", "32", env=jobs.env, cwd=ROOT)
    jobs.wait(lambda: not jobs.cluster.ask("squeue", "-h").strip(), 90, "an empty queue")
    assert jobs.last_line().startswith("refused: ") and "/nowhere" in jobs.last_line()


def test_tasks_of_srun_form_one_process_group(jobs, images, tmp_path):
    """Without torchrun, on two nodes: the numbers equal those of one process."""
    tool = ["tools/fid_eval.py", "--images", images, "--features", FEATURES, "--reference", images, "--block", 10]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=2", "--time=5", sys.executable, *map(str, tool)]
    command = [*srun, "--out", str(tmp_path / "four")]
    done = subprocess.run(command, env=jobs.env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run_python(*tool, "--out", tmp_path / "one")
    four, one = (json.loads((tmp_path / name / "metrics.json").read_text())[0] for name in ("four", "one"))
    assert (four["ranks"], one["ranks"]) == (4, 1) and four["metrics"] == one["metrics"]
    assert done.stdout.count("written to") == 1


@pytest.mark.slurm_ci
@pytest.mark.parametrize("script", SCRIPTS)
def test_sbatch_accepts(cluster, script):
    command = ["sbatch", "--test-only", f"slurm/{script}"]
    done = subprocess.run(command, env=cluster.env, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


@pytest.mark.slurm_ci
def test_the_command_line_and_the_environment_override_the_script(jobs):
    """sbatch's own precedence: command line, SBATCH_ variables, the script."""
    env = {**jobs.env, "SBATCH_TIMELIMIT": "7", "SBATCH_PARTITION": "urgent", "SBATCH_JOB_NAME": "other"}
    command = ["sbatch", "--parsable", "--hold", "--partition=train", "--nodes=3", "slurm/train_xl.sh"]
    job = jobs.cluster.ask(*command, env=env, cwd=ROOT).strip()
    assert jobs.field(job, "TimeLimit") == "00:07:00" and jobs.field(job, "JobName") == "other"
    assert jobs.field(job, "Partition") == "train" and jobs.field(job, "NumNodes").startswith("3")
    jobs.cluster.ask("scancel", job)

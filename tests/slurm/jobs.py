"""Jobs of the shipped scripts on the test cluster, with a model small enough for it."""

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from cluster import Cluster
from conftest import FEATURES, ROOT
from processes import losses, status

STEPS = 200
TINY = """
data.num_workers=0 model.depth=2 model.hidden_size=32 model.num_heads=2 model.latent_size=8 model.num_classes=10
optim.lr=1e-3 optim.ema_decay=0.99 train.batch_size=16 train.hang_seconds=15 engine.precision=fp32
engine.compile=false checkpoint.every_images=1600 log.every_steps=1 log.sample_every_images=0 eval.num_samples=60
"""
SITE = """
PYTHON={python}
JOBS_DIR={folder}/jobs
NPROC_PER_NODE=2
GPUS_PER_NODE=0  # this cluster's GPUs are fake
export OMP_NUM_THREADS=1 {more}
"""
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE")


class Jobs:
    """The jobs of one test, in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, latents: Path, images: Path) -> None:
        self.cluster, self.folder, self.run, self.latents = cluster, folder, folder / "run", latents
        self.overrides = [
            f"run_dir={self.run}",
            f"data.path={latents}",
            f"train.total_images={16 * STEPS}",
            *TINY.split(),
        ]
        self.overrides += [f"eval.features={FEATURES}", f"eval.reference={images}"]
        self.site("")

    def site(self, more: str) -> None:
        """Writes the site.env of the following jobs; `more`: further exports."""
        (self.folder / "site.env").write_text(SITE.format(python=sys.executable, folder=self.folder, more=more))
        self.env = {**self.cluster.env, "SITE_ENV": str(self.folder / "site.env")}

    def submit(self, *arguments: object) -> str:
        """Runs sbatch with these arguments; returns the job id. The log is job.log."""
        options = [f"--output={self.folder}/job.log", "--parsable"]
        command = ["sbatch", *options, *map(str, arguments)]
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def train(self, *options: object, overrides: tuple[str, ...] = ()) -> str:
        return self.submit(*options, "slurm/train_xl.sh", *self.overrides, *overrides)

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def last_line(self) -> str:
        """The job's last log line without its time; lines written by SLURM itself do not count."""
        lines = [line for line in self.log().splitlines() if not line.startswith(("slurmstepd", "srun:"))]
        return lines[-1][20:] if lines else ""

    def field(self, job: str, name: str) -> str:
        match = re.search(rf"\b{name}=(\S*)", self.cluster.ask("scontrol", "show", "job", job))
        return match.group(1) if match else ""

    def wait_step(self, step: int, seconds: float = 240) -> None:
        """Waits until the run has logged this step."""
        path = self.run / "metrics.jsonl"
        self.wait(lambda: path.exists() and len(path.read_text().splitlines()) >= step, seconds, f"step {step}")

    def wait_end(self, job: str, seconds: float = 300) -> str:
        """Waits for the end of the job; returns its state."""
        self.wait(lambda: self.field(job, "JobState") in DONE, seconds, f"the end of job {job}")
        return self.field(job, "JobState")

    def wait(self, holds, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}; the log:\n{self.log()}"
            time.sleep(0.1)

    @contextmanager
    def broken_disk(self, node: str, folder: Path):
        """Replaces the folder by an empty disk of 4 KiB, on that node alone."""
        self.cluster.run_on(node, "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder)
        try:
            yield
        finally:
            self.cluster.run_on(node, "umount", "--lazy", folder)

    def orphans(self) -> list[str]:
        """Command lines of this test's processes on any node."""
        pids = [pid for name in self.cluster.names for pid in self.cluster.processes(name, str(self.folder))]
        return [self.command(pid) for pid in pids]

    def command(self, pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            return ""


def assert_whole_curve(run: Path) -> None:
    """Finished, every step logged once."""
    assert status(run)["status"] == "finished" and status(run)["step"] == STEPS
    assert [line["step"] for line in losses(run)] == list(range(1, STEPS + 1))

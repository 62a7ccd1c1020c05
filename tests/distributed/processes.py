"""Runs of the real training command under faults, started through the zygote, and readers of their files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import FEATURES, ROOT
from safetensors.numpy import load_file

from mf_dist.checkpoint.reader import open_checkpoint, step_folders
from mf_dist.report.collect import read_run
from mf_dist.report.facts import history
from mf_dist.runtime.errors import UserError

FULL = os.environ.get("TORTURE") == "1"
"""make torture: all trials; else a seeded sample of them."""

STEPS = 30
FAULTY = """
run_dir: {run}
data: {{path: {latents}, num_workers: 0}}
model: {{depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}}
meanflow: {{kappa: 0.5}}
optim: {{lr: 1e-3, ema_decay: [0.99, 0.9]}}
train: {{total_images: 480, batch_size: 16, hang_seconds: 20}}
engine: {{precision: fp32, compile: false}}
checkpoint: {{every_images: 80}}
log: {{every_steps: 1, sample_every_images: 0}}
eval: {{features: {features}, reference: {images}}}
"""


def write_config(root, name, latents, images):
    path = root / f"{name}.yaml"
    path.write_text(FAULTY.format(run=root / name, latents=latents, features=FEATURES, images=images))
    return path


class Zygote:
    def __init__(self):
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("zygote.py"))]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, out, argv, ranks=1, faults=(), script=None):
        """The training command, or a script, on `ranks` processes; a fault applies to its `rank`, or else to rank 0.
        Returns the pids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        pids = []
        for rank in range(ranks):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own_faults = [fault for fault in faults if fault.get("rank", 0) == rank]
            pids.append(
                self.ask(
                    argv=[str(a) for a in argv], env=env, out=str(out), faults=own_faults, script=script and str(script)
                )["pid"]
            )
        return pids

    def wait(self, pids, seconds=240):
        """Exit codes. Once one rank has failed, the others get 5 s, then SIGKILL, as from a launcher."""
        codes, deadline = {}, time.monotonic() + seconds
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes and self.has_ended(pid):
                    codes[pid] = self.ask(wait=pid)["code"]
                    if codes[pid] != 0:
                        deadline = min(deadline, time.monotonic() + 5)
            if time.monotonic() > deadline:
                for pid in pids:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[pid] for pid in pids]

    def run(self, out, argv, ranks=1, faults=(), script=None):
        return self.wait(self.start(out, argv, ranks, faults, script))

    def has_ended(self, pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def run_history(run):
    """The run's history in its report: time, event, step, reason."""
    return history(read_run(run, "run"))


def status(run):
    return json.loads((run / "status.json").read_text())


def valid_steps(run):
    steps = []
    for folder in step_folders(run / "checkpoints"):
        try:
            steps.append(open_checkpoint(folder).step)
        except UserError:
            continue
    return steps


def losses(run):
    """Everything logged per step but times and memory."""
    excluded = {"images_per_second", "seconds_per_step", "data_wait_share", "memory_gib"}
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in excluded} for line in lines]


def tensors(run, step):
    """Everything in a checkpoint: kind/name -> array."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {f"{p.stem}/{name}": a for p in folder.glob("*.safetensors") for name, a in load_file(p).items()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one)


def assert_same_end(run, reference):
    """The same end as an uninterrupted run: every bit of weights, moments and EMAs, and the whole curve."""
    assert status(run)["status"] == "finished" and status(run)["step"] == STEPS
    assert largest_difference(tensors(run, STEPS), tensors(reference, STEPS)) == 0
    assert losses(run) == losses(reference)

"""The programs on GPUs, unchanged: on simulated ones (make test-simcuda), and on those of this machine (make test-gpu).

Each case of several ranks needs as many GPUs. Values are held against the CPU's where the simulation has them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import simcuda_build
import torch
from conftest import FEATURES, ROOT, VAE, encode, run_python
from safetensors.numpy import load_file

HERE = Path(__file__).parent
CONFIG = """
run_dir: {run}
data: {{path: {latents}, num_workers: 0}}
model: {{depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}}
meanflow: {{omega: 0.5, kappa: 0.5, guidance_end: 0.75}}
optim: {{lr: 1e-3, ema_decay: [0.99, 0.9]}}
train: {{total_images: 96, batch_size: 16, hang_seconds: 60}}
engine: {{precision: bf16, compile: false}}
checkpoint: {{every_images: 48}}
log: {{every_steps: 1, sample_every_images: 0}}
eval: {{num_samples: 100, labels: balanced, features: {features}, reference: {statistics}, training_samples: 100}}
"""


class Machine:
    """Where programs run: with simulated or real GPUs."""

    def __init__(self, is_simulated: bool) -> None:
        self.is_simulated = is_simulated

    def run(self, *program, ranks=1, devices=None, compiled=False, expect=0, timeout=500, **variables) -> str:
        """The program's whole output, of all ranks. devices: how many GPUs each rank sees (default: `ranks`)."""
        devices = devices or ranks
        if not self.is_simulated and torch.cuda.device_count() < ranks:
            pytest.skip(f"it needs {ranks} GPUs")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(ranks):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            start = [sys.executable]
            if self.is_simulated:
                env |= {"PYTHONPATH": f"{HERE}:{ROOT}", "SIMCUDA_DEVICES": str(devices)}
                del env["CUDA_VISIBLE_DEVICES"]
                env |= {"SIMCUDA_COMPILED": "1"} if compiled else {}
                start += ["-m", "simcuda"]
            elif devices < ranks:
                env["CUDA_VISIBLE_DEVICES"] = str(rank)
            command = [*start, *map(str, program)]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert {process.returncode for process in processes} == {expect}, "\n".join(outputs)
        return "".join(outputs)

    def train(self, config: Path, run: Path, *overrides, **options) -> str:
        return self.run("-m", "mf_dist.train", config, f"run_dir={run}", *overrides, **options)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(True, id="simulated", marks=pytest.mark.simcuda),
        pytest.param(False, id="real", marks=pytest.mark.gpu),
    ],
)
def machine(request) -> Machine:
    if request.param:
        reason = simcuda_build.why_not()
        if reason:
            pytest.skip(f"no simulated GPU here: {reason}")
        simcuda_build.build()
    elif not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return Machine(request.param)


@pytest.fixture(scope="session")
def config(tmp_path_factory, latents, images) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    statistics = folder / "statistics.npz"
    run_python("tools/reference_stats.py", "--images", images, "--features", FEATURES, "--out", statistics)
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(run=folder / "run", latents=latents, features=FEATURES, statistics=statistics))
    return path


@pytest.fixture(scope="session")
def trained(machine, config, tmp_path_factory) -> Path:
    """A run of 6 steps in bf16 with pictures and measurements."""
    run = tmp_path_factory.mktemp("trained") / "run"
    machine.train(config, run, "log.sample_every_images=48", "eval.every_images=48")
    return run


def weights(run: Path, step: int = 6) -> dict:
    return load_file(run / f"checkpoints/step-{step:08d}/master.safetensors")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["raw_loss_r_equals_t"] for line in lines(run) if "raw_loss_r_equals_t" in line]


def test_a_run_shows_itself_while_it_trains(trained):
    assert json.loads((trained / "status.json").read_text())["status"] == "finished"
    assert len(list((trained / "samples").glob("*.png"))) == 2
    assert [name for line in lines(trained) for name in line if name.startswith("fd_digits_100/nfe1")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_trains_as_on_a_cpu(machine, config, tmp_path, stage):
    options = [f"engine.zero_stage={stage}", "engine.precision=fp32"]
    machine.train(config, tmp_path / "gpu", *options)
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    run_python("-m", "mf_dist.train", config, f"run_dir={tmp_path / 'cpu'}", *options, env=on_cpu)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_collectives_run_beside_compute(machine, config, accumulation):
    """At ZeRO-1 in bf16: one reduction and one gathering of each block and of the embedding. The last block's gradients
    are reduced in the first third of the backward; the next forward waits for a block's weights at that block."""
    if not machine.is_simulated:
        pytest.skip("the simulation counts operators")
    options = [
        "engine.precision=bf16",
        "model.depth=4",
        "train.batch_size=16",
        f"train.micro_batch={8 // accumulation}",
    ]
    said = machine.run(HERE / "measure_order.py", config, *options, ranks=2)
    order = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    reductions, waits = order["reductions"], order["waits"]
    assert len(reductions) == 5 and reductions == sorted(reductions) and reductions[0] < 0.34 and reductions[3] < 0.9
    if accumulation == 1:  # otherwise the last micro-batch finds the weights gathered
        assert len(waits) == 5 and waits == sorted(waits) and waits[0] < 0.05 < waits[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_resume_at_another_stage(machine, config, tmp_path, stage):
    run, options = tmp_path / "run", [f"engine.zero_stage={stage}", "train.total_images=48"]
    machine.train(config, run, *options, ranks=2)
    said = machine.train(config, run, f"engine.zero_stage={stage % 3 + 1}", ranks=2)
    assert "from step-00000003" in said and len(losses(run)) == 6


def test_two_ranks_go_on_alone(machine, config, tmp_path):
    machine.train(config, tmp_path / "run", "train.total_images=48", ranks=2)
    machine.train(config, tmp_path / "run", "engine.zero_stage=3")
    assert len(losses(tmp_path / "run")) == 6


def test_every_option_of_a_step(machine, config, tmp_path):
    """Accumulation, clipping, recomputed activations, an fp32 JVP, loader processes and a profile."""
    options = ["engine.jvp_precision=fp32", "engine.checkpoint_activations=true", "optim.grad_clip=0.5"]
    options += ["train.micro_batch=4", "data.num_workers=2", "train.profile_steps=2"]
    machine.train(config, tmp_path / "run", *options)
    assert len(losses(tmp_path / "run")) == 6
    profile = json.loads((tmp_path / "run/profile/profile.json").read_text())
    assert "CPU" not in profile["device"] and {"optimizer", "attention"} <= {row["name"] for row in profile["classes"]}
    assert (profile["idle_share"] is None) == machine.is_simulated  # the simulation records no kernels


@pytest.mark.parametrize("stage", [1, 3])
def test_one_gpu_visible_to_each_rank(machine, config, tmp_path, stage):
    """As by srun --gpus-per-task=1."""
    machine.train(config, tmp_path / "run", f"engine.zero_stage={stage}", ranks=2, devices=1)


def test_a_stop_and_a_resume(machine, config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    machine.train(config, run)
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    (run / "STOP").unlink()
    machine.train(config, run)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"


def test_sampling(machine, trained, tmp_path):
    machine.run("tools/sample.py", "--checkpoint", trained, "--out", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()


def test_measuring(machine, trained, tmp_path):
    machine.run("tools/fid_eval.py", "--checkpoint", trained, "--nfe", 1, "--num-samples", 100, "--out", tmp_path)
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())
    assert entry["precision"] == "tf32" and entry["metrics"]["fd_digits_100"] > 0


def test_encoding(machine, images, tmp_path):
    command = ["--images", images, "--out", tmp_path / "gpu", "--vae", VAE, "--resolution", 32, "--no-compile"]
    machine.run("tools/encode_latents.py", *command)
    encode(images, tmp_path / "cpu")
    by_gpu, by_cpu = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("gpu", "cpu"))
    assert by_gpu["count"] == 150
    assert by_gpu["channel_std"] == pytest.approx(by_cpu["channel_std"], rel=1e-3)


def test_preflight(machine, config, tmp_path):
    machine.run("-m", "mf_dist.jobs.preflight", "node", "--into", tmp_path, "--gpus", 1, config)
    (node,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert not node["problems"] and "CPU" not in node["same"]["device"]


def test_preflight_of_the_network(machine, tmp_path):
    machine.run("-m", "mf_dist.jobs.preflight", "network", "--into", tmp_path, ranks=2)
    (node,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.network.json")]
    assert node["over all nodes"]["is_right"] and node["over all nodes"]["ranks"] == 2


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (2, 3))])
def test_compiled_step(machine, config, tmp_path, stage):
    said = machine.train(
        config,
        tmp_path / "run",
        f"engine.zero_stage={stage}",
        "engine.compile=true",
        "train.total_images=48",
        compiled=True,
    )
    graphs, breaks = map(int, re.search(r"(\d+) compiled graphs, (\d+) graph breaks", said).groups())
    assert graphs >= 1
    if stage < 3:
        assert (graphs, breaks) == (2, 0)  # the step, and the optimizer's update


def test_compiled_encoding(machine, images, tmp_path):
    command = ["--images", images, "--out", tmp_path / "out", "--vae", VAE, "--resolution", 32]
    machine.run("tools/encode_latents.py", *command, compiled=True)


def test_first_contact(machine, tmp_path):
    """A few lines of the list; the one that fails, for want of its inputs, does not stop the next."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    if machine.is_simulated:
        env |= {"PYTHONPATH": str(HERE), "PYTHON": f"{sys.executable} -m simcuda"}
        del env["CUDA_VISIBLE_DEVICES"]
    command = [ROOT / "tools/bench/first_contact.sh", tmp_path / "out", "--tiny", "--only", "device,twins,b4-32"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    checks = json.loads((tmp_path / "out/first_contact.json").read_text())["checks"]
    outcomes = {check["name"]: check["outcome"] for check in checks if check["outcome"] != "not run"}
    assert list(outcomes) == ["device", "twins", "b4-32"]
    assert "passed" in outcomes["device"] and "passed" in outcomes["b4-32"]
    assert "FAILED: exit code 2" in outcomes["twins"] and "there is no dataset at" in outcomes["twins"]
    measured = {check["name"]: check["measured"] for check in checks}
    assert measured["device"]["device"] == measured["b4-32"]["device"] != "CPU"
    assert measured["b4-32"]["ms"] > 0 and measured["b4-32"]["ms_of.optimizer"] > 0

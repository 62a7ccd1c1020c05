"""Shared helpers and fixtures; small real datasets, encoded once per session with the shipped VAE."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
VAE = ROOT / "mf_dist/assets/digits-vae"
FEATURES = ROOT / "mf_dist/assets/digits-features"


def pytest_configure(config):
    """Tests run on the CPU, also where there are GPUs: two ranks cannot share one. make test-gpu uses them."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def repository_files(folder: str, pattern: str, at_least: int) -> list[Path]:
    """All below a folder of the repository; fails where there are so few that the scan must have missed them."""
    found = sorted((ROOT / folder).rglob(pattern))
    assert len(found) >= at_least, f"{folder} has {len(found)} files {pattern}: does this look at the right place?"
    return found


def run_python(*arguments: object, expect: int = 0, cwd: Path = ROOT, env: dict | None = None, timeout: int = 300):
    """Runs a command as a user does; fails with its whole output unless the exit code is `expect`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_here(tool: str, *arguments: object, expect: int = 0) -> tuple[str, str]:
    """Runs a tool of the repository in this process, which saves the seconds of its imports. Returns what it prints on
    standard output and error; fails with it unless the exit code is `expect`."""
    import torch.distributed as dist

    spec = importlib.util.spec_from_file_location(Path(tool).stem, ROOT / tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", [tool, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = module.main()
    if dist.is_initialized():  # after an error
        dist.destroy_process_group()
    assert code == expect, f"exit {code}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def write_digits(folder: Path, count: int, classes: bool = True) -> Path:
    """The first `count` real digits as 32x32 RGB files."""
    digits = load_digits()
    for number in range(count):
        pixels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
        target = folder / str(digits.target[number]) if classes else folder
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(
            target / f"{number:04d}.png"
        )
    return folder


def encode(images, out, vae=VAE, task=(0, 1), **changes):
    """Encodes `images` with the shipped VAE into shards of 60, in this process."""
    import torch

    from mf_dist.data.encode import Encoding, Task, encode_images
    from mf_dist.vae import Vae

    encoding = Encoding(**{"resolution": 32, "shard_size": 60, "batch": 16, **changes})
    encode_images(str(images), out, Vae(str(vae), torch.device("cpu")), encoding, Task(*task))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """150 real digits in class folders."""
    return write_digits(tmp_path_factory.mktemp("images") / "digits", 150)


@pytest.fixture(scope="session")
def latents(images, tmp_path_factory) -> Path:
    """The same digits, encoded with the shipped VAE in three shards."""
    out = tmp_path_factory.mktemp("latents") / "digits"
    encode(images, out)
    return out


TINY = """
run_dir: {run}
data: {{path: {latents}, num_workers: 0}}
model: {{depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}}
meanflow: {{kappa: 0.5}}
optim: {{lr: 1e-3, ema_decay: 0.99}}
train: {{total_images: 96, batch_size: 16}}
engine: {{precision: fp32, compile: false}}
checkpoint: {{every_images: 48}}
log: {{every_steps: 2, sample_every_images: 48}}
eval: {{num_samples: 60, labels: balanced, features: {features}, reference: {images}}}
"""


IMF_DIT = (
    "model: {network: imf_dit, depth: 3, hidden_size: 32, num_heads: 2, patch_size: 2, imf_dit: {head_depth: 1, "
    "class_tokens: 2, guidance_tokens: 1, start_tokens: 1, end_tokens: 1, time_tokens: 1}}"
)


@pytest.fixture
def tiny_config(tmp_path, latents, images) -> Path:
    """Config file of a run of 6 steps on the real latents."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(run=tmp_path / "run", latents=latents, features=FEATURES, images=images))
    return path


@pytest.fixture(scope="session")
def zygote():
    """Forks training processes quickly, optionally with injected faults."""
    from processes import Zygote

    process = Zygote()
    yield process
    process.close()


@pytest.fixture
def config(tmp_path, latents, images) -> Path:
    """Config file of a run of processes.STEPS steps in tmp_path/run."""
    from processes import write_config

    return write_config(tmp_path, "run", latents, images)


@pytest.fixture(scope="session")
def whole(zygote, tmp_path_factory, latents, images):
    """whole(ranks, *overrides) -> the folder of such a run without interruptions."""
    from processes import write_config

    root, runs = tmp_path_factory.mktemp("whole"), {}

    def run(ranks=1, *options):
        key = (ranks, *options)
        if key not in runs:
            path = write_config(root, f"run{len(runs)}", latents, images)
            assert set(zygote.run(root / "log", [path, *options], ranks)) == {0}, (root / "log").read_text()
            runs[key] = path.with_suffix("")
        return runs[key]

    return run


@pytest.fixture(scope="session")
def cluster():
    """A SLURM cluster of three nodes on the local machine."""
    from cluster import Cluster, install, why_not

    reason = why_not()
    if reason:
        pytest.skip(f"NO SLURM TEST RUNS HERE: the test cluster {reason}")
    install()
    nodes = Cluster(3)
    try:
        nodes.up()
        yield nodes
    finally:
        nodes.down()

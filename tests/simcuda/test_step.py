"""What a training step does on a GPU, counted on a simulated one: kernels that compile, bytes, waits of the host."""

import json
import os
import subprocess
import sys

import pytest
import simcuda_build
from conftest import ROOT

from mf_dist.config.cost import memory_per_rank
from mf_dist.config.schema import load_config, resolve

pytestmark = pytest.mark.simcuda
HERE = ROOT / "tests/simcuda"
CONFIG = """
run_dir: unused
data: {path: none, num_workers: 0}
model: {depth: 1, hidden_size: 768, num_heads: 6, patch_size: 2}
meanflow: {omega: 0.5, kappa: 0.5, guidance_end: 0.75}
train: {total_images: 96, batch_size: 8}
"""


@pytest.fixture(scope="module", autouse=True)
def _device():
    reason = simcuda_build.why_not()
    if reason:
        pytest.skip(f"no simulated GPU here: {reason}")
    simcuda_build.build()


def measure(program, *arguments, **variables) -> dict:
    env = {
        **os.environ,
        "PYTHONPATH": f"{HERE}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    del env["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, "-m", "simcuda", HERE / program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compiled_step(*arguments) -> dict:
    return measure("measure_step.py", "--depth", 1, *arguments, SIMCUDA_COMPILED="1")


@pytest.mark.parametrize(
    ("latent", "rows"),
    [pytest.param(32, 32, id="256 tokens"), pytest.param(64, 4, id="1024 tokens", marks=pytest.mark.long)],
)
def test_the_step_compiles_for_sm_90(latent, rows):
    """XL/2's layers; from 1024 tokens on with the fused attention. The host waits for nothing inside."""
    step = compiled_step("--latent", latent, "--rows", rows)
    assert step["graphs"] == 2 and step["waits"] == 0  # forward and backward
    assert step["forward"]["launches"] > 0 and step["backward"]["launches"] > 0
    assert step["forward"]["calls"]["_addmm_activation"] == 1  # the block's pass without tangent and backward


@pytest.mark.long
def test_a_deterministic_step_has_no_sum_in_an_order_of_chance():
    """No atomic addition, and no reduction whose block size is chosen by timing; the other step has both."""
    fast, fixed = compiled_step(), compiled_step("--deterministic")
    assert fast["atomics"] > 0 and fast["timed"]
    assert fixed["atomics"] == 0 and not fixed["timed"]


@pytest.mark.parametrize(("stage", "allowed"), [(1, 1), (2, 1)])
def test_the_host_waits_for_the_gradient_norm_alone(tmp_path, stage, allowed):
    """Once, for the guard, which decides whether the step is skipped."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    step = measure("measure_engine.py", tmp_path / "config.yaml", f"engine.zero_stage={stage}", "engine.compile=false")
    assert step["waits"] == allowed, step["waited_for"]
    assert all("norm" in line or "_gradient_factor" in line for line in step["waited_for"])


def test_a_parameter_costs_few_bytes_outside_the_graph(tmp_path):
    """At ZeRO-1 in bf16, one rank, no accumulation: gradients into one tensor and their norm 6, and 36 of the compiled
    update, which reads the gradient, reads and writes weights, moments and EMA once, and writes weights in bf16."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    step = measure("measure_engine.py", tmp_path / "config.yaml", SIMCUDA_COMPILED="1")
    assert step["bytes"] <= 6.1 and step["compiled_bytes"] == pytest.approx(36, abs=0.1)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32")])
def test_the_dry_run_counts_the_memory_that_a_step_takes(tmp_path, stage, precision):
    """Beside activations, which a network whose kernels do nothing leaves out as well."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    overrides = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    step = measure("measure_engine.py", tmp_path / "config.yaml", *overrides, SIMCUDA_COMPILED="1")
    shape = ["model.latent_size=8", "model.latent_channels=4", "model.num_classes=10"]
    config = resolve(load_config(str(tmp_path / "config.yaml"), [*shape, *overrides]), None, 1)
    counted = memory_per_rank(config, 1)
    assert sum(counted.values()) - counted["activations"] == pytest.approx(step["peak"] * step["parameters"], rel=0.1)

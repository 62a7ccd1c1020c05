"""Several real processes (gloo): the same gradients, the same weights after any resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_python
from safetensors.numpy import load_file

pytestmark = pytest.mark.dist
WORKER = Path(__file__).with_name("worker_gradients.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(ranks, *arguments, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run_python(*launcher, *arguments, env=ENV, **options)


def flat(tensors):
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def one_step(tmp_path, config, ranks, *overrides):
    """The step's gradient, its first moment, and what else the worker saw."""
    out = tmp_path / "gradient.safetensors"
    done = torchrun(ranks, WORKER, config, out, *overrides)
    tensors = load_file(out)
    moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("exp_avg/")}
    return flat(tensors), flat(moments), json.loads(done.stdout.splitlines()[-1])


def gradient(tmp_path, config, ranks, *overrides):
    found, _, seen = one_step(tmp_path, config, ranks, *overrides)
    return found, seen


@pytest.fixture(scope="module")
def reference(tmp_path_factory, latents, images):
    """The gradient of one process, the whole batch in one pass; and its config file."""
    from conftest import FEATURES, TINY

    root = tmp_path_factory.mktemp("gradient")
    config = root / "tiny.yaml"
    config.write_text(TINY.format(run=root / "run", latents=latents, features=FEATURES, images=images))
    return gradient(root, config, 1)[0], config


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["train.micro_batch=8"]),
        (2, []),
        (2, ["train.micro_batch=4"]),
        (2, ["engine.zero_stage=2"]),
        (2, ["engine.zero_stage=3"]),
        (2, ["engine.checkpoint_activations=true"]),
        (2, ["engine.zero_stage=3", "engine.checkpoint_activations=true"]),
    ],
    ids=["accumulation2", "ranks2", "ranks2-accumulation2", "zero2", "zero3", "recompute", "zero3-recompute"],
)
def test_gradients_are_those_of_one_process(tmp_path, reference, ranks, overrides):
    exact, config = reference
    other, _ = gradient(tmp_path, config, ranks, *overrides)
    assert np.linalg.norm(exact) > 0.1 and (exact != 0).mean() > 0.9
    assert np.linalg.norm(other - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_shrinks_the_whole_gradient(tmp_path, reference, stage):
    """The first moment after one step is (1 - beta1) times the clipped gradient; the log has the full norm."""
    exact, config = reference
    norm, limit = np.linalg.norm(exact), np.linalg.norm(exact) / 3
    options = [f"optim.grad_clip={limit}", f"engine.zero_stage={stage}", "train.micro_batch=4"]
    _, moment, seen = one_step(tmp_path, config, 2, *options)
    assert np.linalg.norm(moment - 0.1 * exact / 3) <= 1e-5 * np.linalg.norm(0.1 * exact / 3)
    assert seen["norm"] == pytest.approx(norm, rel=1e-5)


def test_the_largest_shape_at_small_width(tmp_path, reference):
    """DiT-G's 32 blocks and 32 heads, 4 numbers a head, at ZeRO-3 with recomputation as it needs."""
    _, config = reference
    shape = ["model.depth=32", "model.num_heads=32", "model.hidden_size=128"]
    exact, _ = gradient(tmp_path, config, 1, *shape)
    other, _ = gradient(tmp_path, config, 2, *shape, "engine.zero_stage=3", "engine.checkpoint_activations=true")
    assert np.linalg.norm(other - exact) <= 1e-5 * np.linalg.norm(exact) and np.linalg.norm(exact) > 0.1


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nothing", None),
        ("weights", "the ranks hold different initial weights: blocks.1.mlp.fc1.bias is not the same everywhere"),
        ("gradients", "the reduced gradient is not the mean of the ranks' gradients"),
    ],
)
def test_every_run_checks_its_ranks(tmp_path, reference, fault, message, stage):
    worker, options = (
        Path(__file__).with_name("worker_faults.py"),
        [f"engine.zero_stage={stage}", "train.micro_batch=4"],
    )
    done = torchrun(2, worker, reference[1], fault, *options, expect=1 if message else 0)
    assert "error" not in done.stderr.lower() if message is None else message in done.stderr


@pytest.mark.parametrize(
    "overrides", [["engine.zero_stage=1"], ["engine.zero_stage=2", "engine.checkpoint_activations=true"]]
)
def test_compiled_is_one_graph_with_the_same_gradient(tmp_path, reference, overrides):
    exact, config = reference
    compiled, seen = gradient(tmp_path, config, 2, "engine.compile=true", *overrides)
    assert (seen["graphs"], seen["breaks"], seen["compiled_later"]) == (1, 0, 0)
    assert np.linalg.norm(compiled - exact) <= 1e-6 * np.linalg.norm(exact)


def test_zero3_compiles_block_by_block(tmp_path, reference):
    exact, config = reference
    compiled, seen = gradient(tmp_path, config, 2, "engine.compile=true", "engine.zero_stage=3")
    assert seen["compiled_later"] == 0 and seen["graphs"] > 0
    assert np.linalg.norm(compiled - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "overrides", [[], ["engine.jvp_precision=fp32"], ["engine.zero_stage=2"], ["engine.zero_stage=3"]]
)
def test_bf16_gradients_are_near_those_of_fp32(tmp_path, reference, overrides):
    """Layers of 8 significant bits, random weights: 5 % of the gradient's norm."""
    exact, config = reference
    other, _ = gradient(tmp_path, config, 2, "engine.precision=bf16", *overrides)
    assert 1e-5 < np.linalg.norm(other - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_accumulation_adds_up_in_fp32(tmp_path, reference, stage):
    """One rank, 4 micro-batches against one pass: bf16 sums would differ by several parts in a thousand."""
    _, config = reference
    options = ["engine.precision=bf16", f"engine.zero_stage={stage}"]
    at_once, _ = gradient(tmp_path, config, 1, *options)
    in_parts, _ = gradient(tmp_path, config, 1, *options, "train.micro_batch=4")
    print("RELATIVE", stage, np.linalg.norm(in_parts - at_once) / np.linalg.norm(at_once))
    assert np.linalg.norm(in_parts - at_once) <= 4e-3 * np.linalg.norm(at_once)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_two_ranks_resume_bit_for_bit(tmp_path, tiny_config, stage, precision):
    runs = {"whole": [96], "parts": [48, 96]}
    options = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "log.sample_every_images=0"]
    for name, lengths in runs.items():
        for images in lengths:
            torchrun(
                2,
                "-m",
                "mf_dist.train",
                tiny_config,
                f"run_dir={tmp_path / name}",
                f"train.total_images={images}",
                *options,
            )
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema-0.99"):
        whole, parts = (
            load_file(tmp_path / name / "checkpoints/step-00000006" / f"{kind}.safetensors") for name in runs
        )
        for tensor in whole:
            assert np.array_equal(whole[tensor], parts[tensor]), f"{kind} of {tensor} differs"


def test_another_stage_and_world_size_go_on_from_the_same_state(tmp_path, tiny_config):
    """2 ranks at stage 2, then 1 rank at stage 1 or 2 ranks at stage 3: the order of sums is all that differs."""
    torchrun(2, "-m", "mf_dist.train", tiny_config, "engine.zero_stage=2", "train.total_images=48")
    ends = {}
    for name, ranks, stage in [("stay", 2, 2), ("one", 1, 1), ("three", 2, 3)]:
        run = tmp_path / name
        subprocess.run(["cp", "-r", tmp_path / "run", run], check=True)
        torchrun(
            ranks,
            "-m",
            "mf_dist.train",
            tiny_config,
            f"run_dir={run}",
            f"engine.zero_stage={stage}",
            "train.total_images=64",
        )
        ends[name] = flat(load_file(run / "checkpoints/step-00000004/master.safetensors"))
    for name in ("one", "three"):
        assert np.linalg.norm(ends[name] - ends["stay"]) <= 1e-4 * np.linalg.norm(ends["stay"])


def test_kill_9_loses_nothing_beyond_the_last_commit(tmp_path, tiny_config):
    command = [
        sys.executable,
        "-m",
        "mf_dist.train",
        str(tiny_config),
        "train.total_images=4800",
        "log.sample_every_images=0",
    ]
    subprocess.run(
        [*command, f"run_dir={tmp_path / 'whole'}"], cwd=ROOT, env=ENV, check=True, stdout=subprocess.DEVNULL
    )
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((tmp_path / "run/checkpoints").glob("step-000000[3-9]*")):
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True, text=True)
    assert "resuming" in resumed.stdout
    whole, parts = (
        load_file(tmp_path / name / "checkpoints/step-00000300/ema-0.99.safetensors") for name in ("whole", "run")
    )
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 300

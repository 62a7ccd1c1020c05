"""Several real processes (gloo): the same gradients whatever the ranks, stages and accumulation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from processes import write_config
from safetensors.numpy import load_file

pytestmark = pytest.mark.dist
WORKER, FAULTS, BYTES, TIME_LIMIT = (
    Path(__file__).with_name(f"worker_{name}.py") for name in ("gradients", "faults", "bytes", "time_limit")
)


def flat(tensors):
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


@pytest.fixture(scope="module")
def one_step(zygote, tmp_path_factory):
    """one_step(config, ranks, *overrides): the step's gradient, its first moment, and what the worker printed."""

    def run(config, ranks, *overrides):
        folder = tmp_path_factory.mktemp("step")
        out, log = folder / "gradient.safetensors", folder / "log"
        codes = zygote.run(log, [config, out, *overrides], ranks, script=WORKER)
        assert set(codes) == {0}, log.read_text()
        given_up = re.findall(r"function: '\w+' \((.*?):\d+\)", log.read_text())
        assert all("/deepspeed/" in path for path in given_up), f"torch.compile gave up on a function in {given_up}"
        tensors = load_file(out)
        moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("exp_avg/")}
        line = next(line for line in log.read_text().splitlines() if line.startswith('{"graphs"'))
        return flat(tensors), flat(moments), json.loads(line)

    return run


@pytest.fixture(scope="module")
def reference(one_step, tmp_path_factory, latents, images):
    """The gradient of one process, the whole batch in one pass; and its config file."""
    config = write_config(tmp_path_factory.mktemp("reference"), "run", latents, images)
    return one_step(config, 1)[0], config


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
def test_gradients_are_those_of_one_process(one_step, reference, ranks, overrides):
    exact, config = reference
    other, *_ = one_step(config, ranks, *overrides)
    assert np.linalg.norm(exact) > 0.1 and (exact != 0).mean() > 0.9
    assert np.linalg.norm(other - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "options", [["engine.compile=true"], ["train.micro_batch=4"], ["engine.checkpoint_activations=true"]]
)
def test_overlapped_reduction_gives_deepspeeds_gradient(one_step, reference, options):
    """ZeRO-1 in bf16 reduces by itself, in several groups; ZeRO-2, by DeepSpeed, sums the same numbers."""
    config, bf16 = reference[1], ["engine.precision=bf16", "optim.grad_clip=0.1", *options]
    ours, moment, seen = one_step(config, 2, *bf16)
    other, other_moment, other_seen = one_step(config, 2, *bf16, "engine.zero_stage=2")
    assert np.linalg.norm(ours - other) <= 1e-6 * np.linalg.norm(other) and np.linalg.norm(other) > 0.1
    assert np.linalg.norm(moment - other_moment) <= 1e-6 * np.linalg.norm(other_moment)
    assert seen["norm"] == pytest.approx(other_seen["norm"], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_shrinks_the_whole_gradient(one_step, reference, stage):
    """The first moment after one step is (1 - beta1) times the clipped gradient; the log has the full norm."""
    exact, config = reference
    norm, limit = np.linalg.norm(exact), np.linalg.norm(exact) / 3
    options = [f"optim.grad_clip={limit}", f"engine.zero_stage={stage}", "train.micro_batch=4"]
    _, moment, seen = one_step(config, 2, *options)
    assert np.linalg.norm(moment - 0.1 * exact / 3) <= 1e-5 * np.linalg.norm(0.1 * exact / 3)
    assert seen["norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.long
def test_the_largest_shape_at_small_width(one_step, reference):
    """DiT-G's 32 blocks and 32 heads, 4 numbers a head, at ZeRO-3 with recomputation as it needs."""
    _, config = reference
    shape = ["model.depth=32", "model.num_heads=32", "model.hidden_size=128"]
    exact, *_ = one_step(config, 1, *shape)
    other, *_ = one_step(config, 2, *shape, "engine.zero_stage=3", "engine.checkpoint_activations=true")
    assert np.linalg.norm(other - exact) <= 1e-5 * np.linalg.norm(exact) and np.linalg.norm(exact) > 0.1


@pytest.mark.alone
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nothing", None),
        ("weights", "the ranks hold different initial weights: blocks.1.mlp.fc1.bias is not the same everywhere"),
        ("gradients", "the reduced gradient is not the mean of the ranks' gradients"),
    ],
)
def test_every_run_checks_its_ranks(zygote, tmp_path, reference, fault, message, stage):
    options, log = [f"engine.zero_stage={stage}", "train.micro_batch=4"], tmp_path / "log"
    codes = zygote.run(log, [reference[1], fault, *options], 2, script=FAULTS)
    assert codes == ([2, 2] if message else [0, 0])
    assert "error" not in log.read_text().lower() if message is None else message in log.read_text()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_watchdog_reports_before_any_collective_times_out(zygote, tmp_path, reference, stage):
    options, log = [f"engine.zero_stage={stage}", "train.micro_batch=4", "train.hang_seconds=40"], tmp_path / "log"
    assert zygote.run(log, [reference[1], *options], 2, script=TIME_LIMIT) == [0, 0], log.read_text()
    world, deepspeeds = json.loads(log.read_text().splitlines()[-1])
    assert world == deepspeeds > 40 * 10  # ten times as long in phases such as compiling


@pytest.mark.parametrize(
    ("ranks", "overrides", "graphs"),
    [
        (1, ["engine.zero_stage=1"], 1),
        pytest.param(1, ["engine.zero_stage=2", "engine.checkpoint_activations=true"], 1, marks=pytest.mark.long),
        (2, ["engine.zero_stage=1"], 6),  # a block and the head: the null pass, the tangent's, the regression
        pytest.param(2, ["engine.zero_stage=2", "engine.checkpoint_activations=true"], 6, marks=pytest.mark.long),
    ],
)
def test_compiled_without_breaks_and_with_the_same_gradient(one_step, reference, ranks, overrides, graphs):
    exact, config = reference
    compiled, _, seen = one_step(config, ranks, "engine.compile=true", *overrides)
    assert (seen["graphs"], seen["breaks"], seen["compiled_later"]) == (graphs + 1, 0, 0)  # with the optimizer's update
    assert np.linalg.norm(compiled - exact) <= 1e-6 * np.linalg.norm(exact)


def test_zero3_compiles_block_by_block(one_step, reference):
    exact, config = reference
    compiled, _, seen = one_step(config, 2, "engine.compile=true", "engine.zero_stage=3")
    assert seen["compiled_later"] == 0 and seen["graphs"] > 0
    assert np.linalg.norm(compiled - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, ["engine.compile=true"], marks=pytest.mark.long),
        (2, []),
        (2, ["engine.jvp_precision=fp32"]),
        (2, ["engine.zero_stage=2"]),
        (2, ["engine.zero_stage=3"]),
    ],
)
def test_bf16_gradients_are_near_those_of_fp32(one_step, reference, ranks, overrides):
    """Layers of 8 significant bits, random weights: 5 % of the gradient's norm."""
    exact, config = reference
    other, *_ = one_step(config, ranks, "engine.precision=bf16", *overrides)
    assert 1e-5 < np.linalg.norm(other - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_accumulation_sums_in_fp32(one_step, reference, stage):
    """One rank, 4 micro-batches against one pass: bf16 sums would differ by several parts in a thousand."""
    _, config = reference
    options = ["engine.precision=bf16", f"engine.zero_stage={stage}"]
    at_once, *_ = one_step(config, 1, *options)
    in_parts, *_ = one_step(config, 1, *options, "train.micro_batch=4")
    assert np.linalg.norm(in_parts - at_once) <= 4e-3 * np.linalg.norm(at_once)


@pytest.mark.parametrize(
    ("reuse", "overrides"),
    [
        ("reuse", ["engine.precision=bf16"]),
        ("reuse", ["engine.precision=bf16", "engine.zero_stage=2", "train.micro_batch=4"]),
        ("reuse", ["engine.precision=bf16", "engine.zero_stage=3"]),
        ("no-reuse", ["engine.precision=bf16", "engine.zero_stage=3"]),
        ("no-reuse", ["engine.zero_stage=3", "train.micro_batch=4", "meanflow.kappa=0"]),
    ],
    ids=["zero1", "zero2-accumulation2", "zero3-reuse", "zero3", "zero3-fp32-accumulation2-unguided"],
)
def test_the_bytes_on_the_wire_are_those_of_the_cost_model(zygote, config, tmp_path, monkeypatch, reuse, overrides):
    """Counted over two ranks in a step, but for the few bytes of norms, flags and the stop agreement."""
    from mf_dist.config import cost
    from mf_dist.config.schema import load_config, resolve
    from mf_dist.data.shards import read_manifest

    if reuse == "no-reuse":
        monkeypatch.setattr(cost, "MAX_REUSED_WEIGHTS", 0)
    out, overrides = tmp_path / "bytes.json", [*overrides, "train.total_images=48", "model.hidden_size=384"]
    assert zygote.run(tmp_path / "log", [out, reuse, config, *overrides], 2, script=BYTES) == [0, 0]
    loaded = load_config(str(config), overrides)
    resolved = resolve(loaded, read_manifest(loaded.data.path), 2)
    expected = cost.payload(resolved, resolved.train.batch_size // (2 * resolved.train.micro_batch))
    counted = json.loads(out.read_text())
    assert {kind for kind, size in counted.items() if size > 100} == set(expected)
    for kind, size in expected.items():
        assert counted[kind] == pytest.approx(size, rel=1e-4), kind

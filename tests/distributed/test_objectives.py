"""Objectives other than MeanFlow in real processes: gradients of any ranks; kills, also where the target changes."""

import numpy as np
import pytest
from conftest import IMF_DIT
from processes import FULL, STEPS, assert_same_end, losses, valid_steps, write_config
from test_ranks import one_step  # noqa: F401  a fixture

pytestmark = pytest.mark.dist
SECTIONS = {
    "solution_flow": "solution_flow: {share_start: 0.5, share_end: 0.5}",  # rounding errors are divided by the share
    "alpha_flow": "alpha_flow: {kappa: 0.5}",
    "imf": "imf: {}",
}
SWITCHES = {"discrete target": 10, "MeanFlow target": 23}
"""Phase of alpha-Flow -> the first step that is in it: images 144 and 352 of 480, 16 a step."""


def config_of(objective, root, latents, images):
    path = write_config(root, objective, latents, images)
    text = path.read_text().replace("meanflow: {kappa: 0.5}", SECTIONS[objective])
    if objective == "imf":
        text = text.replace("model: {depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}", IMF_DIT)
    path.write_text(text)
    return path


@pytest.fixture(scope="module", params=SECTIONS)
def reference(request, one_step, tmp_path_factory, latents, images):  # noqa: F811
    """The gradient of one process in the middle of the run, where two of them have the discrete target."""
    config = config_of(request.param, tmp_path_factory.mktemp("objectives"), latents, images)
    return one_step(config, 1)[0], config


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["train.micro_batch=8"]),
        (2, []),
        (2, ["engine.zero_stage=2", "engine.checkpoint_activations=true"]),
        (2, ["engine.zero_stage=3"]),
    ],
    ids=["accumulation2", "ranks2", "zero2-recompute", "zero3"],
)
def test_gradients_are_those_of_one_process(one_step, reference, ranks, overrides):  # noqa: F811
    """To fp32's rounding: 1.1e-6 of SoFlow's gradient where MKL multiplies with AVX-512, 1.8e-7 with AVX2."""
    exact, config = reference
    other, *_ = one_step(config, ranks, *overrides)
    assert np.linalg.norm(exact) > 0.01 and np.linalg.norm(other - exact) <= 2e-6 * np.linalg.norm(exact)


def test_two_heads_are_reduced_beside_compute(one_step, tmp_path, latents, images):  # noqa: F811
    """In bf16 at ZeRO-1, whose groups follow the branches of the network, as DeepSpeed reduces them at ZeRO-2."""
    config, bf16 = config_of("imf", tmp_path, latents, images), ["engine.precision=bf16", "engine.compile=true"]
    ours, _, seen = one_step(config, 2, *bf16)
    other, *_ = one_step(config, 2, *bf16, "engine.zero_stage=2")
    assert np.linalg.norm(ours - other) <= 1e-6 * np.linalg.norm(other) and np.linalg.norm(other) > 0.01
    assert seen["breaks"] == 0


def test_imf_resumes_after_kill_9_and_on_other_ranks(zygote, tmp_path, latents, images):
    config, log = config_of("imf", tmp_path, latents, images), tmp_path / "log"
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    assert zygote.run(log, [config, f"run_dir={whole}"]) == [0], log.read_text()
    assert zygote.run(log, [config, f"run_dir={killed}"], 1, [{"do": "kill", "step": 13}]) == [-9]
    assert zygote.run(log, [config, f"run_dir={killed}"]) == [0], log.read_text()
    assert_same_end(killed, whole)
    for ranks, stage, stop in ((2, 1, 12), (2, 3, 20), (1, 2, None)):
        faults = [{"do": "term", "step": stop}] if stop else []
        codes = zygote.run(log, [config, f"run_dir={moved}", f"engine.zero_stage={stage}"], ranks, faults)
        assert set(codes) == {0}, log.read_text()
    for a, b in zip(losses(moved), losses(whole), strict=True):
        assert a["velocity_head"] == pytest.approx(b["velocity_head"], rel=1e-4), a["step"]


@pytest.fixture(scope="module")
def whole_run(zygote, tmp_path_factory, latents, images):
    root = tmp_path_factory.mktemp("alpha")
    config = config_of("alpha_flow", root, latents, images)
    assert zygote.run(root / "log", [config]) == [0], (root / "log").read_text()
    return root / "alpha_flow", (root / "log").read_text()


def test_each_phase_begins_once_at_its_step(whole_run):
    _, log = whole_run
    begins = [line for line in log.splitlines() if line.endswith("begins")]
    assert begins == [f"step {step}, image {16 * (step - 1):,}: {name} begins" for name, step in SWITCHES.items()]


@pytest.mark.parametrize("step", [s + d for s in SWITCHES.values() for d in ((-1, 0, 1) if FULL else (0,))])
def test_kill_9_around_a_switch(zygote, whole_run, tmp_path, latents, images, step):
    config, log = config_of("alpha_flow", tmp_path, latents, images), tmp_path / "log"
    assert zygote.run(log, [config], 1, [{"do": "kill", "step": step}]) == [-9]
    last = 5 * ((step - 1) // 5)  # or the one before, if the last save was not complete yet
    assert max([0, *valid_steps(tmp_path / "alpha_flow")]) in (last, last - 5)
    assert zygote.run(log, [config]) == [0], log.read_text()
    assert_same_end(tmp_path / "alpha_flow", whole_run[0])


def test_other_ranks_and_stages_after_a_switch(zygote, whole_run, tmp_path, latents, images):
    config, log, run = config_of("alpha_flow", tmp_path, latents, images), tmp_path / "log", tmp_path / "alpha_flow"
    for ranks, stage, stop in ((2, 1, 12), (1, 3, 25), (2, 2, None)):
        faults = [{"do": "term", "step": stop}] if stop else []
        codes = zygote.run(log, [config, f"engine.zero_stage={stage}"], ranks, faults)
        assert set(codes) == {0}, log.read_text()
    text = log.read_text()
    assert all(text.count(f"{phase} begins") == 1 for phase in SWITCHES), "a phase that goes on does not begin"
    assert [line for line in text.splitlines() if line.startswith("phase: ")] == [
        "phase: trajectory flow matching",
        "phase: discrete target",
        "phase: MeanFlow target",
    ]
    assert set(zygote.run(log, [config, "train.total_images=640"])) == {2}
    assert "trained with train.total_images=480, now it is 640" in log.read_text().splitlines()[-1]
    ours, theirs = losses(run), losses(whole_run[0])
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a["raw_loss_r_below_t"] == pytest.approx(b["raw_loss_r_below_t"], rel=1e-4), a["step"]

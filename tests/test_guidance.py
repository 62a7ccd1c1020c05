"""Guidance as an option of sampling, as a user sets it, on a tiny run of iMF: measurements, grids."""

import json

import numpy as np
import pytest
from conftest import FEATURES, IMF_DIT, TINY, run_here, run_python
from PIL import Image

from mf_dist.report.page import write_report

FID_EVAL, SAMPLE = "tools/fid_eval.py", "tools/sample.py"
FEW = ("--nfe", 1, "--num-samples", 20, "--block", 10, "--metrics", "fid")
"""20 samples at one step."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, latents, images):
    """A run of 6 steps with guidance 3 in [0.2, 0.8], which measures itself at its end."""
    root = tmp_path_factory.mktemp("guidance")
    run_here("tools/reference_stats.py", "--images", images, "--features", FEATURES, "--out", root / "stats.npz")
    text = TINY.format(run=root / "run", latents=latents, features=FEATURES, images=root / "stats.npz")
    model = "model: {depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}"
    for old, new in (
        (model, IMF_DIT),
        ("meanflow: {kappa: 0.5}", "imf: {}"),
        ("lr: 1e-3, ema_decay: 0.99", "lr: 1e-2, ema_decay: 0.1"),
    ):
        assert old in text
        text = text.replace(old, new)
    (root / "imf.yaml").write_text(text)
    settings = ["eval.guidance=3", "eval.interval=[0.2,0.8]", "eval.every_images=96", "eval.training_samples=80"]
    run_python("-m", "mf_dist.train", root / "imf.yaml", "eval.nfe=1", "checkpoint.every_images=96", *settings)
    return root / "run"


@pytest.fixture
def measure(run, tmp_path):
    """measure(*options) -> the entries of tmp_path/metrics.json after tools/fid_eval.py."""

    def call(*options):
        run_here(FID_EVAL, "--checkpoint", run, *options, "--out", tmp_path)
        return entries(tmp_path)

    return call


def entries(out):
    return json.loads((out / "metrics.json").read_text())


def test_the_scale_and_the_interval_change_samples_and_are_part_of_the_protocol(measure):
    measure(*FEW)
    measure(*FEW, "--guidance", 5)
    measure(*FEW, "--interval", "0,0.6")
    made = measure(*FEW, "--guidance", 5, "--interval", "0,0.6")
    settings = [(entry["guidance"], entry["interval"]) for entry in made]
    assert settings == [(3, [0.2, 0.8]), (5, [0.2, 0.8]), (3, [0, 0.6]), (5, [0, 0.6])]  # defaults from the config
    assert len({entry["pixels_sha256"] for entry in made}) == 4
    again = measure(*FEW, "--guidance", 3, "--interval", "0.2,0.8")
    assert len(again) == 4 and again[:3] == made[1:]  # replaced
    results = ("metrics", "pixels_sha256")
    assert [again[3][key] for key in results] == [made[0][key] for key in results]


def test_the_measurement_in_training_has_the_guidance_of_the_config(run, measure):
    (inside,) = [entry for entry in entries(run / "eval") if entry.get("in_training")]
    assert (inside["guidance"], inside["interval"]) == (3, [0.2, 0.8])
    options = ("--num-samples", 80, "--seed", 1, "--nfe", 1, "--metrics", "fid", "--statistics", "streaming")
    default, other = measure(*options)[0], measure(*options, "--guidance", 1)[1]
    assert default["metrics"] == pytest.approx(inside["metrics"], rel=1e-9)
    assert other["metrics"] != pytest.approx(inside["metrics"], rel=1e-9)


def test_grids_have_the_guidance_that_is_given(run, tmp_path):
    pictures = {}
    for name, options in {
        "default": [],
        "same": ["--guidance", 3, "--interval", "0.2,0.8"],
        "scale": ["--guidance", 8],
        "interval": ["--interval", "0.4,0.65"],
    }.items():
        run_here(SAMPLE, "--checkpoint", run, "--class", 3, *options, "--out", tmp_path / f"{name}.png")
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).tobytes()
    assert pictures["default"] == pictures["same"]
    assert len({pictures[name] for name in ("default", "scale", "interval")}) == 3


def test_the_report_shows_guidance(run, tmp_path):
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "guidance 3, in [0.2, 0.8]" in text


@pytest.mark.parametrize("tool", [FID_EVAL, SAMPLE])
@pytest.mark.parametrize(
    ("option", "values", "text"),
    [
        ("--guidance", ["0.5", "-2", "nan", "inf", "1e400", "much", ""], "must be a number >= 1, got"),
        ("--interval", ["0.4", "0.6,0.4", "0,1.1", "0,nan", "0,0.5,1", ""], "must be START,END with 0 <= START <="),
    ],
)
def test_wrong_values_are_one_line(tool, option, values, text):
    for value in values:
        _, err = run_here(tool, f"{option}={value}", expect=2)
        assert err.startswith(f"error: {option} {text}") and err.count("\n") == 1

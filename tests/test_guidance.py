"""Guidance as an option of sampling, as a user sets it, on a tiny run of iMF: measurements, grids, sweeps."""

import json
import re
from itertools import product

import numpy as np
import pytest
from conftest import FEATURES, IMF_DIT, ROOT, TINY, run_here, run_python
from PIL import Image

import mf_dist
from mf_dist.report.page import write_report
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.generator import ImageGenerator

FID_EVAL, SAMPLE = "tools/fid_eval.py", "tools/sample.py"
FEW = ("--nfe", 1, "--num-samples", 20, "--block", 10, "--metrics", "fid")
SWEEP = ("--sweep-samples", 20, "--block", 10, "--nfe", 1)
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


@pytest.fixture
def calls(monkeypatch):
    """A list that gets the guidance of every block of samples."""
    made, generate = [], ImageGenerator.__call__

    def counted(self, *arguments):
        made.append(self.guidance)
        return generate(self, *arguments)

    monkeypatch.setattr(ImageGenerator, "__call__", counted)
    return made


def entries(out):
    return json.loads((out / "metrics.json").read_text())


def test_the_scale_and_the_interval_change_samples_and_are_part_of_the_protocol(measure):
    measure(*FEW)
    measure(*FEW, "--guidance", 5)
    measure(*FEW, "--interval", "0,0.6")
    made = measure(*FEW, "--guidance", 5, "--interval", "0,0.6")
    settings = [(entry["guidance"], entry["interval"]) for entry in made]
    assert settings == [(3, [0.2, 0.8]), (5, [0.2, 0.8]), (3, [0, 0.6]), (5, [0, 0.6])]  # defaults from the config
    assert len({entry["pixels_sha256"] for entry in made}) == 4 and not any("sweep" in entry for entry in made)
    again = measure(*FEW, "--guidance", 3, "--interval", "0.2,0.8")
    assert len(again) == 4 and again[:3] == made[1:]  # replaced
    results = ("metrics", "pixels_sha256")
    assert [again[3][key] for key in results] == [made[0][key] for key in results]


def test_the_measurement_in_training_has_the_guidance_of_the_config(run, measure):
    (inside,) = [entry for entry in entries(run / "eval") if entry.get("in_training")]
    assert (inside["guidance"], inside["interval"]) == (3, [0.2, 0.8])
    options = ("--num-samples", 80, "--seed", 1000, "--nfe", 1, "--metrics", "fid", "--statistics", "streaming")
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


def test_wrong_values_in_a_program_are_refused(run):
    model = mf_dist.load(run, ema=0.1)
    assert model.latents(1, guidance=1).shape == (1, 4, 8, 8)
    for values in ({"guidance": 0}, {"guidance": 0.5}, {"guidance": float("nan")}, {"interval": (0.8, 0.2)}):
        with pytest.raises(UserError, match=f"{next(iter(values))}.*got"):
            model.latents(1, **values)


def test_a_sweep_measures_each_point_as_a_measurement_of_its_own_would(run, measure, tmp_path):
    intervals = ("0.2,0.8", "0.4,0.65")
    given = [option for interval in intervals for option in ("--interval", interval)]
    out, _ = run_here(FID_EVAL, "--checkpoint", run, *SWEEP, "--sweep", "guidance=2:6:2", *given, "--out", tmp_path)
    swept = entries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "metrics.lock"}  # no blocks, no pictures
    places = list(product([[0.2, 0.8], [0.4, 0.65]], [2, 4, 6]))
    assert [(entry["interval"], entry["guidance"]) for entry in swept] == places
    assert all(entry["sweep"] is True and entry["seed"] == 1000 for entry in swept)
    assert all(entry["metrics"].keys() == {"fd_digits_20"} and entry["num_samples"] == 20 for entry in swept)
    alone = measure(*FEW, "--seed", 1000, "--guidance", 4, "--interval", "0.4,0.65")
    assert len(alone) == 7 and "sweep" not in alone[6]  # it does not replace the point of the sweep
    assert (alone[6]["metrics"], alone[6]["pixels_sha256"]) == (swept[4]["metrics"], swept[4]["pixels_sha256"])
    values = [entry["metrics"]["fd_digits_20"] for entry in swept]
    start, scale = places[int(np.argmin(values))]
    lines = out.splitlines()
    assert [line.split() for line in lines[2:9]] == [
        ["steps", "interval", "guidance", "fd_digits_20"],
        *(["1", "{:g},{:g}".format(*a), str(b), f"{v:.6g}"] for (a, b), v in zip(places, values, strict=True)),
    ]
    best = f"--nfe 1 --guidance {scale} --interval {start[0]:g},{start[1]:g}"
    assert lines[9] == f"  best: fd_digits_20 {min(values):.6g}, with {best}"


def test_a_sweep_measures_only_the_points_that_are_missing(run, measure, calls, tmp_path):
    sweep = (*SWEEP, "--sweep", "guidance=2,3,4")
    whole = measure(*sweep)
    assert [scale for scale, *_ in calls] == [2, 2, 3, 3, 4, 4]  # blocks of 10
    elsewhere = {"versions": {**whole[0]["versions"], "code": "another", "ranks": "8"}, "warnings": []}
    kept = [{**entry, **elsewhere} for entry in (whole[0], whole[2])]  # no part of the protocol
    (tmp_path / "metrics.json").write_text(json.dumps(kept))
    calls.clear()
    again = measure(*sweep, "--interval", "0.2,0.8")
    assert calls == [(3, 0.2, 0.8)] * 2 and again[:2] == kept
    assert (again[2]["metrics"], again[2]["pixels_sha256"]) == (whole[1]["metrics"], whole[1]["pixels_sha256"])
    for options, made in (([], 0), (["--seed", 2], 6), (["--sweep-samples", 10], 3), (["--no-resume"], 6)):
        calls.clear()
        measure(*sweep, *options)
        assert len(calls) == made, options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--sweep", "guidance=2:3:1", "--images", "x"], "--images measures all of a set of images: leave out --sweep"),
        *(
            (["--sweep", "guidance=2", *given], f"--sweep measures the Frechet distance alone.*: leave out {given[0]}")
            for given in (
                ["--times", "1,0"],
                ["--guidance", "2"],
                ["--num-samples", "9"],
                ["--metrics", "fid"],
                ["--save-npz"],
                ["--save-images", "3"],
            )
        ),
        (["--sweep-samples", "20"], "--sweep-samples, and more than one --interval, are for --sweep"),
        (
            ["--interval", "0,1", "--interval", "0,0.5"],
            "--sweep-samples, and more than one --interval, are for --sweep",
        ),
        (["--sweep", "guidance=2", "--sweep-samples", "1"], "--sweep-samples must be from 2 to 10000000, got 1"),
        (["--sweep", "omega=2:3:1"], "--sweep 'omega=2:3:1': expected guidance="),
    ],
)
def test_mistakes_in_sweeps_are_one_line(options, text):
    _, err = run_here(FID_EVAL, *options, expect=2)
    assert re.fullmatch(f"error: {text}.*\n", err)


@pytest.mark.dist
def test_a_killed_sweep_continues_on_other_ranks_with_the_same_numbers(zygote, run, tmp_path):
    """5 blocks a point: kill -9 in the second point on one rank, then in its third or fourth block on two ranks."""
    tool, sweep = ROOT / FID_EVAL, ["--sweep", "guidance=2,4,8", "--sweep-samples", 20, "--block", 4, "--nfe", 1]

    def call(out, ranks=1, faults=()):
        command = ["--checkpoint", run, *sweep, "--out", tmp_path / out]
        return zygote.run(tmp_path / f"{out}.log", command, ranks, faults, script=tool)

    assert call("whole") == [0], (tmp_path / "whole.log").read_text()
    assert call("killed", 1, [{"do": "kill", "block": 8}]) == [-9]
    first, blocks = entries(tmp_path / "killed"), list((tmp_path / "killed/work").glob("guidance4*/block-*.npz"))
    assert [entry["guidance"] for entry in first] == [2] and len(blocks) == 2
    assert -9 in call("killed", 2, [{"do": "kill", "block": 1, "rank": 1}])
    assert set(call("killed", 2)) == {0}, (tmp_path / "killed.log").read_text()
    both = [entries(tmp_path / out) for out in ("whole", "killed")]
    assert both[1][0] == first[0] and not (tmp_path / "killed/work").exists()
    for one, other in zip(*both, strict=True):
        assert all(one[key] == other[key] for key in ("guidance", "metrics", "pixels_sha256"))

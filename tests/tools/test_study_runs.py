"""Runs of a study: what counts as their measurement, real runs from training to the distance, and stopping them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from study_runs import TRAIN, Run, Study, cell, distances, known_by, network_of

from mf_dist.evaluation.measure import Settings, open_reference
from mf_dist.evaluation.report import read_entries
from mf_dist.runtime.distributed import Ranks
from mf_dist.runtime.errors import UserError

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tiny_config, tmp_path):
    return Run(tmp_path / "study", TRAIN, (str(tiny_config),), 3, (1, 2))


def changed(run, *overrides):
    return Run(run.folder, run.program, (*run.given, *overrides), run.seed, run.steps)


def write(run, entries):
    run.checkpoint.mkdir(parents=True, exist_ok=True)
    (run.folder / "eval").mkdir(exist_ok=True)
    (run.folder / "eval/metrics.json").write_text(json.dumps(entries))


def test_the_table_has_means_and_deviations(run):
    entry = {**run.measurement, "nfe": 1, "times": [1.0, 0.0], "metrics": {"fd_digits_60": 5.0}}
    write(run, [entry])
    assert distances(run) == {1: 5.0} and not run.is_measured
    write(run, [entry, {**entry, "nfe": 2, "times": [1.0, 0.5, 0.0], "metrics": {"fd_digits_60": 6.0}}])
    assert (
        run.is_measured and cell([run, run], 2) == "6.00 ± 0.00" and cell([run], 1) == "5.00" and cell([run], 4) == ""
    )


@pytest.mark.dist
def test_a_run_is_trained_and_measured_once(run):
    """What counts as its measurement, of what the real tool records: not one of another step or sampler, of other
    samples, features or references, during training, or of a sweep."""
    Study(1).complete([run], "test")
    first = distances(run)
    assert first.keys() == {1, 2} and run.is_measured
    log = (run.folder / "log.txt").read_text()
    Study(1).complete([run], "test")
    assert (run.folder / "log.txt").read_text() == log
    entries = read_entries(run.folder / "eval/metrics.json")
    for key in ("protocol", "step", "seed", "labels", "num_samples", "sampler", "ema", "vae", "times", "reference"):
        write(run, [{**entry, key: "another"} for entry in entries])
        assert distances(run) == {}, key
    for other in (
        {"features_sha256": "b"},
        {"in_training": True},
        {"sweep": True},
        {"metrics": {"kid_digits_60": 1.0}},
    ):
        write(run, [{**entry, **other} for entry in entries])
        assert distances(run) == {}, other
    sampled = changed(run, "eval.sampler=restart", "eval.num_samples=50")
    Study(1).complete([sampled], "test")  # measured, not trained
    assert sampled.is_measured and distances(sampled)[2] != first[2] and distances(run) == {}
    assert (run.folder / "log.txt").read_text().count("step 6/6") == log.count("step 6/6") == 1


def test_what_could_not_be_measured_is_not_trained(run, tmp_path):
    np.savez(tmp_path / "damaged.npz", mu=np.zeros(3), sigma=np.eye(3))
    for override, text in (
        ("eval.reference=nowhere", "no reference at eval.reference=.*nowhere"),
        ("eval.features=nowhere", "nowhere"),
        (f"eval.reference={tmp_path / 'damaged.npz'}", r"these features need \(64,\)"),
        ("data.path=nowhere", "no finished dataset at .*nowhere"),
    ):
        with pytest.raises(UserError, match=text):
            Study(1).complete([changed(run, override)], "test")
    assert not run.folder.exists()


def test_statistics_are_known_by_what_an_entry_says_of_them(run, tmp_path):
    """Images in an .npz by their name, as their hash is one of pixels."""
    rows = np.random.default_rng(0).standard_normal((200, 64))
    np.savez(tmp_path / "statistics.npz", mu=rows.mean(0), sigma=np.cov(rows.T))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((9, 32, 32, 3), np.uint8))
    network = network_of(run.config.eval)
    for name in ("statistics", "images"):
        path = str(tmp_path / f"{name}.npz")
        reference = open_reference(path, network, None, Settings(kinds=("fid",)), ALONE, tmp_path / "work")
        known = known_by(path, run.config.eval.features, None)
        assert known.items() <= reference.provenance.items() and known["reference"] == path
        assert ("reference_sha256" in known) == (name == "statistics")


def test_a_run_that_went_on_without_its_last_checkpoint_is_refused(run):
    (run.folder / "checkpoints/step-00000012").mkdir(parents=True)
    with pytest.raises(UserError, match="was trained up to step-00000012 and has no step-00000006 any more"):
        Study(1).complete([run], "test")
    assert not (run.folder / "log.txt").exists()


@pytest.mark.dist
def test_a_stopped_study_leaves_no_run_behind(run):
    """By SIGTERM, of the study alone: its training ends too, and the run can be continued."""
    given = (*run.given, "train.total_images=9600000")
    code = f"import study_runs as s; run = s.Run(s.Path({str(run.folder)!r}), s.TRAIN, {given}, 3, (1,)); "
    code += "s.Study(1).complete([run], 'test')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tools/study'}:{ROOT}"}
    study = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    log = run.folder / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.is_file() and "step 4/" in log.read_text()):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) != 0
    folder = str(run.folder).encode()
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands.append(path.read_bytes())
    assert not any(folder in command for command in commands) and list((run.folder / "checkpoints").glob("step-*"))

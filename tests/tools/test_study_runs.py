"""Runs of a study: what counts as their measurement, real runs from training to the distance, and stopping them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from study_runs import TRAIN, Run, cell, distances, train_and_measure_all

from mf_dist.evaluation.report import read_entries
from mf_dist.runtime.errors import UserError


@pytest.fixture
def run(tiny_config, tmp_path):
    return Run(tmp_path / "study", TRAIN, (str(tiny_config),), 3, (1, 2))


def test_only_the_measurement_of_that_run_counts(run, images):
    """Not of another step, of other samples, features or references, during training, or of a sweep."""
    entry = {**run.measurement, "nfe": 1, "metrics": {"fd_digits_60": 5.0, "kid_digits_60": 7.0}}
    assert entry["step"] == 6 and entry["seed"] == 3 and entry["reference"] == str(images)
    others = [
        *({"step": 3}, {"seed": 0}, {"labels": "random"}, {"num_samples": 50}, {"features_sha256": "b"}),
        *({"reference": "other"}, {"in_training": True}, {"sweep": True}, {"metrics": {"kid_digits_60": 1.0}}),
    ]
    (run.folder / "eval").mkdir(parents=True)
    path = run.folder / "eval/metrics.json"
    for other in others:
        path.write_text(json.dumps([{**entry, **other}]))
        assert distances(run) == {}, other
    path.write_text(json.dumps([entry, *({**entry, **other} for other in others)]))
    assert distances(run) == {1: 5.0} and not run.is_measured and cell([run, run], 1) == "5.00 ± 0.00"
    path.write_text(json.dumps([entry, {**entry, "nfe": 2}]))
    assert run.is_measured and cell([run], 2) == "5.00" and cell([run], 4) == ""


@pytest.mark.dist
def test_a_run_is_trained_and_measured_once(run):
    train_and_measure_all([run], "test", 1)
    first = distances(run)
    assert first.keys() == {1, 2} and run.checkpoint.is_dir()
    log = (run.folder / "log.txt").read_text()
    train_and_measure_all([run], "test", 1)
    assert (run.folder / "log.txt").read_text() == log
    (run.folder / "eval/metrics.json").unlink()
    train_and_measure_all([run], "test", 1)  # measured again, not trained
    assert distances(run) == first and len(read_entries(run.folder / "eval/metrics.json")) == 2
    assert (run.folder / "log.txt").read_text().count("step 6/6") == log.count("step 6/6") == 1


def test_what_could_not_be_measured_is_not_trained(run):
    for override in ("eval.reference=nowhere", "eval.features=nowhere"):
        changed = Run(run.folder, run.program, (*run.given, override), run.seed, run.steps)
        with pytest.raises(UserError, match="nowhere"):
            train_and_measure_all([changed], "test", 1)
    assert not run.folder.exists()


@pytest.mark.dist
def test_a_stopped_study_leaves_no_run_behind(run):
    """By SIGTERM, of the study alone: its training ends too, and the run can be continued."""
    given = (*run.given, "train.total_images=9600000")
    code = f"import study_runs as s; run = s.Run(s.Path({str(run.folder)!r}), s.TRAIN, {given}, 3, (1,)); "
    code += "s.train_and_measure_all([run], 'test', 1)"
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
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(folder in command for command in commands) and list((run.folder / "checkpoints").glob("step-*"))

"""Facts of the report: a run's status, history, headline, curves and rates."""

import json
import os
import subprocess
import sys
import time
from subprocess import PIPE

import numpy as np
import pytest
from PIL import Image
from report_runs import CONFIG, line, report, write_run

from mf_dist.fault_tolerance.status import NO_REASON, Status
from mf_dist.report.collect import read_run, read_runs
from mf_dist.report.curves import POINTS, STRETCHES, device_peak, tflops_per_image, thin
from mf_dist.report.facts import faults, history, overview, status, training_seconds
from mf_dist.report.page import write_report
from mf_dist.report.pictures import fit, grids, last_grids
from mf_dist.report.results import compared, headline, measured
from mf_dist.runtime.errors import UserError


def test_fit_keeps_the_ends_and_the_budget():
    def make(n):
        return {"n": n, "pictures": [{"src": "x" * 800}]}

    assert [item["n"] for item in fit(range(11), make, 5999, 50)] == [0, 2, 5, 8, 10]
    assert [item["n"] for item in fit(range(11), make, 10**6, 3)] == [0, 5, 10]
    assert [item["n"] for item in fit(range(11), make, 1000, 3)] == [10] and not fit(range(11), make, 999, 3)


def test_thinning_keeps_extremes():
    values = np.random.default_rng(3).normal(size=9_900)
    values[[1234, 7777]] = 50, -50
    drawn = thin([(16 * i, v, i) for i, v in enumerate(values.tolist())])
    rows = values.reshape(STRETCHES, 33)
    for key, expected in {"low": rows.min(1), "y": np.median(rows, axis=1), "high": rows.max(1)}.items():
        assert drawn[key] == pytest.approx(expected, rel=1e-4)
    assert drawn["step"] == list(range(32, 9_900, 33)) and drawn["x"] == [16 * step for step in drawn["step"]]
    assert (max(drawn["high"]), min(drawn["low"])) == (50, -50)
    few = thin([(16 * i, v, i) for i, v in enumerate(values[:POINTS].tolist())])
    assert "low" not in few and few["y"] == pytest.approx(values[:POINTS], rel=1e-4)


def test_history_has_starts_ends_and_faults(tmp_path):
    run_status = Status(tmp_path / "run")
    run_status.begin(0)
    run_status.note(3, "step left out: the gradient is not finite")
    run_status.begin(4)  # after a kill -9
    run_status.checkpoint_committed(8)
    run_status.end("stopped", 8, "SIGTERM")
    run_status.begin(8)
    run_status.end("failed", 9, "a rank died")
    run_status.refuse("no such data", has_begun=False)
    run = read_run(run_status.path.parent, "run")
    events = [(row[1], row[2]) for row in history(run)]
    assert events == [
        ("started", 0),
        ("warning", 3),
        ("broke off", ""),
        ("resumed", 4),
        ("stopped", 8),
        ("resumed", 8),
        ("failed", 9),
        ("refused", 8),
    ]
    assert [row[3] for row in history(run)[-2:]] == ["a rank died", "no such data"]
    run.lines = [line(10), line(20, skipped_steps=2), line(30, skipped_steps=2, clipped_steps=1)]
    assert faults(run) == [
        "2 step(s) left out after step 10, up to step 20",
        "1 step(s) clipped after step 20, up to step 30",
    ]


def summary(folder):
    """Word and CSS class of the run's status, the reason of a refusal, and the last event of its history."""
    run = read_run(folder, "run")
    facts = status(run)
    return facts["word"], facts["css_class"], facts["refused"].partition("UTC: ")[2], history(run)[-1][1]


def test_a_refused_call_does_not_change_the_status(tmp_path):
    """Whether it is refused before or after its start was counted."""
    run_status = Status(tmp_path / "run")
    run_status.refuse("no such data", has_begun=False)
    assert summary(tmp_path / "run") == ("unknown", "neutral", "no such data", "refused")
    run_status.begin(0)
    run_status.checkpoint_committed(6)
    run_status.end("finished", 6)
    for reason, has_begun in (("no such config", False), ("no room", True), ("no such data", False)):
        if has_begun:
            run_status.begin(6)
        run_status.refuse(reason, has_begun)
        assert summary(tmp_path / "run") == ("finished", "good", reason, "refused")


def test_a_run_is_running_while_its_lock_is_held(tmp_path):
    """A process that holds the run, a call refused meanwhile, and a kill -9 of the process."""
    code = (
        "import sys; from pathlib import Path; from mf_dist.fault_tolerance.status import Status;"
        "status = Status(Path(sys.argv[1]));"
        "status.lock_run(); status.begin(0); status.checkpoint_committed(8);"
        "print('begun', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        assert summary(folder) == ("running", "neutral", "", "started")
        Status(folder).refuse("no such data", has_begun=False)
        assert summary(folder) == ("running", "neutral", "no such data", "refused")
        process.kill()
        process.wait()
    assert summary(folder) == ("broke off", "bad", "no such data", "broke off")
    assert f"s ago; {NO_REASON}" in report(folder)[0].text()


def test_a_run_on_another_machine_is_judged_by_its_last_activity(tmp_path):
    """Its lock is not visible. The newest line of metrics.jsonl counts, not the start."""
    folder = write_run(tmp_path / "run")
    (folder / "status.json").write_text(json.dumps({"status": "running", "time": 1e9, "host": "elsewhere"}))
    assert status(read_run(folder, "run"))["word"] == "running"
    os.utime(folder / "metrics.jsonl", (time.time() - 3 * 86400,) * 2)
    facts = status(read_run(folder, "run"))
    assert facts["word"] == "broke off" and facts["reason"].startswith("last activity 3 days ago")


def test_comparison_has_a_row_for_every_distance(tmp_path):
    def entry(nfe, value, **changes):
        return {"metrics": {"fd_digits": value}, "nfe": nfe, "step": 4, "num_samples": 1000, "seed": 0, **changes}

    given = {"a": [entry(1, 9.0), entry(1, 4.5), entry(2, 3.0)], "b": [entry(1, 5.5, seed=1), entry(50, 2.0)]}
    for name, entries in given.items():
        (write_run(tmp_path / name) / "eval").mkdir()
        (tmp_path / name / "eval/metrics.json").write_text(json.dumps(entries))
    folders = [tmp_path / name for name in given]
    expected = [["fd_digits, 1 step; protocols differ in seed", "4.5", "5.5"], ["fd_digits, 2 steps", "3", ""]]
    assert compared(read_runs(folders)) == [*expected, ["fd_digits, 50 steps", "", "2"]]
    assert "fd_digits, 1 step; protocols differ in seed 4.5 5.5" in report(*folders)[0].text()
    assert "protocols differ" not in report(folders[0])[0].text()


def test_headline_is_the_newest_distance_with_its_protocol(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "eval").mkdir()
    old = {"metric": "fd_digits", "value": 9.0, "nfe": 1, "step": 2, "num_samples": 99, "reference": "real/"}
    new = {
        "metrics": {"fd_digits": 7.25, "fd_digits_std": 1.0, "recall_digits": 0.5},
        "nfe": 1,
        "step": 4,
        "ema": "0.9",
        "num_samples": 1000,
        "reference": "real/",
        "reference_images": 797,
    }
    during = {**new, "in_training": True, "nfe": 2, "metrics": {"fd_digits": 6.5}, "warnings": ["too few samples"]}
    same = {**new, "in_training": True, "metrics": {"fd_digits": 99.0}}
    (run / "eval/metrics.json").write_text(json.dumps([old, new, during, same]))
    one, two = headline(read_run(run, "run"))
    assert (one["value"], one["steps"]) == ("7.25", "1 step")
    assert one["protocol"] == "1,000 samples, EMA 0.9, step 4, against real/ (797 real images)"
    assert (two["value"], two["steps"]) == ("6.5", "2 steps") and "measured during training" in two["protocol"]
    assert "too few samples" in report(run)[0].text() and one["warnings"] == []


def test_distances_measured_during_training_are_curves(tmp_path):
    seen = [{"step": s, "samples_seen": 16 * s, "fd_digits_1k/nfe1/ema0.99": 10.0 / s} for s in (2, 4)]
    run = write_run(tmp_path / "run", [line(2), seen[0], line(4), seen[1]])
    (run / "eval").mkdir()
    entries = [
        {"metrics": {"fd_digits_1k": 2.5}, "in_training": True, "nfe": 1, "ema": "0.99", "step": 4},
        {"metrics": {"fd_digits_1k": 2.75}, "nfe": 2, "ema": "0.99", "step": 4},
    ]
    (run / "eval/metrics.json").write_text(json.dumps(entries))
    (chart, *_) = report(run)[1]["plots"]["curves"]
    traces = {trace["name"]: (trace["x"], trace["y"]) for trace in chart["traces"]}
    assert traces == {"1 step, EMA 0.99": ([32, 64], [5.0, 2.5]), "2 steps, EMA 0.99, evaluated": ([64], [2.75])}


def test_a_curve_of_distances_has_its_band_where_all_points_have_one(tmp_path):
    key = "fd_digits_1k/nfe1/ema0.99"
    run = write_run(tmp_path / "run", [{"step": s, "samples_seen": 16 * s, key: 10.0 / s} for s in (2, 4)])
    (run / "eval").mkdir()

    def trace(bands):
        during = {"in_training": True, "nfe": 1, "ema": "0.99"}
        entries = [
            {**during, "metrics": {"fd_digits_1k": 10 / step}, "plus_minus_95": {"fd_digits_1k": band}, "step": step}
            for step, band in bands.items()
        ]
        (run / "eval/metrics.json").write_text(json.dumps(entries))
        ((drawn,),) = (
            chart["traces"] for chart in report(run)[1]["plots"]["curves"] if chart["title"] == "fd_digits_1k"
        )
        return drawn

    both = trace({2: 0.5, 4: 0.25})
    assert both["y"] == [5, 2.5] and both["low"] == [4.5, 2.25] and both["high"] == [5.5, 2.75] and both["is_band"]
    assert "low" not in trace({4: 0.25})
    assert [card["value"] for card in headline(read_run(run, "run"))] == ["2.5 ± 0.25"]


def test_runs_of_two_protocols_are_marked_and_an_entry_without_one_is_adms(tmp_path):
    def run(name, **changes):
        folder = write_run(tmp_path / name)
        (folder / "eval").mkdir()
        entry = {"metrics": {"fid50k": 2.0}, "plus_minus_95": {"fid50k": 0.05}, "nfe": 1, "step": 4, **changes}
        (folder / "eval/metrics.json").write_text(json.dumps([entry]))
        return read_run(folder, name)

    old, adm, imf = run("old"), run("adm", protocol="adm"), run("imf", protocol="imf-jax", seeds=[0, 1])
    assert compared([old, adm]) == [["fid50k, 1 step", "2 ± 0.05", "2 ± 0.05"]]
    assert compared([adm, imf])[0][0] == "fid50k, 1 step; protocols differ in named protocol, seeds"
    assert headline(imf)[0]["protocol"] == "protocol imf-jax, mean over the seeds [0, 1], step 4"


def test_sweeps_are_charts_and_no_results(tmp_path):
    """A curve for each interval and number of steps: of the newest checkpoint, and of one protocol."""

    def point(scale, value, interval=(0.0, 1.0), **changes):
        entry = {"metrics": {"fd_digits_20": value}, "sweep": True, "nfe": 1, "step": 4, "ema": "0.9", "seed": 1}
        return {**entry, "guidance": scale, "interval": list(interval), **changes}

    single = {"metrics": {"fd_digits_20": 9.0}, "nfe": 1, "step": 2, "guidance": 8.0, "interval": [0.4, 0.65]}
    run = write_run(tmp_path / "run")
    (run / "eval").mkdir()
    (run / "eval/metrics.json").write_text(json.dumps([single]))
    before = report(run)
    assert "Guidance" not in before[0].texts and before[1]["plots"]["guidance"] == []
    swept = [
        *(point(scale, 9.0 - scale, seed=2) for scale in (1.0, 2.0, 3.0)),  # an earlier one of the same checkpoint
        *(point(scale, 1.0, step=2) for scale in (1.0, 2.0)),
        *(point(scale, 8.0 / scale) for scale in (4.0, 1.0, 2.0)),
        point(1.0, 5.0, (0.4, 0.65)),
        point(1.0, 4.0, nfe=2),
        {"metrics": {"fd_digits_20": 3.0}, "sweep": True, "nfe": 1},  # of no guidance
    ]
    (run / "eval/metrics.json").write_text(json.dumps([single, *swept]))
    page, data = report(run)
    (chart,) = data["plots"]["guidance"]
    assert (chart["title"], chart["x"]) == ("fd_digits_20", "guidance") and "Guidance" in page.texts
    assert [(t["name"], t["dash"], t["x"], t["y"], t["step"]) for t in chart["traces"]] == [
        ("guidance in [0, 1], 1 step", 0, [1, 2, 4], [8, 4, 2], [4, 4, 4]),
        ("guidance in [0.4, 0.65], 1 step", 1, [1], [5], [4]),
        ("guidance in [0, 1], 2 steps", 2, [1], [4], [4]),
    ]
    read = read_run(run, "run")
    assert [(card["value"], card["protocol"]) for card in headline(read)] == [
        ("9", "step 2, guidance 8, in [0.4, 0.65]")
    ]
    assert measured(read)["heads"] == ["network calls", "fd_digits_20", "guidance", "guidance interval", "step"]
    assert measured(read)["rows"] == [[1, 9.0, 8.0, [0.4, 0.65], 2]]
    assert data["plots"]["curves"] == before[1]["plots"]["curves"]
    other = write_run(tmp_path / "other")
    (other / "eval").mkdir()
    (other / "eval/metrics.json").write_text(json.dumps([point(1.0, 2.5)]))
    assert compared(read_runs([run, other])) == [["fd_digits_20, 1 step", "9", ""]]
    (chart,) = report(run, other)[1]["plots"]["guidance"]
    names = [(trace["name"], trace["run"], trace["dash"]) for trace in chart["traces"]]
    assert names[0] == ("run · guidance in [0, 1], 1 step", 0, 0)
    assert names[3] == ("other · guidance in [0, 1], 1 step", 1, 0)


def test_images_are_those_recorded_where_the_batch_size_has_changed(tmp_path):
    """4 steps of 16 images, then 8; the config has the last batch size."""
    config = {**CONFIG, "train": {"total_images": 112, "batch_size": 8}}
    lines = [line(2), line(4), line(6, samples_seen=80), line(8, samples_seen=96)]
    run = read_run(write_run(tmp_path / "run", lines, config), "run")
    assert [run.images(step) for step in (0, 1, 4, 5, 6, 8, 9)] == [0, 16, 64, 72, 80, 96, 104]
    assert ["Steps", "8 of 10"] in overview([run])


def test_rates_follow_from_the_config(tmp_path):
    """2 ranks share 640 images/s; MFU requires a device with a known peak, and bf16."""
    from mf_dist.config.cost import forward_flops
    from mf_dist.config.loader import from_tree
    from mf_dist.config.schema import Config

    run = read_run(write_run(tmp_path / "run"), "run")
    forward = forward_flops(from_tree(Config, CONFIG, "test").model)
    assert tflops_per_image(run) == pytest.approx(
        (3 + 1 + 0.25 + 0.5) * forward / 2e12
    )  # 4.75 forwards: docs/design.md
    assert training_seconds(run.training) == pytest.approx(4 * 0.025)
    assert device_peak(run) is None and "MFU (no known peak of x86_64 CPU)" in report(run.folder)[0].text()
    run.state["versions"]["device"] = "NVIDIA H100 80GB HBM3"
    run.config["engine"] = {"precision": "bf16"}
    assert device_peak(run) == 989e12
    run.state["versions"]["device"] = "NVIDIA H100 PCIe"
    assert device_peak(run) == 756e12


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    report(run)
    before = (run / "report.html").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_report([run], run / "report.html")
    assert (run / "report.html").read_bytes() == before and not list(run.glob("*.tmp"))


def test_grids_of_one_step_share_a_frame(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "samples").mkdir()
    for name in ("step00000004-nfe2", "step00000004-nfe1", "step00000004-nfe10", "step00000002", "step3.partial"):
        Image.new("RGB", (20, 20), "red").save(run / f"samples/{name}.png")
    frames = grids(read_run(run, "run"), 10**6)
    assert [frame["step"] for frame in frames.items] == [2, 4] and frames.note == ""
    assert [picture["caption"] for picture in frames.items[1]["pictures"]] == ["1 step", "2 steps", "10 steps"]


def test_grids_of_the_last_measurement_are_shown_if_they_differ(tmp_path):
    run = write_run(tmp_path / "run")
    for name, colour in {"samples/step00000004": "red", "eval/grid_steps": "red", "eval/grid_nfe1": "blue"}.items():
        (run / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(run / f"{name}.png")

    def captions(sampler, step):
        entry = {"metrics": {"fd_digits": 1.0}, "nfe": 1, "step": step, "sampler": sampler}
        (run / "eval/metrics.json").write_text(json.dumps([entry]))
        measured = read_run(run, "run")
        return [item["caption"] for item in last_grids(measured, grids(measured, 10**6), 10**6).items]

    assert captions("meanflow", 4) == [] and "At the last measurement" not in report(run)[0].text()
    assert captions("euler", 4000) == ["1 step, after training step 4,000"]
    Image.new("RGB", (20, 20), "green").save(run / "eval/grid_steps.png")
    assert captions("meanflow", 4) == ["several numbers of steps, after training step 4"]


def test_user_error_names_the_folder(tmp_path):
    with pytest.raises(UserError, match="is not a run: expected a folder with metrics.jsonl"):
        read_runs([tmp_path])

"""report.html of real runs and of damaged ones, and its size."""

import base64
import io
import json
import os
import re

import numpy as np
import pytest
from conftest import ROOT, run_python
from PIL import Image
from report_runs import CONFIG, MARKUP, Page, line, report, write_run, write_samples

from mf_dist.fault_tolerance.status import Status
from mf_dist.report.collect import newest_run, read_run, read_runs
from mf_dist.report.curves import STRETCHES
from mf_dist.report.facts import differing, format_value
from mf_dist.report.page import LIMIT
from mf_dist.report.pictures import classes
from mf_dist.runtime.errors import UserError


def test_training_writes_the_report(tiny_config, tmp_path):
    """The curves, frames and profile of the page equal the run's files."""
    done = run_python("-m", "mf_dist.train", tiny_config, "train.profile_steps=2")
    run = tmp_path / "run"
    assert "no report" not in done.stdout and (run / "report.html").stat().st_size < 10_000_000
    written = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    page, data = Page(run / "report.html"), None
    data = json.loads(page.data)
    curves = {chart["title"]: chart["traces"] for chart in data["plots"]["curves"]}
    for key, trace in zip(("raw_loss_r_equals_t", "raw_loss_r_below_t"), curves["Raw loss"], strict=True):
        assert trace["y"] == pytest.approx([entry[key] for entry in written], rel=1e-4)
        assert trace["x"] == [entry["samples_seen"] for entry in written]
    assert {"v-loss", "|du/dt|", "Gradient norm", "Learning rate"} <= set(curves)
    frames = data["runs"][0]["frames"]
    assert [(frame["step"], frame["images"]) for frame in frames] == [(3, 48), (6, 96)]
    shown = Image.open(io.BytesIO(base64.b64decode(frames[1]["pictures"][0]["src"].split(",")[1]))).convert("RGB")
    drawn = Image.open(sorted((run / "samples").glob("step00000006*.png"))[0]).convert("RGB")
    assert shown.size == drawn.size and np.abs(np.asarray(shown, int) - np.asarray(drawn, int)).mean() < 4
    text = page.text()
    assert "finished" in text and "6 of 6" in text and "No Frechet distance in" in text and "resumed" not in text
    profile = json.loads((run / "profile/profile.json").read_text())
    assert f"Steps 4 to 5 on CPU: {format_value(profile['ms'])} ms per step while recorded" in text
    for row in (*profile["classes"], *profile["waits"]):
        assert f"{row['name']} {format_value(row['ms'])} {row['share']:.1%} {format_value(row['calls'])}" in text

    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # the next report cannot be written, which must not fail the run
    (run / "STOP").touch()
    done = run_python("-m", "mf_dist.train", tiny_config, "train.total_images=192")
    assert "warning: no report (" in done.stdout
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    (run / "report.html").rmdir()
    output = run_python("tools/report.py", run).stdout
    text = Page(run / "report.html").text()
    assert "report.html" in output and "resumed" in text and "config changed: train.total_images 96 -> 192" in text


@pytest.mark.dist
def test_a_failing_run_writes_the_report(tiny_config, tmp_path):
    options = "optim.lr=1e30", "train.max_skipped=2", "train.total_images=320"
    done = run_python("-m", "mf_dist.train", tiny_config, *options, expect=2)
    assert done.stderr.splitlines()[-1].startswith("error: ") and "diverged" in done.stderr
    text = Page(tmp_path / "run/report.html").text()
    assert "failed" in text and "diverged" in text and "broke off" not in text


def test_page_makes_no_requests(tmp_path):
    page, _ = report(write_run(tmp_path / "run"))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            address = attributes.get(name) or ""
            assert address == "" or address.startswith(("data:", "#")), f"{tag} {name}={address[:80]}"
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_texts_of_a_run_are_escaped(tmp_path):
    """Names, reasons, classes, protocols and config values full of markup: the page has the same elements."""
    config = {**CONFIG, "data": {"path": MARKUP}}
    runs = []
    for name, text in (("harmless", "x"), ("<b>run<img src=x onerror=alert(3)>", MARKUP)):
        run = write_run(tmp_path / name, config=config if text == MARKUP else CONFIG, classes=[text] * 3)
        Status(run).end("failed", 4, text)
        Status(run).note(4, text)
        entry = {"metrics": {f"fd_{text}": 2.0}, "nfe": 1, "ema": text, "step": 4, "reference": text, "labels": text}
        write_samples(run, 6, 8, np.random.default_rng(0))
        (run / "eval/metrics.json").write_text(json.dumps([entry]))
        runs.append(run)
    (plain, _), (page, data) = report(runs[0]), report(runs[1])
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.texts.count(MARKUP) >= 3 and data["runs"][0]["classes"][0]["name"] == MARKUP


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "run")
    good = json.dumps(line(6))
    broken = [
        good[: len(good) // 2],
        "",
        "null",
        "[1]",
        "\x00",
        '{"step": 7}',
        '{"step": NaN, "samples_seen": 1}',
        "{" * 9000,
    ]
    odd = json.dumps(line(8, v_loss="much", grad_norm=None, lr=10**400)).replace(
        '"du_dt_norm": 20.0', '"du_dt_norm": NaN'
    )
    with open(run / "metrics.jsonl", "ab") as file:
        file.write("\n".join([*broken, odd, good]).encode() + b"\n\xff\xfe{broken\n")
    (run / "status.json").write_text("[]")
    (run / "eval").mkdir()
    (run / "eval/metrics.json").write_text('{"fd_digits": 3.0}')
    (run / "profile").mkdir()
    (run / "profile/profile.json").write_text('{"first_step": 4, "steps": 2, "costs": [3, {"name": 5, "ms": "x"}]}')
    (run / "history.jsonl").write_text('{"status": "running", "step": 0, "time": 1e99, "host": 3}\n{"sta')
    page, data = report(run)
    text = page.text()
    assert "7 of 13 lines of metrics.jsonl are damaged" in text and "2 lines of metrics.jsonl have no step" in text
    assert "1 of 2 lines of history.jsonl are damaged" in text and "status.json cannot be read" in text
    assert "metrics.json cannot be read (not a JSON list)" in text
    curves = {chart["title"]: chart["traces"][0] for chart in data["plots"]["curves"]}
    assert curves["Raw loss"]["step"] == [2, 4, 6, 8]
    assert [curves[name]["step"] for name in ("v-loss", "|du/dt|", "Gradient norm", "Learning rate")] == [[2, 4, 6]] * 4
    gap = "metrics.jsonl: v_loss, du_dt_norm, grad_norm, lr are not finite in 1 of 4 lines, first at step 8."
    assert text.count(gap) == 1 and text.count("v_loss is not finite in 1 of 4 lines, first at step 8") == 1


def test_values_that_are_not_finite_are_reported(tmp_path):
    """Null means not finite for the gradient norm, and no rows for a loss."""
    bad = {"v_loss": float("nan"), "du_dt_norm": float("inf"), "grad_norm": None, "raw_loss_r_below_t": None}
    lines = [line(step, lr=float("nan"), **(bad if step > 6 else {})) for step in range(1, 13)]
    page, data = report(write_run(tmp_path / "run", lines))
    text, where = page.text(), "not finite in 6 of 12 lines, first at step 7"
    assert f"v_loss, du_dt_norm, grad_norm are {where}." in text and f"raw_loss_r_below_t are {where}" not in text
    gaps = {chart["title"]: chart["gaps"] for chart in data["plots"]["curves"]}
    assert gaps == {
        "Raw loss": [],
        "v-loss": [f"v_loss is {where}"],
        "|du/dt|": [f"du_dt_norm is {where}"],
        "Gradient norm": [f"grad_norm is {where}"],
    }
    assert "Learning rate (lr is not finite in 12 of 12 lines, first at step 1)" in text


@pytest.mark.parametrize("damage", ["nothing at all", "half of everything"])
def test_missing_or_truncated_files_are_reported(tmp_path, damage):
    run = write_run(tmp_path / "run")
    if damage == "half of everything":
        (run / "samples").mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(
            run / "samples/step00000004.png"
        )
        write_samples(run, 6, 8, np.random.default_rng(0))
        (run / "eval/metrics.json").write_text(json.dumps([{"metric": "fd_digits", "value": 3.0, "nfe": 1}, 3]))
        (run / "eval/neighbours_nfe1.png").write_bytes((run / "samples/step00000004.png").read_bytes())
        for path in [path for path in run.rglob("*") if path.is_file()]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert read_run(run, "run").problems
    else:
        for path in run.iterdir():
            if path.is_dir():
                (path / "step-00000004/state.json").unlink()
        (run / "metrics.jsonl").write_text("")
    text = report(run)[0].text()
    for sentence in (
        "No Frechet distance in",
        "status.json is missing or damaged",
        "there is none yet",
        "No history.jsonl",
    ):
        assert sentence in text, sentence
    assert "samples_nfe1.npz cannot be read" in text or "No samples_nfeN.npz" in text
    assert "1 could not be read" in text or "No grids of samples" in text
    assert "No pictures of neighbours" in text


def test_a_device_in_place_of_a_file_is_not_read(tmp_path):
    """Reading /dev/full never ends."""
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "status.json", "samples/step00000002.png"):
        (run / "samples").mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to("/dev/full")
    text = report(run)[0].text()
    assert "metrics.jsonl cannot be read (not a regular file)" in text and "status.json cannot be read" in text


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    assert "is not a run" in run_python("tools/report.py", tmp_path, expect=2).stderr
    assert "ending in .html" in run_python("tools/report.py", tmp_path, "--out", "x.pdf", expect=2).stderr
    assert not list(tmp_path.iterdir())


def test_the_newest_run_may_have_no_checkpoint_yet(tmp_path):
    assert "no run under 'runs': train one" in run_python(ROOT / "tools/report.py", cwd=tmp_path, expect=2).stderr
    old = write_run(tmp_path / "runs/old")
    for path in old.rglob("*"):
        os.utime(path, (1e9, 1e9))
    Status(tmp_path / "runs/sweep/new").begin(0)
    assert newest_run(tmp_path / "runs") == tmp_path / "runs/sweep/new"
    os.utime(old / "metrics.jsonl")
    assert newest_run(tmp_path / "runs") == old
    with pytest.raises(UserError, match="no run under"):
        newest_run(old / "checkpoints")


def test_several_runs_share_charts(tmp_path):
    other = {**CONFIG, "meanflow": {"kappa": 0.25}, "run_dir": "runs/b"}
    runs = [write_run(tmp_path / "one/run"), write_run(tmp_path / "two/run", config=other)]
    page, data = report(*runs)
    losses = next(chart for chart in data["plots"]["curves"] if chart["title"] == "Raw loss")
    names = [str(run) for run in runs]  # folders of equal name are distinguished by path
    assert [trace["name"] for trace in losses["traces"]] == [
        f"{n} · {part}" for n in names for part in ("r = t", "r < t")
    ]
    assert differing(read_runs(runs)) == [["meanflow.kappa", "0.5", "0.25"]]
    assert "meanflow.kappa 0.5 0.25" in page.text()


def test_a_full_run_stays_below_the_limit(tmp_path):
    """Noise does not compress: 12 large grids, 100 classes and 8,000 lines are thinned out, with notes."""
    generator = np.random.default_rng(1)
    run = write_run(tmp_path / "run", [line(step, grad_norm=9.5 if step == 5_001 else 0.5) for step in range(1, 8_001)])
    (run / "samples").mkdir()
    noise = Image.fromarray(generator.integers(0, 256, (400, 1500, 3), np.uint8))
    noise.save(run / "samples/step00000001.png", compress_level=0)
    for step in range(2, 13):
        os.link(run / "samples/step00000001.png", run / f"samples/step{step:08d}.png")
    write_samples(run, 1600, 96, generator, number_of_classes=100)
    page, data = report(run)
    size = (run / "report.html").stat().st_size
    assert 0.6 * LIMIT < size <= LIMIT < 10_000_000
    found = re.search(r"Thinned out: (\d+) of 12 grids", page.text())
    frames = [frame["step"] for frame in data["runs"][0]["frames"]]
    assert int(found[1]) == len(frames) > 3 and (frames[0], frames[-1]) == (1, 12)
    assert max(np.diff(frames)) - min(np.diff(frames)) <= 1
    assert all(picture["w"] == 1100 for frame in data["runs"][0]["frames"] for picture in frame["pictures"])
    norms = next(chart for chart in data["plots"]["curves"] if chart["title"] == "Gradient norm")["traces"][0]
    assert len(norms["x"]) <= STRETCHES and max(norms["high"]) == 9.5
    assert page.text().count("(up to 8,000 here) the line is the median") == 2  # sections Curves and Speed


def test_the_class_browser_shows_the_samples_of_each_class(tmp_path):
    run = write_run(tmp_path / "run")
    pixels, labels = write_samples(run, 60, 32, np.random.default_rng(2))
    browser = classes(read_run(run, "run"), 10**6)
    assert [entry["name"] for entry in browser.items] == ["a", "b", "c"] and not browser.note
    for number, entry in enumerate(browser.items):
        sprite = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(entry["pictures"][0]["src"].split(",")[1]))).convert("RGB")
        )
        assert sprite.shape == (66, 270, 3) and (sprite[:, 32:34] == 255).all()
        assert np.array_equal(sprite[34:, :32], pixels[labels == number][8])  # the ninth: lossless, in the second row

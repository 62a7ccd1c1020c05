"""The comparison of objectives: equal images, equal FLOPs, runs by their configs, and the table."""

import json
from argparse import Namespace

import compare
import pytest
from conftest import FEATURES, run_here


@pytest.fixture
def overrides(latents):
    return [f"data.path={latents}"]


def test_same_flops_means_images_times_cost(overrides):
    for method in compare.METHODS:
        equal, config = (compare.resolved(compare.arguments(method, overrides, same)) for same in (True, False))
        base = compare.resolved(compare.arguments(compare.BASE, overrides, False))
        assert config.train.total_images == base.train.total_images == 96_000
        ratio = equal.train.total_images * compare.flops_per_image(equal) / (96_000 * compare.flops_per_image(base))
        assert ratio == pytest.approx(1, abs=5e-4) and equal.train.total_images % 64 == 0
    assert compare.resolved(compare.arguments("solution_flow", overrides, True)).train.total_images == 101_312
    equal = compare.arguments("boundary", overrides, True)
    assert equal == compare.arguments("boundary", overrides, False), "a run of both tables would be trained twice"


def test_methods_differ_in_objective_alone(overrides):
    """But for flow matching, which has no guidance, and iMF, which has another network and guidance at sampling."""
    base = compare.resolved(compare.arguments(compare.BASE, overrides, False))
    for method in compare.METHODS.keys() - {"flow", "imf"}:
        config = compare.resolved(compare.arguments(method, overrides, False))
        assert (config.optim, config.train, config.eval) == (base.optim, base.train, base.eval)
        assert (config.objective.omega, config.objective.kappa) == (base.objective.omega, base.objective.kappa)


def test_a_run_is_named_by_its_training_alone(tmp_path, overrides, images):
    """Not by how it is measured; a peer has one seed."""
    args = Namespace(out=tmp_path, seeds=3, overrides=overrides)
    folders = {run.folder for run in compare.runs_of(args, "meanflow", False)}
    peers = {run.folder for run in compare.runs_of(args, "authors", False)}
    assert len(folders) == 3 and len(peers) == 1 and not peers & folders
    args.overrides = [*overrides, "eval.num_samples=100", f"eval.reference={images}"]
    assert {run.folder for run in compare.runs_of(args, "meanflow", False)} == folders
    args.overrides = [*overrides, "optim.lr=1e-3"]
    assert not {run.folder for run in compare.runs_of(args, "meanflow", False)} & folders


def test_the_table_shows_mean_and_deviation_of_the_runs_of_that_config(tmp_path, overrides, images):
    overrides += [f"eval.features={FEATURES}", f"eval.reference={images}"]
    args = Namespace(out=tmp_path, seeds=3, overrides=overrides)
    table = {method: compare.runs_of(args, method, False) for method in ("meanflow", "boundary")}
    for seed, value in enumerate((2.0, 3.0, 4.0)):
        run = table["boundary"][seed]
        (run.folder / "eval").mkdir(parents=True)
        entry = {**run.measurement, "nfe": 1, "times": [1.0, 0.0], "metrics": {"fd_digits_5k": value}}
        (run.folder / "eval/metrics.json").write_text(json.dumps([entry]))
        run.checkpoint.mkdir(parents=True)
        made = {**run.measurement, "nfe": 1, "num_samples": 1000}
        (run.folder / "agreement.json").write_text(json.dumps({"made": made, "share": 0.5 + seed / 10}))
        log = [{"raw_loss_r_equals_t": 9, "step": 1}, {"raw_loss_r_equals_t": 7, "step": 1500}, {"step": 1500}]
        beyond = {"raw_loss_r_equals_t": 1, "step": 1600}  # continued later
        (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*log, beyond])))
    of_meanflow, of_boundary = compare.rows_of(table)
    assert of_boundary[1:6] == ["96,000", "4.75", "0.128", "3.00 ± 1.00", ""]
    assert of_boundary[8:10] == ["60.0%", "7"] and of_meanflow[4:8] == ["", "", "", ""]
    (tmp_path / "methods.png").write_bytes(b"picture")
    compare.write_page(tmp_path, {"<T>": [["<b>", *of_boundary]]})
    page = (tmp_path / "methods.html").read_text()
    assert "<td>&lt;b&gt;</td>" in page and "&lt;T&gt;" in page and "data:image/png;base64,cGljdHVyZQ==" in page


def test_zhuyus_loss_is_asked_for_in_one_line(tmp_path):
    _, error = run_here("tools/study/compare.py", "--methods", "zhuyu", "--out", tmp_path, expect=2)
    assert error.count("\n") == 1 and "it is loss.py of github.com/zhuyu-cs/MeanFlow" in error

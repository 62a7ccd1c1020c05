"""The comparison of objectives: equal images, equal FLOPs, runs by their configs, and the table."""

import json
from argparse import Namespace

import compare
import pytest


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


def test_the_table_shows_mean_and_deviation_of_the_runs_of_that_config(tmp_path, overrides):
    methods = {method: compare.arguments(method, overrides, False) for method in ("meanflow", "boundary")}
    args = Namespace(out=tmp_path, seeds=3)
    for seed, value in enumerate((2.0, 3.0, 4.0)):
        entry = {"nfe": 1, "metrics": {"fd_x_5k": value}}
        folder = compare.folders(args, "boundary", methods["boundary"])[seed] / "eval"
        folder.mkdir(parents=True)
        swept = {"nfe": 1, "metrics": {"fd_x_5k": 99.0}, "sweep": True}  # no result
        (folder / "metrics.json").write_text(json.dumps([entry, swept]))
        (folder.parent / "agreement_nfe1.json").write_text(str(0.5 + seed / 10))
        log = [{"raw_loss_r_equals_t": 9}, {"raw_loss_r_equals_t": 7}, {"step": 3}]
        (folder.parent / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    lines = compare.table(args, methods).splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")][2:7] == ["96,000", "4.75", "0.128", "3.00 ± 1.00", ""]
    assert "| 60.0% | 7 |" in lines[-1] and "±" not in lines[-2]
    (tmp_path / "methods.png").write_bytes(b"picture")
    compare.write_page(tmp_path, {"<T>": [["<b>", *lines]]})
    page = (tmp_path / "methods.html").read_text()
    assert "<td>&lt;b&gt;</td>" in page and "&lt;T&gt;" in page and "data:image/png;base64,cGljdHVyZQ==" in page

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


def test_methods_differ_in_objective_alone(overrides):
    base = compare.resolved(compare.arguments(compare.BASE, overrides, False))
    for method in compare.METHODS:
        config = compare.resolved(compare.arguments(method, overrides, False))
        assert (config.optim, config.train, config.eval) == (base.optim, base.train, base.eval)
        assert (config.objective.omega, config.objective.kappa) == (base.objective.omega, base.objective.kappa)


def test_the_table_shows_mean_and_deviation_of_the_runs_of_that_config(tmp_path, overrides):
    methods = {method: compare.arguments(method, overrides, False) for method in ("meanflow", "boundary")}
    for seed, value in enumerate((2.0, 3.0, 4.0)):
        entry = {"nfe": 1, "metrics": {"fd_x_5k": value}}
        folder = compare.folder(tmp_path, methods["boundary"], seed) / "eval"
        folder.mkdir(parents=True)
        swept = {"nfe": 1, "metrics": {"fd_x_5k": 99.0}, "sweep": True}  # no result
        (folder / "metrics.json").write_text(json.dumps([entry, swept]))
    lines = compare.table(Namespace(out=tmp_path, seeds=3), methods).splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")][2:8] == ["96,000", "4.75", "0.128", "3.00 ± 1.00", "", ""]
    assert "±" not in lines[-2]

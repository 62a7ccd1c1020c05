"""Random numbers are a function of (seed, purpose, index) and nothing else."""

import numpy as np
from scipy import stats

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.runtime import rng

SHAPE = (4, 8, 8)
DRAWS = MeanFlowConfig().draws(SHAPE)


def test_the_same_index_gives_the_same_numbers_in_any_order():
    first = [rng.train_draws(5, slot, DRAWS) for slot in (0, 10**12, 3)]
    again = [rng.train_draws(5, slot, DRAWS) for slot in (3, 0, 10**12)]
    for (a, a_mirror), (b, b_mirror) in zip(first, [again[1], again[2], again[0]], strict=True):
        assert a_mirror == b_mirror and all(np.array_equal(a[name], b[name]) for name in DRAWS)


def test_a_row_draws_what_it_always_has():
    """Resumed runs continue with the same numbers: the stream of a slot, read here in its order."""
    drawn, mirror = rng.train_draws(5, 12, DRAWS)
    g = np.random.Generator(np.random.Philox(key=[5, 1], counter=[0, 12, 0, 0]))
    assert np.array_equal(drawn["time_normals"], g.standard_normal(2, dtype=np.float32))
    assert drawn["drop_uniforms"] == g.random(dtype=np.float32)
    noise = g.standard_normal((2, *SHAPE), dtype=np.float32)
    assert np.array_equal(drawn["posterior_noise"], noise[0]) and np.array_equal(drawn["e"], noise[1])
    assert mirror == (g.random() < 0.5)


def test_neighbours_seeds_and_purposes_are_independent():
    draws = [
        rng.train_draws(5, 7, DRAWS)[0]["e"],
        rng.train_draws(5, 8, DRAWS)[0]["e"],
        rng.train_draws(6, 7, DRAWS)[0]["e"],
        rng.sample_draw(5, 7, SHAPE, 10)[0][0],
        rng.train_draws(5, 7, DRAWS)[0]["posterior_noise"],
    ]
    correlation = np.corrcoef([d.ravel() for d in draws]) - np.eye(len(draws))
    assert abs(correlation).max() < 4.5 / np.sqrt(256)


def test_distributions():
    rows = [rng.train_draws(0, slot, DRAWS)[0] for slot in range(2000)]
    for values in (
        np.stack([r["posterior_noise"] for r in rows])[:, 0, 0],
        np.stack([r["e"] for r in rows])[:, 3, 7],
        np.stack([r["time_normals"] for r in rows]),
    ):
        assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest([float(r["drop_uniforms"]) for r in rows], "uniform").pvalue > 1e-3
    labels = [rng.sample_draw(0, i, (1, 1, 1), 10)[1] for i in range(5000)]
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    a, b, c = rng.order(0, 0, 1000), rng.order(0, 1, 1000), rng.order(1, 0, 1000)
    for order in (a, b, c):
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.array_equal(a, rng.order(0, 0, 1000))

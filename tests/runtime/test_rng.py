"""Random numbers are a function of (seed, purpose, index) and nothing else."""

import numpy as np
from scipy import stats

from mf_dist.runtime import rng

SHAPE = (4, 8, 8)


def test_the_same_index_gives_the_same_numbers_in_any_order():
    first = [rng.train_draws(5, slot, SHAPE) for slot in (0, 10**12, 3)]
    again = [rng.train_draws(5, slot, SHAPE) for slot in (3, 0, 10**12)]
    for a, b in zip(first, [again[1], again[2], again[0]], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_neighbours_seeds_and_purposes_are_independent():
    draws = [
        rng.train_draws(5, 7, SHAPE)[1],
        rng.train_draws(5, 8, SHAPE)[1],
        rng.train_draws(6, 7, SHAPE)[1],
        rng.sample_draw(5, 7, SHAPE, 10)[0],
        rng.train_draws(5, 7, SHAPE)[0],
    ]
    correlation = np.corrcoef([d.ravel() for d in draws]) - np.eye(len(draws))
    assert abs(correlation).max() < 4.5 / np.sqrt(256)


def test_distributions():
    rows = [rng.train_draws(0, slot, SHAPE) for slot in range(2000)]
    for values in (
        np.stack([r[0] for r in rows])[:, 0, 0],
        np.stack([r[1] for r in rows])[:, 3, 7],
        np.stack([r[2] for r in rows]),
    ):
        assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest([float(r[3]) for r in rows], "uniform").pvalue > 1e-3
    labels = [rng.sample_draw(0, i, (1, 1, 1), 10)[1] for i in range(5000)]
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    a, b, c = rng.order(0, 0, 1000), rng.order(0, 1, 1000), rng.order(1, 0, 1000)
    for order in (a, b, c):
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.array_equal(a, rng.order(0, 0, 1000))

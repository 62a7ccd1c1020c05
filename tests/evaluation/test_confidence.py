"""The 95 % band of a Frechet distance: how often it holds the expected value, and what it takes for noise."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from mf_dist.evaluation.confidence import GROUPS, allows_band, groups_of, jackknife, plus_minus, sum_of, sums_of_groups
from mf_dist.evaluation.during import TrainingEvaluation
from mf_dist.evaluation.statistics import Gaussian, exact_gaussian, frechet_distance


def expected_distance(draw, reference, trials):
    """Mean and standard error of the distance over many draws, each computed without the band's code."""
    distances = [frechet_distance(exact_gaussian([draw()], len(reference.mean)), reference) for _ in range(trials)]
    return np.mean(distances), np.std(distances) / np.sqrt(trials)


def coverage(d, count, shift, trials, seed=0):
    """Share of the bands that hold the expected distance at this count, and that distance. Features are Gaussian, with
    d eigenvalues from 0.3 to 2 against the reference's 1, so that the distance of the distributions is known."""
    g, reference = np.random.default_rng(seed), Gaussian(np.zeros(d), np.eye(d))
    root = np.linalg.qr(g.standard_normal((d, d)))[0] * np.sqrt(np.linspace(0.3, 2, d))

    def draw():
        return g.standard_normal((count, d)) @ root.T + shift

    expected, error = expected_distance(draw, reference, 3 * trials)
    known = d * shift**2 + ((np.sqrt(np.linspace(0.3, 2, d)) - 1) ** 2).sum()
    hits = 0
    for _ in range(trials):
        rows = draw()
        distance = frechet_distance(exact_gaussian([rows], d), reference)
        hits += abs(distance - expected) <= plus_minus(rows, 0, reference, distance)
    return hits / trials, expected, error, known


@pytest.mark.parametrize(
    ("d", "count", "shift"),
    [
        (8, 400, 0.5),
        (32, 400, 0.1),
        pytest.param(16, 2000, 0.3, marks=pytest.mark.dist),
        pytest.param(64, 1000, 0.2, marks=pytest.mark.dist),
    ],
)
def test_the_band_holds_the_expected_distance_at_this_count(d, count, shift):
    """In 90 to 99 % of 200 trials. The expected distance is above the distributions', where the band is not sought."""
    share, expected, error, known = coverage(d, count, shift, trials=200)
    print(f"{d} features, {count} samples: {known:.3f}, expected {expected:.3f} +- {error:.3f}, coverage {share:.1%}")
    assert 0.90 <= share <= 0.99 and expected > known + 5 * error


def test_a_linear_statistic_has_the_textbooks_interval():
    """For a mean the jackknife is exact: Student's t interval of the groups' means."""
    means = np.random.default_rng(0).standard_normal(GROUPS)
    without = (means.sum() - means) / (GROUPS - 1)
    low, high = stats.t.interval(0.95, GROUPS - 1, means.mean(), stats.sem(means))
    assert jackknife(means.mean(), without, np.full(GROUPS, 7)) == pytest.approx((high - low) / 2, rel=1e-12)


def test_bias_of_one_over_n_is_not_taken_for_noise_whatever_the_sizes():
    """values 5 + 300 / n have no noise; groups of unequal sizes change n by different amounts."""
    sizes = np.arange(10, 10 + GROUPS)
    n = sizes.sum()
    assert jackknife(5 + 300 / n, 5 + 300 / (n - sizes), sizes) == pytest.approx(0, abs=1e-9)


def test_few_samples_of_many_features_and_the_sums_of_more(monkeypatch):
    """Both ways of leaving a group out give the same band; fewer than 5 samples in a group give none."""
    g = np.random.default_rng(0)
    rows, reference = g.standard_normal((130, 40)), Gaussian(np.zeros(40), np.eye(40))
    distance = frechet_distance(exact_gaussian([rows], 40), reference)
    by_sums = plus_minus(rows, 0, reference, distance)
    monkeypatch.setattr("mf_dist.evaluation.confidence.has_band", lambda *_: False)
    assert plus_minus(rows, 0, reference, distance) == pytest.approx(by_sums, rel=1e-6) and by_sums > 0
    assert plus_minus(rows[:99], 0, reference, distance) is None
    parts = list(sums_of_groups(rows, groups_of(130, 0), np.ones(40)))
    whole = sum_of(parts).gaussian()
    np.testing.assert_allclose(whole.covariance, np.cov(rows.T), atol=1e-12)
    kept = rows[groups_of(130, 0) != 3]
    rest = sum_of(parts).plus(parts[3], -1).gaussian()
    np.testing.assert_allclose(rest.mean, kept.mean(0), atol=1e-12)
    np.testing.assert_allclose(rest.covariance, np.cov(kept.T), atol=1e-12)


@pytest.mark.parametrize("cycle", [0, 1, 10, 19, 1000])
def test_groups_have_equal_sizes_and_each_class_in_turn(cycle):
    groups = groups_of(20 * max(cycle, 50), cycle)
    assert np.ptp(np.bincount(groups, minlength=GROUPS)) <= (2 if cycle == 19 else 0)  # 1000 is no multiple of 19
    if cycle:
        classes = np.arange(len(groups)) % cycle
        counts = [np.bincount(groups[classes == c], minlength=GROUPS) for c in range(cycle)]
        assert max(map(np.ptp, counts)) <= 1


def test_balanced_classes_do_not_count_as_noise():
    """Classes far apart: where they take turns the distance hardly varies, and the band says so; dealt at random, the
    same samples have a band wider than that."""
    g, reference = np.random.default_rng(0), Gaussian(np.zeros(4), np.eye(4))
    centres = 5 * g.standard_normal((10, 4))

    def draw():
        return centres[np.arange(1000) % 10] + g.standard_normal((1000, 4))

    def distance(rows):
        return frechet_distance(exact_gaussian([rows], 4), reference)

    spread = np.std([distance(draw()) for _ in range(100)])
    rows = draw()
    turns, random = (plus_minus(rows, cycle, reference, distance(rows)) for cycle in (10, 0))
    assert turns == pytest.approx(2.09 * spread, rel=0.5) and random > 1.5 * turns


@pytest.mark.parametrize(("per_class", "low", "high"), [(1, 1.25, 1.8), (5, 1.05, 1.4), (20, 0.8, 1.2)])
def test_too_wide_for_few_images_per_class(per_class, low, high):
    """What the band implies over the real spread, of 200 classes as different as the images of one: balanced labels
    leave the classes out of the noise, but groups have all classes from 20 images each on. docs/evaluation.md says
    so."""
    g, reference = np.random.default_rng(0), Gaussian(np.zeros(8), 2 * np.eye(8))
    centres = g.standard_normal((200, 8))
    distances, widths = [], []
    for _ in range(200):
        rows = np.tile(centres, (per_class, 1)) + g.standard_normal((200 * per_class, 8))
        distances.append(frechet_distance(exact_gaussian([rows], 8), reference))
        widths.append(plus_minus(rows, 200, reference, distances[-1]))
    assert low < np.mean(widths) / 2.093 / np.std(distances, ddof=1) < high


def test_fewer_images_than_classes_have_no_band():
    """Where classes take turns, some groups would have none."""
    assert [allows_band(*case) for case in ((99, 0), (100, 0), (900, 1000), (1000, 1000))] == [False, True, False, True]
    assert plus_minus(np.zeros((900, 4)), 1000, Gaussian(np.zeros(4), np.eye(4)), 4.0) is None


@pytest.mark.parametrize(
    ("features", "samples", "ranks", "expected"),
    [
        (64, 1000, 1, True),
        (64, 64, 1, False),
        (2048, 10_000, 6, False),
        (2048, 10_000, 7, True),
        (2048, 2100, 8, False),
    ],
)
def test_training_has_a_band_where_it_is_cheap(features, samples, ranks, expected):
    run = SimpleNamespace(network=SimpleNamespace(dimension=features), ranks=SimpleNamespace(world_size=ranks))
    assert TrainingEvaluation._has_band(run, np.bincount(groups_of(samples, 0))) is expected


@pytest.mark.parametrize(("count", "cycle"), [(100, 10), (100, 3), (100, 7), (1000, 1000), (5000, 1000), (150, 0)])
def test_no_group_is_empty(count, cycle):
    sizes = np.bincount(groups_of(count, cycle), minlength=GROUPS)
    assert sizes.min() > 0 and sizes.max() <= 2 * sizes.min()

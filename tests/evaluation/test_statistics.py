"""Frechet distances against closed forms, scipy and torch-fidelity; sums against numpy."""

import numpy as np
import pytest
from scipy import linalg

from mf_dist.evaluation.statistics import FeatureSums, Gaussian, exact_gaussian, frechet_distance
from mf_dist.runtime.errors import UserError


def random_gaussian(seed, d=12, rank=None):
    g = np.random.default_rng(seed)
    a = g.standard_normal((d, rank or 2 * d))
    return Gaussian(g.standard_normal(d), a @ a.T / d)


def by_sqrtm(a, b):
    root = linalg.sqrtm(a.covariance @ b.covariance)
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)


def test_closed_form_of_commuting_covariances():
    a = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.ones(3), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4, abs=1e-12)
    zero = np.zeros((3, 3))
    assert frechet_distance(Gaussian(a.mean, zero), Gaussian(b.mean, zero)) == 3


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_matrix_square_root_and_torch_fidelity(seed):
    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = random_gaussian(seed), random_gaussian(seed + 100)
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    pair = ({"mu": x.mean, "sigma": x.covariance} for x in (a, b))
    assert distance == pytest.approx(
        fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"], rel=1e-9
    )
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-9


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("decades", [0, 4, 8])
def test_known_spectra_of_any_size_and_steepness(scale, decades):
    """Covariances that share eigenvectors, shifted far from zero: the distance follows from the eigenvalues.
    At 8 decades the eigenvalues of the product span 16, more than a double holds."""
    g, d = np.random.default_rng(0), 100
    q, _ = np.linalg.qr(g.standard_normal((d, d)))
    one = scale**2 * 10 ** (-decades * np.linspace(0, 1, d))
    two = one * np.exp(0.3 * g.standard_normal(d))
    a, b = ((q * values) @ q.T for values in (one, two))
    exact = ((np.sqrt(one) - np.sqrt(two)) ** 2).sum() + d * (0.5 * scale) ** 2
    mean = np.full(d, 1e3 * scale)
    distance = frechet_distance(Gaussian(mean, (a + a.T) / 2), Gaussian(mean + 0.5 * scale, (b + b.T) / 2))
    assert distance == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("ranks", [(5, 24), (24, 5), (5, 4), (1, 1), (12, 12), (11, 30)])
def test_singular_covariances(ranks, scale):
    """Against the nuclear norm of A^T B, exact for covariances A A^T, B B^T of any rank."""
    g = np.random.default_rng(0)
    a, b = (scale * g.standard_normal((12, rank)) for rank in ranks)
    exact = np.trace(a @ a.T) + np.trace(b @ b.T) - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    zero = np.zeros(12)
    assert frechet_distance(Gaussian(zero, a @ a.T), Gaussian(zero, b @ b.T)) == pytest.approx(exact, rel=1e-8)


def test_rounding_errors_of_a_singular_covariance_do_not_add_up():
    """30 samples of 300 features against themselves shifted by 1 in every feature: 300 exactly. Square roots of
    the 270 eigenvalues that are rounding errors would add 1e-6 and more."""
    rows = np.random.default_rng(0).standard_normal((30, 300))
    a, b = (exact_gaussian([part], 300) for part in (rows, rows + 1))
    bare = [Gaussian(x.mean, x.covariance) for x in (a, b)]
    assert a.factor.shape == (300, 30)
    for one, other in ((a, b), (a, bare[1]), (bare[0], b), bare):
        assert frechet_distance(one, other) == pytest.approx(300, rel=1e-8)


def test_sums_and_exact_gaussian_equal_numpy_with_a_large_mean():
    features = (np.random.default_rng(0).standard_normal((1000, 6)) * 0.01 + 1e4).astype(np.float32)
    parts = np.array_split(features, [1, 17, 400])
    sums = [FeatureSums(features[:3].mean(0, dtype=np.float64)) for _ in range(2)]
    for number, part in enumerate(parts):
        sums[number % 2].add(part)
    sums[0].set_flat(sums[0].flat() + sums[1].flat())  # as in the reduction over processes
    for gaussian in (sums[0].gaussian(), exact_gaussian(parts, 6)):
        np.testing.assert_allclose(gaussian.mean, features.mean(0, dtype=np.float64), rtol=1e-14)
        np.testing.assert_allclose(gaussian.covariance, np.cov(features.astype(np.float64).T), rtol=1e-10, atol=1e-14)


def test_too_few_images():
    with pytest.raises(UserError, match="at least 2"):
        FeatureSums(np.zeros(3)).gaussian()
    with pytest.raises(UserError, match="at least 2"):
        exact_gaussian([np.ones((1, 3))], 3)

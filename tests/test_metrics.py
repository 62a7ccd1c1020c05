"""Frechet distances against closed forms and scipy, streaming statistics against numpy."""

import numpy as np
import pytest
from mf_dist.metrics import FeatureStatistics, Gaussian, frechet_distance, read_statistics
from scipy import linalg

from mf_dist.errors import UserError


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


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_matrix_square_root(seed):
    a, b = random_gaussian(seed), random_gaussian(seed + 100)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-9


@pytest.mark.parametrize(("rank_a", "rank_b"), [(5, None), (None, 5), (5, 4)])
def test_singular_covariances(rank_a, rank_b):
    """Against the nuclear norm of A^T B, exact for covariances A A^T, B B^T of any rank."""
    g = np.random.default_rng(0)
    a, b = g.standard_normal((12, rank_a or 24)), g.standard_normal((12, rank_b or 24))
    exact = np.trace(a @ a.T) + np.trace(b @ b.T) - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    zero = np.zeros(12)
    assert frechet_distance(Gaussian(zero, a @ a.T), Gaussian(zero, b @ b.T)) == pytest.approx(exact, rel=1e-6)


def test_streaming_equals_numpy_even_with_a_large_mean():
    features = np.random.default_rng(0).standard_normal((1000, 6)) * 0.01 + 1e4
    statistics = FeatureStatistics()
    for part in np.array_split(features, [1, 17, 400]):
        statistics.add(part)
    gaussian = statistics.gaussian()
    np.testing.assert_allclose(gaussian.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.T), rtol=1e-8, atol=1e-14)


def test_too_few_images():
    statistics = FeatureStatistics()
    with pytest.raises(UserError, match="at least 2"):
        statistics.gaussian()


def test_reference_files(tmp_path):
    good = random_gaussian(0, 4)
    np.savez(tmp_path / "good.npz", mu=good.mean, sigma=good.covariance)
    assert np.array_equal(read_statistics(tmp_path / "good.npz", 4).mean, good.mean)
    cases = {
        "missing": {"mu": good.mean},
        "shape": {"mu": good.mean[:3], "sigma": good.covariance},
        "finite": {"mu": good.mean * np.nan, "sigma": good.covariance},
        "symmetric": {"mu": good.mean, "sigma": np.triu(good.covariance)},
        "pickle": {"mu": np.array([object()] * 4), "sigma": good.covariance},
    }
    for name, arrays in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match="reference"):
            read_statistics(tmp_path / f"{name}.npz", 4)
    whole = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "plain.npy", good.mean)
    for raw in (b"garbage", b"", whole[:-30], (tmp_path / "plain.npy").read_bytes()):
        (tmp_path / "broken.npz").write_bytes(raw)
        with pytest.raises(UserError, match="cannot read"):
            read_statistics(tmp_path / "broken.npz", 4)

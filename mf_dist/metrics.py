"""Frechet distance between feature sets: streaming fp64 statistics, no matrix square root of a product."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from mf_dist.errors import UserError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of features, fp64."""

    mean: Array
    covariance: Array

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()


class FeatureStatistics:
    """Running sums of features around a fixed shift (the first batch's mean): fp64, one pass, exact to rounding."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: npt.NDArray[Any]) -> None:
        """features (B, D)."""
        wide = np.asarray(features, np.float64)
        if self.count == 0:
            self.shift = wide.mean(axis=0)
            self.total = np.zeros(wide.shape[1])
            self.products = np.zeros((wide.shape[1], wide.shape[1]))
        centred = wide - self.shift
        self.count += len(wide)
        self.total += centred.sum(axis=0)
        self.products += centred.T @ centred

    def gaussian(self) -> Gaussian:
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean + self.shift, covariance)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) (arXiv 1706.08500).

    With B = R R^T, tr((A B)^(1/2)) is the sum of the roots of the eigenvalues of the symmetric R^T A R, which is
    stable for singular A too; R is b's Cholesky factor, or its eigenvalue root where b is singular."""
    try:
        root = linalg.cholesky(b.covariance, lower=True)
    except linalg.LinAlgError:
        values, vectors = linalg.eigh(b.covariance)
        root = vectors * np.sqrt(values.clip(min=0))
    eigenvalues = linalg.eigvalsh(root.T @ a.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + trace)


def read_statistics(path: Path, dimension: int) -> Gaussian:
    """`mu` and `sigma` of an .npz; UserError unless finite, symmetric and of the features' dimension."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read reference statistics {str(path)!r}: {error}; expected arrays mu, sigma") from None
    if mean.shape != (dimension,) or covariance.shape != (dimension, dimension):
        raise UserError(
            f"reference {str(path)!r} has shapes {mean.shape}, {covariance.shape}; these features need "
            f"({dimension},), ({dimension}, {dimension})"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and np.allclose(covariance, covariance.T)):
        raise UserError(f"reference {str(path)!r} is not a finite mean and a symmetric covariance")
    return Gaussian(mean, covariance)

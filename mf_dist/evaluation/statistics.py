"""Gaussians of feature sets and the Frechet distance between them, in float64.

Sums are centred on a fixed shift, so that a large mean loses no digits. No matrix root of a product is computed: it is
slow, and for a singular covariance the last half of its digits is wrong.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from mf_dist.runtime.errors import UserError

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[Any]
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of features, fp64."""

    mean: Array
    covariance: Array
    factor: Array | None = field(default=None, repr=False)
    """(D, n) with factor factor^T = covariance, if computed from n <= D rows: keeps the digits that squaring loses."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()

    @cached_property
    def cholesky(self) -> Array | None:
        """Lower triangular L with L L^T = covariance; None if it is singular, also if only rounding errors made its
        pivots positive. Computed once for all distances to a reference."""
        try:
            factor: Array = linalg.cholesky(self.covariance, lower=True)
        except linalg.LinAlgError:
            return None
        return factor if positive(np.diag(factor) ** 2).all() else None


ROWS_PER_PRODUCT = 1000
"""Rows per matrix product: a product of few rows costs as much as reading and writing all of D x D."""


class FeatureSums:
    """Count, sum and sum of products of rows (B, D) around a fixed shift (D,), fp64."""

    def __init__(self, shift: Array) -> None:
        self.shift, self.count = shift, 0
        self.total, self.products = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
        self._pending: list[Rows] = []

    def add(self, rows: Rows) -> None:
        self._pending.append(rows)
        self.count += len(rows)
        if sum(map(len, self._pending)) >= ROWS_PER_PRODUCT:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            centred = np.concatenate(self._pending).astype(np.float64) - self.shift
            self._pending = []
            self.total += centred.sum(axis=0)
            self.products += centred.T @ centred

    def flat(self) -> Array:
        """All sums in one array, for a single reduction over processes."""
        self._flush()
        return np.concatenate([[float(self.count)], self.total, self.products.ravel()])

    def set_flat(self, sums: Array) -> None:
        d, self._pending = len(self.shift), []
        self.count, self.total = int(sums[0]), sums[1 : d + 1]
        self.products = sums[d + 1 :].reshape(d, d)

    def plus(self, other: "FeatureSums", sign: int = 1) -> "FeatureSums":
        """The sums of the rows of both, or with sign -1 of the rows that are not in `other`; of one shift."""
        both = FeatureSums(self.shift)
        both.set_flat(self.flat() + sign * other.flat())
        return both

    def gaussian(self) -> Gaussian:
        self._flush()
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean + self.shift, (covariance + covariance.T) / 2)


def exact_gaussian(parts: Iterable[Rows], dimension: int) -> Gaussian:
    """Two passes over `parts`, rows (B, D) in a fixed order, so the bits do not depend on which process computed them.
    `parts` is iterated twice."""
    total, count = np.zeros(dimension), 0
    for rows in parts:
        total += rows.sum(axis=0, dtype=np.float64)
        count += len(rows)
    sums, kept = FeatureSums(total / max(1, count)), []
    for rows in parts:
        sums.add(rows)
        if count <= dimension:
            kept.append(rows)
    gaussian = sums.gaussian()
    if not kept:
        return gaussian
    factor = (np.concatenate(kept).astype(np.float64) - gaussian.mean).T / np.sqrt(count - 1)
    return Gaussian(gaussian.mean, gaussian.covariance, factor)


def frechet_distance(a: Gaussian, b: Gaussian, accuracy: float = 1e-9) -> float:
    """|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) (arXiv 1706.08500). accuracy: relative, of the last trace; a
    coarser one spares a steep spectrum the slower of two ways."""
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * _trace_of_root(a, b, accuracy)
    difference = a.mean - b.mean
    return float(difference @ difference + trace)


def _trace_of_root(a: Gaussian, b: Gaussian, accuracy: float) -> float:
    """tr((A B)^(1/2)). With B = R R^T it is the sum of the roots of the eigenvalues of the symmetric R^T A R, and with
    A = F F^T the nuclear norm of F^T R. The first is several times as fast, with R the Cholesky factor of a side that
    has one, but its small eigenvalues are exact only to eps times the largest. The second is used if that affects the
    sum, and for few samples."""
    if a.factor is None and b.factor is None:
        factor, other = b.cholesky, a
        if factor is None:
            factor, other = a.cholesky, b
        if factor is not None:
            values = positive(linalg.eigvalsh(factor.T @ other.covariance @ factor, overwrite_a=True))
            roots = np.sqrt(values)
            if roots.all() and EPS * values.max() * (1 / roots).sum() <= accuracy * roots.sum():
                return float(roots.sum())
    return float(linalg.svdvals(_root(a).T @ _root(b), overwrite_a=True).sum())


def _root(gaussian: Gaussian) -> Array:
    """(D, rank) with root root^T = covariance."""
    if gaussian.factor is not None:
        return gaussian.factor
    if gaussian.cholesky is not None:
        return gaussian.cholesky
    values, vectors = linalg.eigh(gaussian.covariance)
    kept = positive(values) > 0
    return vectors[:, kept] * np.sqrt(values[kept])  # type: ignore[no-any-return]


def positive(values: Array) -> Array:
    """Eigenvalues, with rounding errors (those below d eps max) set to zero: their roots would add up."""
    largest = values.max(initial=0.0)
    return np.where(values > len(values) * EPS * largest, values, 0.0)

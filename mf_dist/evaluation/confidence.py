"""How certain a Frechet distance is: its band at 95 %, from the samples it was computed from.

The distance D of n samples is a random number. Its expected value E[D_n] is larger than the distance of the
distributions, by about c / n. The band D +- w is for E[D_n], the mean over many draws of n samples, not for n ->
infinity: values of the same n are compared, and their common bias is left as it is.

w is the delete-a-group jackknife's (Busing, Meijer, van der Leeden, Statistics and Computing 9, 1999): with m_j samples
in group j, D_(j) the distance without them, and pseudo-values P_j = (n D - (n - m_j) D_(j)) / m_j,

    variance = mean over j of m_j / (n - m_j) (P_j - P)^2,   P = sum over j of m_j / n P_j

A bias of c / n adds the same to all P_j, whatever the m_j, so it is not taken for noise. The reference is taken as
exact.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from mf_dist.evaluation.statistics import Array, FeatureSums, Gaussian, Rows, exact_gaussian, frechet_distance

GROUPS = 20
MIN_COUNT = 5 * GROUPS
"""Fewer samples have no band; nor have those of classes that take turns, if they leave a group without any."""
ACCURACY = 1e-6
"""Of the distances D_(j): far below their differences, which are about w / GROUPS."""
Groups = npt.NDArray[np.int64]


def groups_of(count: int, cycle: int) -> Groups:
    """The group (count,) of each sample, a number below GROUPS; sizes differ by few.

    Samples are dealt at random (always alike), whatever their order in a file. Where classes take turns, image i of
    class i mod cycle, each class goes to all groups in turn: else the differences between classes, which such samples
    leave out of the noise, would enter it again."""
    i = np.arange(count)
    if cycle:
        return (i // cycle + i % cycle * GROUPS // cycle) % GROUPS  # evenly, also where a class has few samples
    return np.random.Generator(np.random.Philox(0)).permutation(count) % GROUPS


def allows_band(count: int, cycle: int) -> bool:
    """Whether samples have a band: enough of them, and every group has some."""
    return count >= MIN_COUNT and bool(np.bincount(groups_of(count, cycle), minlength=GROUPS).min())


def has_band(sizes: Groups, dimension: int) -> bool:
    """Whether a band is computed from sums, which needs covariances of full rank. sizes: of the groups."""
    return bool(sizes.sum() >= MIN_COUNT and sizes.min() > 0 and sizes.sum() - sizes.max() > dimension)


def sums_of_groups(rows: Rows, groups: Groups, shift: Array) -> Iterator[FeatureSums]:
    """The sums of each group's rows (n, D), in order."""
    for group in range(GROUPS):
        sums = FeatureSums(shift)
        sums.add(rows[groups == group])
        yield sums


def plus_minus(rows: Rows, cycle: int, reference: Gaussian, distance: float) -> float | None:
    """Half the width of the 95 % band of the expected distance at this count; None unless allows_band. rows: the
    samples' features (n, D); cycle: see groups_of; distance: D."""
    count, dimension = rows.shape
    if not allows_band(count, cycle):
        return None
    groups = groups_of(count, cycle)
    sizes = np.bincount(groups, minlength=GROUPS)
    if has_band(sizes, dimension):
        parts = list(sums_of_groups(rows, groups, reference.mean))
        total = sum_of(parts)
        rests = (total.plus(part, -1).gaussian() for part in parts)
    else:  # too few for a covariance of full rank: its factor, the rows themselves, is faster and more exact
        rests = (exact_gaussian([rows[groups != group]], dimension) for group in range(GROUPS))
    return jackknife(distance, [frechet_distance(rest, reference, ACCURACY) for rest in rests], sizes)


def sum_of(parts: Sequence[FeatureSums]) -> FeatureSums:
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total


def jackknife(value: float, without: Sequence[float], sizes: Groups) -> float:
    """Half the width of the 95 % band, by Student's t. value: of all samples; without: of all but those of group j;
    sizes: of the groups."""
    share = sizes / sizes.sum()
    pseudo = (value - (1 - share) * np.array(without)) / share
    variance = (share / (1 - share) * (pseudo - share @ pseudo) ** 2).mean()
    return float(stdtrit(len(sizes) - 1, 0.975)) * math.sqrt(variance)

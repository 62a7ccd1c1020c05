"""Times what follows the networks: statistics of features and the Frechet distance, beside scipy's matrix root.

    python tools/bench_metrics.py                       # 50,000 features of 2048, the sizes of an FID
    python tools/bench_metrics.py --count 5000 --dimension 512 --rounds 1

Features are normal with a spectrum that falls by --decades powers of ten, as real ones do: the steeper, the fewer
digits plain formulas keep. Prints seconds of each part (and, since another job may share the machine, the seconds of
processor time), the distances and their relative differences, and the peak memory before the peers ran.
"""

import argparse
import resource
import sys
import time

from mf_dist.errors import UserError, command_line


def features(count, dimension, decades, seed):
    """(N, D) fp32 rows with eigenvalues from 1 down to 10^-decades in a random basis."""
    import numpy as np

    g = np.random.default_rng(0)
    basis, _ = np.linalg.qr(g.standard_normal((dimension, dimension), np.float32))
    root = basis * np.sqrt(10 ** (-decades * np.linspace(0, 1, dimension, dtype=np.float32)))
    g = np.random.default_rng(seed)
    rows = np.empty((count, dimension), np.float32)
    for first in range(0, count, 5000):
        part = rows[first : first + 5000]
        part[:] = g.standard_normal(part.shape, np.float32) @ root.T + 0.01 * seed
    return rows


def timed(call):
    """The result, seconds on the wall clock, and seconds of processor time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peers():
    """name -> distance of two Gaussians by the formulas of the published evaluators."""
    import numpy as np
    from scipy import linalg

    from mf_dist.torchvision_repair import repair_torchvision

    repair_torchvision()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    def rest(a, b):
        return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance))

    def by_sqrtm(a, b):
        return rest(a, b) - 2 * float(np.trace(linalg.sqrtm(a.covariance @ b.covariance)).real)

    def by_eigvals(a, b):
        pair = ({"mu": x.mean, "sigma": x.covariance} for x in (a, b))
        return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]

    return {"scipy sqrtm": by_sqrtm, "torch-fidelity": by_eigvals}


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--count", type=int, default=50_000, help="feature vectors (default 50000)")
    parser.add_argument("--dimension", type=int, default=2048, help="their length (default 2048)")
    parser.add_argument("--decades", type=float, default=4.0, help="that the spectrum falls by (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="of the distances, interleaved (default 3)")
    args = parser.parse_args()
    if args.count < 2 or args.dimension < 1 or args.rounds < 1 or args.decades < 0:
        raise UserError("--count must be at least 2, --dimension and --rounds at least 1, --decades at least 0")
    from mf_dist.evaluation.statistics import exact_gaussian, frechet_distance

    one = measure(args)
    rows = features(max(args.dimension * 2, 1000), args.dimension, args.decades, 2)
    other = exact_gaussian([rows], args.dimension)
    compare({"ours": frechet_distance, **peers()}, one, other, args.rounds)


def measure(args):
    """Statistics of --count features, and a distance; prints what they took."""
    from mf_dist.evaluation.statistics import exact_gaussian, frechet_distance

    rows = features(args.count, args.dimension, args.decades, 1)
    parts = [rows[first : first + 50] for first in range(0, args.count, 50)]
    one, *first = timed(lambda: exact_gaussian(parts, args.dimension))
    _, *second = timed(lambda: frechet_distance(one, one))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.count} features of {args.dimension}, spectrum over {args.decades:g} decades")
    for name, wall, cpu in (
        ("statistics", *first),
        ("distance", *second),
        ("together", *map(sum, zip(first, second, strict=True))),
    ):
        print(f"{name:12}{wall:8.2f} s, {cpu:.2f} s of processor time")
    print(f"peak memory {peak:.2f} GiB, the features' own {rows.nbytes / 2**30:.2f} GiB among them")
    return one


def compare(methods, one, other, rounds):
    times, values = {name: [] for name in methods}, {}
    for _ in range(rounds):
        for name, method in methods.items():
            values[name], *seconds = timed(lambda method=method: method(one, other))
            times[name].append(seconds)
    wall, cpu = ({name: sorted(pair[i] for pair in times[name]) for name in methods} for i in (0, 1))
    half = rounds // 2
    print(f"{'distance by':16}{'seconds':>9}{'range':>15}{'cpu s':>8}{'x wall':>8}{'x cpu':>7}{'value':>14}{'off':>10}")
    for name in methods:
        spread = f"{wall[name][0]:.2f}-{wall[name][-1]:.2f}"
        ratios = f"{wall[name][half] / wall['ours'][half]:8.1f}{cpu[name][half] / cpu['ours'][half]:7.1f}"
        print(f"{name:16}{wall[name][half]:9.2f}{spread:>15}{cpu[name][half]:8.2f}{ratios}{values[name]:14.8f}"
              f"{values[name] / values['ours'] - 1:10.1e}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

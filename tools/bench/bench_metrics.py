"""Times feature statistics and the Frechet distance, against scipy's matrix square root and torch-fidelity.

    python tools/bench/bench_metrics.py                       # 50,000 features of 2048, the sizes of an FID
    python tools/bench/bench_metrics.py --count 5000 --dimension 512 --rounds 1

Features are normal with a spectrum that falls by some powers of ten, as that of real ones does. Three cases, since the
distance is computed differently in each: 4 decades; 8, where plain formulas lose digits; and fewer samples than
features. All methods use the same number of threads, and rounds are interleaved. Prints seconds of each part (and,
since another job may share the machine, the processor time), the distances and their relative differences, and the
peak memory before the peers ran.
"""

import argparse
import os
import resource
import statistics
import sys
import time

from mf_dist.runtime.errors import UserError, command_line


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

    from mf_dist.runtime.torchvision_repair import repair_torchvision

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
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the distances, interleaved (default 3)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of every method (default 1, as in tools/fid_eval.py)"
    )
    args = parser.parse_args()
    if args.count < 2 or args.dimension < 4 or args.rounds < 1 or args.threads < 1:
        raise UserError("--count must be at least 2, --dimension at least 4, --rounds and --threads at least 1")
    from threadpoolctl import threadpool_limits

    from mf_dist.evaluation.statistics import exact_gaussian, frechet_distance

    def gaussian(count, decades, seed):
        return exact_gaussian([features(count, args.dimension, decades, seed)], args.dimension)

    methods, many = {"ours": frechet_distance, **peers()}, args.dimension * 2
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {args.threads} threads", flush=True)
    with threadpool_limits(args.threads):
        flat = measure(args)
        compare("4 decades", methods, flat, gaussian(many, 4, 2), args.rounds)
        compare("8 decades", methods, gaussian(many, 8, 1), gaussian(many, 8, 2), args.rounds)
        compare(f"{args.dimension // 2} samples", methods, gaussian(args.dimension // 2, 4, 1), flat, args.rounds)


def measure(args):
    """The statistics of --count features; prints the time of these, of a distance, and the peak memory."""
    from mf_dist.evaluation.statistics import exact_gaussian, frechet_distance

    rows = features(args.count, args.dimension, 4, 1)
    parts = [rows[first : first + 50] for first in range(0, args.count, 50)]
    gaussian, *first = timed(lambda: exact_gaussian(parts, args.dimension))
    _, *second = timed(lambda: frechet_distance(gaussian, gaussian))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.count} features of {args.dimension}, spectrum over 4 decades")
    for name, wall, cpu in (
        ("statistics", *first),
        ("distance", *second),
        ("together", *map(sum, zip(first, second, strict=True))),
    ):
        print(f"{name:12}{wall:8.2f} s, {cpu:.2f} s of processor time")
    print(f"peak memory {peak:.2f} GiB, of which features {rows.nbytes / 2**30:.2f} GiB", flush=True)
    return gaussian


def compare(case, methods, a, b, rounds):
    times, values = {name: [] for name in methods}, {}
    for _ in range(rounds):
        for name, method in methods.items():
            values[name], *seconds = timed(lambda method=method: method(a, b))
            times[name].append(seconds)
    wall, cpu = ({name: sorted(pair[i] for pair in times[name]) for name in methods} for i in (0, 1))
    print(f"{case:16}{'seconds':>9}{'range':>15}{'cpu s':>8}{'x wall':>8}{'x cpu':>7}{'value':>14}{'off':>10}")
    for name in methods:
        middle = [statistics.median(part[name]) for part in (wall, cpu)]
        ratios = [
            part / statistics.median(ours) for part, ours in zip(middle, (wall["ours"], cpu["ours"]), strict=True)
        ]
        spread = f"{wall[name][0]:.2f}-{wall[name][-1]:.2f}"
        print(
            f"{name:16}{middle[0]:9.2f}{spread:>15}{middle[1]:8.2f}{ratios[0]:8.1f}{ratios[1]:7.1f}"
            f"{values[name]:14.8f}{values[name] / values['ours'] - 1:10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())

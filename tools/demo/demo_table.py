"""Prints the demo's results side by side: two trained runs and real images.

    python tools/demo/demo_table.py --run runs/digits --flow runs/digits_flow --real runs/digits_real

Reads each folder's metrics. "SVC" is scikit-learn's classifier trained on the real 8x8 digits: the share of
one-step samples that it assigns to their label.
"""

import argparse
import json
import sys

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.paths import expanded_path


def lines(path):
    """The lines of metrics.jsonl that training wrote."""
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [entry for entry in entries if "seconds_per_step" in entry]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from None


def result(folder, nfe):
    """The newest entry of metrics.json at `nfe` steps (None for a folder of images), and its Frechet distance as (name,
    value)."""
    try:
        entries = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        entry = [entry for entry in entries if entry.get("nfe") == nfe and not entry.get("sweep")][-1]
        return entry, next(pair for pair in entry["metrics"].items() if pair[0].startswith(("fid", "fd_")))
    except (OSError, ValueError, IndexError, KeyError, StopIteration) as error:
        raise UserError(f"no result at {nfe} steps in {str(folder)!r} ({error}); run tools/fid_eval.py first") from None


def svc_agreement(npz):
    """Share of samples (N, 32, 32, 3) that an SVC trained on the real 8x8 digits assigns to their label."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    try:
        with np.load(npz, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read samples {str(npz)!r}: {error}") from None
    digits = load_digits()
    small = images.mean(axis=3).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)) * (16 / 255)
    return float((SVC().fit(digits.data, digits.target).predict(small.reshape(-1, 64)) == labels).mean())


def run_rows(name, run, nfes, real, flow):
    """Table rows of one trained run."""
    log = lines(run / "metrics.jsonl")
    seconds = sum(
        b["step"] * b["seconds_per_step"] - a["step"] * b["seconds_per_step"]
        for a, b in zip([{"step": 0}, *log], log, strict=False)
    )
    raw = "".join(
        f" {log[-1][key]:7.1f}" if log[-1][key] is not None else "       -"
        for key in ("raw_loss_r_equals_t", "raw_loss_r_below_t")
    )
    speed = log[-1]["samples_seen"] / seconds
    for nfe in nfes:
        _, (_, value) = result(run / "eval", nfe)
        times = f"{three_digits(seconds):>8}{three_digits(speed):>8}"
        yield f"{name:15}{nfe:6}{times}{raw}{value:14.2f}{value / real:8.2f}{value / flow:8.2f}"


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=expanded_path, required=True, help="MeanFlow run, measured at 1 and 2 steps")
    parser.add_argument("--flow", type=expanded_path, required=True, help="flow-matching run, measured at 50 steps")
    parser.add_argument("--real", type=expanded_path, required=True, help="folder of the real-vs-real metrics.json")
    parser.add_argument("--min-svc", type=float, default=0.0, help="exit with an error below this share, such as 0.95")
    args = parser.parse_args()
    (entry, (metric, real)), (_, (_, flow)) = result(args.real, None), result(args.flow / "eval", 50)
    heads = ("steps", 6), ("train s", 8), ("img/s", 8), ("raw r=t", 8), ("raw r<t", 8), (metric, 14)
    print("\n" + " " * 15 + "".join(f"{head:>{width}}" for head, width in (*heads, ("x real", 8), ("x flow", 8))))
    for name, run, nfes in (("MeanFlow", args.run, (1, 2)), ("flow matching", args.flow, (50,))):
        for row in run_rows(name, run, nfes, real, flow):
            print(row)
    print(f"{'real images':15}{'':38}{real:14.2f}{1:8.2f}{real / flow:8.2f}")
    agreement = svc_agreement(args.run / "eval" / "samples_nfe1.npz")
    print(
        f"\n{entry['num_samples']} images each against the same {entry['reference_images']} real ones. "
        f"SVC agrees with the label of {agreement:.1%} of the one-step samples."
    )
    print(f"look at: {args.run / 'eval' / 'grid_nfe1.png'}\nrun:     {args.run}")
    if agreement < args.min_svc:
        raise UserError(
            f"the SVC agrees with {agreement:.1%} of the samples, below {args.min_svc:.0%}: the model did not learn"
        )


if __name__ == "__main__":
    sys.exit(main())

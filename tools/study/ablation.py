"""The paper's ablation at small scale: trains six configurations with several seeds and compares their metrics.

    python tools/study/ablation.py                       # configs/fashion_cpu.yaml into runs/fashion, two at a time
    python tools/study/ablation.py --seeds 1 --jobs 1 train.total_images=6400 --out runs/fashion-try

Each run trains and is measured in its own folder, named by the configuration, the seed and a hash of what it is trained
with, with its output in log.txt there. The same command continues where it stopped. Writes OUT/ablation.md (mean and
standard deviation over the seeds) and OUT/ablation.png (samples of the first seed, the same noise and classes in every
row). Further section.key=value arguments override the config of all runs.
"""

import argparse
import sys
from pathlib import Path

from study_runs import ROOT, TRAIN, Run, Study, cell, digest, draw, markdown_table

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path

WRONG_TANGENT = (str(ROOT / "tools/study/wrong_tangent.py"),)
FLOW = "meanflow.share_r_equals_t=1"
NO_GUIDANCE = ["meanflow.omega=1", "meanflow.kappa=0"]
CONFIGURATIONS = {
    # folder: (name, program, overrides, steps measured)
    "recipe": ("the recipe: 25 % of rows r < t", TRAIN, [], (1, 2, 4)),
    "all-r-below-t": ("100 % r < t", TRAIN, ["meanflow.share_r_equals_t=0"], (1, 2, 4)),
    "no-r-below-t": ("0 % r < t", TRAIN, [FLOW], (1, 2, 4, 25)),
    "wrong-tangent": ("tangent (v, 0, 0)", WRONG_TANGENT, [], (1, 2, 4)),
    "no-guidance": ("no guidance", TRAIN, NO_GUIDANCE, (1, 2, 4)),
    "flow": ("flow matching, no guidance", TRAIN, [FLOW, *NO_GUIDANCE], (1, 2, 4, 25)),
}
STEPS = (1, 2, 4, 25)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=expanded, default=str(ROOT / "configs" / "fashion_cpu.yaml"))
    parser.add_argument("--out", type=expanded_path, default=Path("runs/fashion"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each configuration (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each of one thread (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs, such as optim.lr=1e-3")
    args = parser.parse_intermixed_args()
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    runs = {folder: runs_of(args, folder) for folder in CONFIGURATIONS}
    in_order = sorted((run for of_seeds in runs.values() for run in of_seeds), key=lambda run: run.seed)
    Study(args.jobs).complete(in_order, "ablation")
    heads = ["configuration", *(f"{k} step{'s' * (k > 1)}" for k in STEPS)]
    names = {folder: name for folder, (name, *_) in CONFIGURATIONS.items()}
    text = markdown_table(heads, [[names[folder], *(cell(runs[folder], k) for k in STEPS)] for folder in runs])
    (args.out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    draw({names[folder]: of_seeds[0] for folder, of_seeds in runs.items()}, args.out / "ablation.png")
    print(f"{text}\n\n{args.out / 'ablation.md'}, {args.out / 'ablation.png'}")


def runs_of(args, folder):
    """Those of a configuration, one for each seed."""
    _, program, overrides, steps = CONFIGURATIONS[folder]
    given = (args.config, *overrides, *args.overrides)
    folders = [args.out / f"{folder}-{seed}-{digest(given, seed)}" for seed in range(args.seeds)]
    return [Run(path, program, given, seed, steps) for seed, path in enumerate(folders)]


if __name__ == "__main__":
    sys.exit(main())

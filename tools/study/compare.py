"""One fair table of the objectives: the same network, data and optimizer, at the same images and at the same FLOPs.

    python tools/study/compare.py                        # configs/fashion_cpu.yaml into runs/methods, two at a time
    python tools/study/compare.py --methods meanflow,boundary --seeds 1 train.total_images=6400 --out runs/methods-try

Every method keeps its published times, weights and share of r = t rows; guidance, optimizer and network are those of
the config. A run's folder is named by a hash of its config, so that finished ones are used again, also by both tables;
the same command continues where it stopped. Writes OUT/methods.md (mean and standard deviation over the seeds, beside
the papers' claims) and OUT/methods.png (samples of the first seed, the same noise and classes in every row). Further
section.key=value arguments override the config of all runs.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from study_runs import ROOT, TRAIN, cell, draw, markdown_table, train_and_measure_all

from mf_dist.config.loader import to_tree
from mf_dist.config.schema import load_config
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path

STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Method:
    name: str
    overrides: list[str]
    claim: str
    """FID-50k on ImageNet 256 in one and two steps: DiT-XL/2, 240 epochs, as published."""


def guided_as(section):
    """Another objective in place of meanflow, with its guidance, omega and kappa."""
    return ["meanflow=", f"{section}.omega={{omega}}", f"{section}.kappa={{kappa}}"]


METHODS = {
    "meanflow": Method("MeanFlow (2505.13447)", [], "3.43, 2.93"),
    "boundary": Method("MeanFlow, boundary tangent (2512.02012)", ["meanflow.tangent=boundary"], "2.99"),
    "solution_flow": Method("SoFlow (2512.15657)", guided_as("solution_flow"), "2.96, 2.66"),
    "alpha_flow": Method("alpha-Flow (2510.20771)", guided_as("alpha_flow"), "2.95, 2.34"),
}


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=expanded, default=str(ROOT / "configs" / "fashion_cpu.yaml"))
    parser.add_argument("--out", type=expanded_path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--methods", default=",".join(METHODS), help="which (default all: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each method (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each of one thread (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs, such as optim.lr=1e-3")
    args = parser.parse_intermixed_args()
    args.methods = args.methods.split(",")
    if unknown := {*args.methods} - METHODS.keys():
        raise UserError(f"--methods: no method {min(unknown)!r}; there are {', '.join(METHODS)}")
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    tables = {
        "At the same images": {method: overrides(args, method) for method in args.methods},
        "At the same FLOPs": {method: overrides(args, method, same_flops=True) for method in args.methods},
    }
    runs = {
        folder(args, options, seed): ([*TRAIN, args.config, *options], STEPS, seed)
        for seed in range(args.seeds)
        for table in tables.values()
        for options in table.values()
    }
    train_and_measure_all(runs, "compare", args.jobs)
    text = "\n\n".join(f"{title}:\n\n{table(args, options)}" for title, options in tables.items())
    (args.out / "methods.md").write_text(text + "\n", encoding="utf-8")
    first = tables["At the same images"]
    draw({METHODS[m].name: folder(args, options, 0) for m, options in first.items()}, args.out / "methods.png")
    print(f"{text}\n\n{args.out / 'methods.md'}, {args.out / 'methods.png'}")


def overrides(args, method, same_flops=False):
    """Of the config, for the runs of a method; same_flops: as many images as cost what the config's own run costs."""
    base = load_config(args.config, args.overrides)
    given = [text.format(omega=base.objective.omega, kappa=base.objective.kappa) for text in METHODS[method].overrides]
    options = [*args.overrides, *given]
    if same_flops:
        in_bf16 = base.engine.precision == "bf16"
        budget = base.train.total_images * base.objective.forwards(in_bf16)
        images = budget / load_config(args.config, options).objective.forwards(in_bf16)
        options.append(f"train.total_images={round(images / base.train.batch_size) * base.train.batch_size}")
    return options


def folder(args, options, seed):
    tree = to_tree(load_config(args.config, [*options, f"train.seed={seed}"]))
    del tree["run_dir"]
    return args.out / hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def table(args, methods):
    """A line per method; `methods`: name -> its overrides."""
    rows = []
    for method, options in methods.items():
        config, runs = load_config(args.config, options), [folder(args, options, seed) for seed in range(args.seeds)]
        cost = config.objective.forwards(config.engine.precision == "bf16")
        measured = [cell(runs, steps) for steps in STEPS]
        rows.append(
            [METHODS[method].name, f"{config.train.total_images:,}", f"{cost:.2f}", *measured, METHODS[method].claim]
        )
    steps = [f"{k} step{'s' * (k > 1)}" for k in STEPS]
    return markdown_table(["method", "images", "F per image", *steps, "claim: FID at 1, 2 steps"], rows)


if __name__ == "__main__":
    sys.exit(main())

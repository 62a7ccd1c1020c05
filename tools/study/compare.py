"""One fair table of the objectives: the same network, data and optimizer, at the same images and at the same FLOPs.

    python tools/study/compare.py                        # on Fashion-MNIST, into runs/methods, two at a time
    python tools/study/compare.py --methods meanflow,boundary --seeds 1 train.total_images=6400 --out runs/methods-try

Every method has a config in configs/: with its published times, weights and share of r = t rows, and the guidance,
optimizer and network of MeanFlow's. A run's folder is named by a hash of its config, so that finished ones are used
again, also by both tables; the same command continues where it stopped. Writes OUT/methods.md (mean and standard
deviation over the seeds, beside the papers' claims) and OUT/methods.png (samples of the first seed, the same noise and
classes in every row). Further section.key=value arguments override the config of all runs.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from study_runs import ROOT, TRAIN, cell, draw, markdown_table, train_and_measure_all

from mf_dist.config.cost import forward_flops, forwards_per_image
from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Method:
    name: str
    config: str
    """File in configs/."""
    overrides: list[str]
    claim: str
    """FID-50k on ImageNet 256 in one and two steps: DiT-XL/2, 240 epochs, as published."""


METHODS = {
    "meanflow": Method("MeanFlow (2505.13447)", "fashion_cpu", [], "3.43, 2.93"),
    "boundary": Method("MeanFlow, boundary tangent (2512.02012)", "fashion_cpu", ["meanflow.tangent=boundary"], "2.99"),
    "solution_flow": Method("SoFlow (2512.15657)", "fashion_solution_flow_cpu", [], "2.96, 2.66"),
    "alpha_flow": Method("alpha-Flow (2510.20771)", "fashion_alpha_flow_cpu", [], "2.95, 2.34"),
}
BASE = "meanflow"
"""The method whose images and FLOPs the others get."""


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
        title: {method: arguments(method, args.overrides, same_flops) for method in args.methods}
        for title, same_flops in (("At the same images", False), ("At the same FLOPs", True))
    }
    runs = {
        folder(args.out, given, seed): ([*TRAIN, *given], STEPS, seed)
        for seed in range(args.seeds)
        for table in tables.values()
        for given in table.values()
    }
    train_and_measure_all(runs, "compare", args.jobs)
    text = "\n\n".join(f"{title}:\n\n{table(args, methods)}" for title, methods in tables.items())
    (args.out / "methods.md").write_text(text + "\n", encoding="utf-8")
    first = tables["At the same images"]
    draw({METHODS[m].name: folder(args.out, given, 0) for m, given in first.items()}, args.out / "methods.png")
    print(f"{text}\n\n{args.out / 'methods.md'}, {args.out / 'methods.png'}")


def arguments(method, overrides, same_flops):
    """Of the training command, without folder and seed; same_flops: as many images as cost what BASE's run costs."""
    given = [config_file(method), *METHODS[method].overrides, *overrides]
    if not same_flops:
        return given
    base, config = resolved([config_file(BASE), *overrides]), resolved(given)
    images = base.train.total_images * flops_per_image(base) / flops_per_image(config)
    return [*given, f"train.total_images={round(images / config.train.batch_size) * config.train.batch_size}"]


def config_file(method):
    return str(ROOT / "configs" / f"{METHODS[method].config}.yaml")


def resolved(given):
    config = load_config(given[0], given[1:])
    return resolve(config, read_manifest(config.data.path), 1)


def flops_per_image(config):
    return forwards_per_image(config) * forward_flops(config.model)


def folder(out, given, seed):
    """The folder of a run, named by what its config file says, and the overrides."""
    tree = yaml.safe_load(Path(given[0]).read_text(encoding="utf-8"))
    del tree["run_dir"]
    return out / hashlib.sha256(json.dumps([tree, given[1:], seed]).encode()).hexdigest()[:12]


def table(args, methods):
    """A line per method; `methods`: name -> arguments of its runs."""
    rows = []
    for method, given in methods.items():
        config, runs = resolved(given), [folder(args.out, given, seed) for seed in range(args.seeds)]
        cost = [f"{forwards_per_image(config):.2f}", f"{flops_per_image(config) / 1e9:.3f}"]
        measured = [cell(runs, steps) for steps in STEPS]
        rows.append([METHODS[method].name, f"{config.train.total_images:,}", *cost, *measured, METHODS[method].claim])
    steps = [f"{k} step{'s' * (k > 1)}" for k in STEPS]
    return markdown_table(["method", "images", "F", "GFLOP", *steps, "claim: FID at 1, 2 steps"], rows)


if __name__ == "__main__":
    sys.exit(main())

"""One fair table of the objectives: the same data and optimizer, at the same images and at the same FLOPs.

    python tools/study/compare.py                        # on Fashion-MNIST, into runs/methods, two at a time
    python tools/study/compare.py --methods meanflow,boundary --seeds 1 train.total_images=6400 --out runs/methods-try

Every method has a config in configs/: with its published times, weights and share of r = t rows, and the guidance,
optimizer and network of MeanFlow's; iMF with its own network of the same width, sampled with the guidance of its
config. A run's folder is named by a hash of what it is trained with, so that finished ones are used again, also by both
tables; the same command continues where it stopped. Writes OUT/methods.md (mean and standard deviation over the seeds,
beside the papers' claims), OUT/methods.png (samples of the first seed, the same noise and classes in every row) and
OUT/methods.html with both. "class" is the share of 1000 images that the network of eval.features assigns to their
class, at the fewest steps. Further section.key=value arguments override the config of all runs.

Peers, the MeanFlow loss as others compute it (train_peer.py), are trained with the first seed at the same images:
`authors`, and `zhuyu` where named in --methods, for which data/zhuyu-cs/loss.py has to be that file of
https://github.com/zhuyu-cs/MeanFlow.
"""

import argparse
import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from study_runs import ROOT, TRAIN, Run, Study, cell, digest, draw, markdown_table, network_of, resolved

from mf_dist.config.cost import forward_flops, forwards_per_image
from mf_dist.runtime.atomic_files import sha256_of, write_atomic, write_json
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

STEPS = (1, 2, 4)
MANY_STEPS = (25,)
CLASSIFIED = 1000
"""Images per run that are classified."""


@dataclass(frozen=True)
class Method:
    name: str
    config: str
    """File in configs/."""
    overrides: list[str]
    claim: str
    """FID-50k on ImageNet 256 in one and two steps: XL/2, 240 epochs (iMF: 640), as published."""
    steps: tuple[int, ...] = STEPS
    """Counts of network calls at which it is measured."""
    peer: str = ""
    """First argument of train_peer.py, which computes its loss; empty: mf_dist does."""


PEER = str(ROOT / "tools/study/train_peer.py")
FLOW = ["meanflow.share_r_equals_t=1", "meanflow.omega=1", "meanflow.kappa=0"]
METHODS = {
    "meanflow": Method("MeanFlow (2505.13447)", "fashion_cpu", [], "3.43, 2.93"),
    "boundary": Method("MeanFlow, boundary tangent (2512.02012)", "fashion_cpu", ["meanflow.tangent=boundary"], "2.99"),
    "solution_flow": Method("SoFlow (2512.15657)", "fashion_solution_flow_cpu", [], "2.96, 2.66"),
    "alpha_flow": Method("alpha-Flow (2510.20771)", "fashion_alpha_flow_cpu", [], "2.95, 2.34"),
    "imf": Method("iMF (2512.02012)", "fashion_imf_cpu", [], "1.72, 1.54"),
    "flow": Method("flow matching, no guidance", "fashion_cpu", FLOW, "", MANY_STEPS),
    "authors": Method("peer: the authors' form", "fashion_cpu", [], "3.43, 2.93", peer="authors"),
    "zhuyu": Method("peer: zhuyu-cs/MeanFlow", "fashion_cpu", [], "3.56 (140 epochs)", peer="data/zhuyu-cs/loss.py"),
}
BASE = "meanflow"
"""The method whose images and FLOPs the others get."""


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=expanded_path, default=Path("runs/methods"), help="folder of the runs")
    default = ",".join(m for m in METHODS if m != "zhuyu")
    parser.add_argument("--methods", default=default, help=f"of {', '.join(METHODS)} (default: all but zhuyu)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each method (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each of one thread (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs, such as optim.lr=1e-3")
    args = parser.parse_intermixed_args()
    args.methods = args.methods.split(",")
    if unknown := {*args.methods} - METHODS.keys():
        raise UserError(f"--methods: no method {min(unknown)!r}; there are {', '.join(METHODS)}")
    if "zhuyu" in args.methods and not Path(METHODS["zhuyu"].peer).is_file():
        raise UserError(f"--methods zhuyu: no {METHODS['zhuyu'].peer}; it is loss.py of github.com/zhuyu-cs/MeanFlow")
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    same_images = {method: runs_of(args, method, same_flops=False) for method in args.methods}
    same_flops = {m: runs_of(args, m, same_flops=True) for m in args.methods if not METHODS[m].peer}
    runs = {run.folder: run for table in (same_images, same_flops) for of_seeds in table.values() for run in of_seeds}
    Study(args.jobs).complete(sorted(runs.values(), key=lambda run: run.seed), "compare")
    tables = {"At the same images": rows_of(same_images), "At the same FLOPs": rows_of(same_flops)}
    text = "\n\n".join(f"{title}:\n\n{markdown_table(HEADS, rows)}" for title, rows in tables.items())
    (args.out / "methods.md").write_text(text + "\n", encoding="utf-8")
    draw({METHODS[m].name: of_seeds[0] for m, of_seeds in same_images.items()}, args.out / "methods.png")
    write_page(args.out, tables)
    print(f"{text}\n\n{args.out / 'methods.md'}, {args.out / 'methods.png'}, {args.out / 'methods.html'}")


def runs_of(args, method, same_flops):
    """Those of a method, one for each seed; of a peer one. same_flops: of as many images as cost what BASE's cost."""
    known, given = METHODS[method], arguments(method, args.overrides, same_flops)
    program = (PEER, known.peer) if known.peer else TRAIN
    peer = [sha256_of(known.peer) if Path(known.peer).is_file() else known.peer] if known.peer else []
    seeds = range(1 if known.peer else args.seeds)
    return [Run(args.out / digest(given, seed, *peer), program, given, seed, known.steps) for seed in seeds]


def arguments(method, overrides, same_flops):
    """Config file and overrides."""
    given = (config_file(method), *METHODS[method].overrides, *overrides)
    if not same_flops:
        return given
    base, config = resolved((config_file(BASE), *overrides)), resolved(given)
    batch, ratio = config.train.batch_size, flops_per_image(base) / flops_per_image(config)
    images = round(base.train.total_images * ratio / batch) * batch
    return given if images == config.train.total_images else (*given, f"train.total_images={images}")


def config_file(method):
    return str(ROOT / "configs" / f"{METHODS[method].config}.yaml")


def flops_per_image(config):
    return forwards_per_image(config) * forward_flops(config.model)


RAW_LOSSES = ("raw_loss_r_equals_t", "raw_loss_r_below_t")
HEADS = ["method", "images", "F", "GFLOP", *(f"{k} step{'s' * (k > 1)}" for k in (*STEPS, *MANY_STEPS))]
HEADS += ["class", "raw loss r = t", "r < t", "claim: FID at 1, 2 steps"]


def rows_of(table):
    """The cells of a line per method; table: the runs of each."""
    rows = []
    for method, runs in table.items():
        config = runs[0].config
        cost = [f"{forwards_per_image(config):.2f}", f"{flops_per_image(config) / 1e9:.3f}"]
        if METHODS[method].peer:  # not what the cost model counts
            cost = ["", ""]
        measured = [cell(runs, steps) for steps in (*STEPS, *MANY_STEPS)]
        agreement = mean_of(map(agreement_of, runs), "{:.1%}")
        losses = [mean_of([last_of(run, name) for run in runs], "{:.0f}") for name in RAW_LOSSES]
        images = f"{config.train.total_images:,}"
        rows.append([METHODS[method].name, images, *cost, *measured, agreement, *losses, METHODS[method].claim])
    return rows


def mean_of(values, form):
    """The mean of those that are known, as text; empty if none is."""
    known = [value for value in values if value is not None]
    return form.format(mean(known)) if known else ""


def last_of(run, key):
    """The last logged value of a run, up to its last step; None if there is none."""
    path = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    values = [line[key] for line in lines if line.get(key) is not None and line["step"] <= run.last_step]
    return values[-1] if values else None


def agreement_of(run):
    """Share of a run's samples that the feature network assigns to their class; None if it is not measured. Kept in the
    run's folder, with what it was measured with."""
    path = run.folder / "agreement.json"
    made = {**run.measurement, "nfe": run.steps[0], "num_samples": CLASSIFIED}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("made") != made:
        if not run.is_measured:
            return None
        kept = {"made": made, "share": classified(run)}
        write_json(path, kept)
    return kept["share"]


def classified(run):
    import torch

    import mf_dist

    scale, *interval = run.config.guidance or (None,)
    model, network = mf_dist.load(run.checkpoint, device="cpu"), network_of(run.config.eval)
    right = 0
    for number in range(CLASSIFIED // 50):
        at = {"guidance": scale, "interval": tuple(interval) or None}
        images, labels = model.block(number, range(model.num_classes), run.steps[0], **at)
        logits = network(images.transpose(0, 3, 1, 2)).logits
        right += (torch.as_tensor(logits).argmax(dim=1) == torch.tensor(labels)).sum().item()
    return right / CLASSIFIED


def write_page(out, rows):
    """OUT/methods.html, which stands alone."""
    from jinja2 import Environment

    template = (Path(__file__).parent / "compare.html").read_text(encoding="utf-8")
    picture = f"data:image/png;base64,{base64.b64encode((out / 'methods.png').read_bytes()).decode()}"
    page = Environment(autoescape=True).from_string(template).render(heads=HEADS, tables=rows, picture=picture)
    write_atomic(out / "methods.html", lambda file: file.write(page.encode()))


if __name__ == "__main__":
    sys.exit(main())

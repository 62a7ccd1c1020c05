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
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import yaml
from study_runs import ROOT, TRAIN, cell, distances, draw, markdown_table, train_and_measure_all

from mf_dist.config.cost import forward_flops, forwards_per_image
from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.runtime.atomic_files import write_atomic, write_json
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


PEER = [str(ROOT / "tools" / "study" / "train_peer.py")]
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
    ours = [method for method in args.methods if not METHODS[method].peer]
    tables = {
        title: {method: arguments(method, args.overrides, same_flops) for method in methods}
        for title, same_flops, methods in (
            ("At the same images", False, args.methods),
            ("At the same FLOPs", True, ours),
        )
    }
    runs = {
        run: ([*program(method), *given], METHODS[method].steps, seed, guidance(given))
        for table in tables.values()
        for method, given in table.items()
        for seed, run in enumerate(folders(args, method, given))
    }
    train_and_measure_all(dict(sorted(runs.items(), key=lambda item: item[1][2])), "compare", args.jobs)
    text = "\n\n".join(f"{title}:\n\n{table(args, methods)}" for title, methods in tables.items())
    (args.out / "methods.md").write_text(text + "\n", encoding="utf-8")
    first = tables["At the same images"]
    draw(
        {METHODS[m].name: folders(args, m, given)[0] for m, given in first.items()},
        args.out / "methods.png",
        {METHODS[m].name: guidance(given) for m, given in first.items()},
    )
    write_page(args.out, {title: rows_of(args, methods) for title, methods in tables.items()})
    print(f"{text}\n\n{args.out / 'methods.md'}, {args.out / 'methods.png'}, {args.out / 'methods.html'}")


def arguments(method, overrides, same_flops):
    """Of the training command, without folder and seed; same_flops: as many images as cost what BASE's run costs."""
    given = [config_file(method), *METHODS[method].overrides, *overrides]
    if not same_flops:
        return given
    base, config = resolved([config_file(BASE), *overrides]), resolved(given)
    batch, ratio = config.train.batch_size, flops_per_image(base) / flops_per_image(config)
    images = round(base.train.total_images * ratio / batch) * batch
    return given if images == config.train.total_images else [*given, f"train.total_images={images}"]


def config_file(method):
    return str(ROOT / "configs" / f"{METHODS[method].config}.yaml")


def resolved(given):
    config = load_config(given[0], given[1:])
    return resolve(config, read_manifest(config.data.path), 1)


def flops_per_image(config):
    return forwards_per_image(config) * forward_flops(config.model)


def guidance(given):
    """Scale, start and end of the guidance in samples; None if the network does not take them."""
    return resolved(given).guidance


def program(method):
    peer = METHODS[method].peer
    return [*PEER, peer] if peer else TRAIN


def folders(args, method, given):
    """The folder of every seed's run (a peer has one), named by what its config file says, the overrides and the peer,
    but not by how it is measured."""
    tree, peer = yaml.safe_load(Path(given[0]).read_text(encoding="utf-8")), METHODS[method].peer
    del tree["run_dir"], tree["eval"]
    keys = [[tree, given[1:], seed, peer] for seed in range(1 if peer else args.seeds)]
    return [args.out / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12] for key in keys]


RAW_LOSSES = ("raw_loss_r_equals_t", "raw_loss_r_below_t")
HEADS = ["method", "images", "F", "GFLOP", *(f"{k} step{'s' * (k > 1)}" for k in (*STEPS, *MANY_STEPS))]
HEADS += ["class", "raw loss r = t", "r < t", "claim: FID at 1, 2 steps"]


def table(args, methods):
    """A line per method; `methods`: name -> arguments of its runs."""
    return markdown_table(HEADS, rows_of(args, methods))


def rows_of(args, methods):
    rows = []
    for method, given in methods.items():
        config, runs = resolved(given), folders(args, method, given)
        cost = [f"{forwards_per_image(config):.2f}", f"{flops_per_image(config) / 1e9:.3f}"]
        if METHODS[method].peer:  # not what the cost model counts
            cost = ["", ""]
        measured = [cell(runs, steps, guidance(given)) for steps in (*STEPS, *MANY_STEPS)]
        agreement = mean_of([agreement_of(run, METHODS[method].steps[0], guidance(given)) for run in runs], "{:.1%}")
        losses = [
            mean_of([last_of(run, f"raw_loss_r_{kind}") for run in runs], "{:.0f}") for kind in ("equals_t", "below_t")
        ]
        images = f"{config.train.total_images:,}"
        rows.append([METHODS[method].name, images, *cost, *measured, agreement, *losses, METHODS[method].claim])
    return rows


def mean_of(values, form):
    """The mean of those that are known, as text; empty if none is."""
    known = [value for value in values if value is not None]
    return form.format(mean(known)) if known else ""


def last_of(run, key):
    """The last logged value of a run; None if there is none."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def agreement_of(run, steps, guided=None):
    """Share of a run's samples that the feature network assigns to their class; None if it is not measured. Kept in the
    run's folder."""
    at = f"_guidance{'_'.join(map(str, guided))}" if guided else ""
    kept = run / f"agreement_nfe{steps}{at}.json"
    if not kept.is_file() and not distances(run, guided):
        return None
    if not kept.is_file():
        write_json(kept, classified(run, steps, guided))
    return json.loads(kept.read_text(encoding="utf-8"))


def classified(run, steps, guided):
    import torch

    import mf_dist
    from mf_dist.evaluation.features import open_features

    scale, interval = (guided[0], guided[1:]) if guided else (None, None)
    model = mf_dist.load(run, device="cpu")
    network = open_features(model.config.eval.features, None, torch.device("cpu"))
    right = 0
    for number in range(CLASSIFIED // 50):
        images, labels = model.block(number, range(model.num_classes), steps, guidance=scale, interval=interval)
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

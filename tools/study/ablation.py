"""The paper's ablation at small scale: trains six configurations with several seeds and compares their metrics.

    python tools/study/ablation.py                       # configs/fashion_cpu.yaml into runs/fashion, two at a time
    python tools/study/ablation.py --seeds 1 --jobs 1 train.total_images=6400 --out runs/fashion-try

Each run trains and is measured in its own folder, with its output in log.txt there. The same command continues where
it stopped. Writes OUT/ablation.md (mean and standard deviation over the seeds) and OUT/ablation.png (samples of the
first seed, the same noise and classes in every row). Further section.key=value arguments override the config of all
runs.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["-m", "mf_dist.train"]
EVALUATE = [str(ROOT / "tools" / "fid_eval.py"), "--metrics", "fid", "--num-samples", "5000"]
WRONG_TANGENT = [str(ROOT / "tools/study/wrong_tangent.py")]
FLOW = "meanflow.share_r_equals_t=1"
NO_GUIDANCE = ["meanflow.omega=1", "meanflow.kappa=0"]
CONFIGURATIONS = {
    # folder: (name, program, overrides, steps measured)
    "recipe": ("the recipe: 25 % of rows r < t", TRAIN, [], "1,2,4"),
    "all-r-below-t": ("100 % r < t", TRAIN, ["meanflow.share_r_equals_t=0"], "1,2,4"),
    "no-r-below-t": ("0 % r < t", TRAIN, [FLOW], "1,2,4,25"),
    "wrong-tangent": ("tangent (v, 0, 0)", WRONG_TANGENT, [], "1,2,4"),
    "no-guidance": ("no guidance", TRAIN, NO_GUIDANCE, "1,2,4"),
    "flow": ("flow matching, no guidance", TRAIN, [FLOW, *NO_GUIDANCE], "1,2,4,25"),
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
    args.out.mkdir(parents=True, exist_ok=True)
    from mf_dist.runtime.progress import progress

    todo = [(folder, seed) for seed in range(args.seeds) for folder in CONFIGURATIONS]
    with progress(len(todo), "run", "ablation") as bar, ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda run: train_and_measure(args, *run), todo):
            bar.update()
    rows = "\n".join(row(args, folder) for folder in CONFIGURATIONS)
    heads = ["configuration", *(f"{k} step{'s' * (k > 1)}" for k in STEPS)]
    text = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n{rows}\n"
    (args.out / "ablation.md").write_text(text, encoding="utf-8")
    draw(args)
    print(f"{text}\n{args.out / 'ablation.md'}, {args.out / 'ablation.png'}")


def train_and_measure(args, folder, seed):
    """Trains and measures one run unless it is complete; raises UserError, naming its log, if it fails."""
    _, program, overrides, nfe = CONFIGURATIONS[folder]
    run = args.out / f"{folder}-{seed}"
    measured = {entry["nfe"] for entry in entries(run)}
    if measured >= {int(k) for k in nfe.split(",")}:
        return
    run.mkdir(exist_ok=True)
    train = [*program, args.config, f"run_dir={run}", f"train.seed={seed}", *overrides, *args.overrides]
    evaluate = [*EVALUATE, "--checkpoint", str(run), "--nfe", nfe, "--seed", str(seed)]
    with (run / "log.txt").open("a", encoding="utf-8") as log:
        for call in (train, evaluate):
            finished = subprocess.run(
                [sys.executable, *call], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if finished.returncode:
                raise UserError(f"{run} failed; see {run / 'log.txt'}")


def entries(run):
    path = run / "eval" / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def row(args, folder):
    """A configuration's line of the table."""
    runs = [args.out / f"{folder}-{seed}" for seed in range(args.seeds)]
    cells = [CONFIGURATIONS[folder][0]]
    for k in STEPS:
        values = [
            value
            for run in runs
            for e in entries(run)
            if e["nfe"] == k
            for name, value in e["metrics"].items()
            if name.startswith("fd_")
        ]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.2f}{spread}" if values else "")
    return f"| {' | '.join(cells)} |"


def draw(args):
    """A row per configuration: every class at 1 and 4 steps, from the same noise."""
    import numpy as np
    import torch

    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.data.images import image_grid
    from mf_dist.objectives.sampler import uniform_grid
    from mf_dist.sampling.generator import load_trained_model

    rows = []
    for folder in CONFIGURATIONS:
        checkpoint = find_checkpoint(args.out / f"{folder}-0")
        generator = load_trained_model(checkpoint, None, None, torch.device("cpu")).generator
        noise, labels = generator.draw(range(generator.num_classes), "balanced", 0, 4)
        rows += [generator(noise, labels, uniform_grid(k)) for k in (1, 4)]
    names = [name for name, *_ in CONFIGURATIONS.values()]
    image_grid(np.concatenate(rows), names, ["1 step", "4 steps"]).save(args.out / "ablation.png")


if __name__ == "__main__":
    sys.exit(main())

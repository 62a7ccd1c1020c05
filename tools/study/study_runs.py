"""What the studies share: runs that train and are measured in their own folders, and the table and picture of them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from mf_dist.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["-m", "mf_dist.train"]
EVALUATE = [str(ROOT / "tools" / "fid_eval.py"), "--metrics", "fid", "--num-samples", "5000"]


def train_and_measure_all(runs, name, jobs):
    """runs: for each folder the arguments of train_and_measure; `jobs` of them at a time, each of one thread."""
    from mf_dist.runtime.progress import progress

    with progress(len(runs), "run", name) as bar, ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda run: train_and_measure(run, *runs[run]), runs):
            bar.update()


def train_and_measure(run, train, steps, seed, guidance=None):
    """train: arguments of python that train into the folder `run`; steps: counts of network calls to measure; guidance:
    scale and interval of a network that takes them as an input. Does nothing if the run is complete; raises UserError,
    naming its log, if it fails."""
    if distances(run, guidance).keys() >= {*steps}:
        return
    run.mkdir(parents=True, exist_ok=True)
    measure = [*EVALUATE, "--checkpoint", str(run), "--nfe", ",".join(map(str, steps)), "--seed", str(seed)]
    if guidance:
        scale, start, end = guidance
        measure += ["--guidance", str(scale), "--interval", f"{start},{end}"]
    with (run / "log.txt").open("a", encoding="utf-8") as log:
        for call in ([*train, f"run_dir={run}", f"train.seed={seed}"], measure):
            finished = subprocess.run(
                [sys.executable, *call], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if finished.returncode:
                raise UserError(f"{run} failed; see {run / 'log.txt'}")


def distances(run, guidance=None):
    """Frechet distance of a measured run, with this guidance, by its number of network calls."""
    path = run / "eval" / "metrics.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    entries = [e for e in entries if not e.get("sweep") and (not guidance or guidance_of(e) == guidance)]
    return {e["nfe"]: v for e in entries for name, v in e["metrics"].items() if name.startswith("fd_")}


def guidance_of(entry):
    """(scale, start, end) of a measurement of a network that takes guidance as an input; None for others."""
    return (entry["guidance"], *entry["interval"]) if entry.get("guidance") else None


def cell(runs, steps, guidance=None):
    """Mean and standard deviation of the distance over runs that differ in their seed; empty if not measured."""
    measured = [distances(run, guidance) for run in runs]
    values = [distance[steps] for distance in measured if steps in distance]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" if values else ""


def markdown_table(heads, rows):
    lines = [heads, *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * len(heads) + "|", *text[1:]])


def draw(runs, path, guidance=None):
    """runs: name -> folder. A row per run: every class at 1 and 4 steps, from the same noise. guidance: by name."""
    import numpy as np
    import torch

    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.data.images import image_grid
    from mf_dist.objectives.sampler import uniform_grid
    from mf_dist.sampling.generator import load_trained_model

    rows = []
    for name, run in runs.items():
        generator = load_trained_model(find_checkpoint(run), None, None, torch.device("cpu")).generator
        generator.guidance = (guidance or {}).get(name, generator.guidance)
        noise, labels = generator.draw(range(generator.num_classes), "balanced", 0, 4)
        rows += [generator(noise, labels, uniform_grid(k)) for k in (1, 4)]
    image_grid(np.concatenate(rows), list(runs), ["1 step", "4 steps"]).save(path)

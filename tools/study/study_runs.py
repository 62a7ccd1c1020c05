"""What the studies share: runs that train and are measured in their own folders, and the table and picture of them."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, stdev

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("-m", "mf_dist.train")


@dataclass(frozen=True)
class Run:
    """A run of a study: what it is trained with, and the counts of network calls at which it is measured; the rest of
    the measurement is its config's `eval`."""

    folder: Path
    program: tuple[str, ...]
    """Arguments of python before the config file."""
    given: tuple[str, ...]
    """Config file and overrides."""
    seed: int
    steps: tuple[int, ...]

    @cached_property
    def config(self):
        return resolved(self.given)

    @cached_property
    def last_step(self):
        return self.config.steps_left(0)

    @property
    def checkpoint(self):
        """That of the last step, also where the run was continued beyond it."""
        return self.folder / "checkpoints" / f"step-{self.last_step:08d}"

    @cached_property
    def measurement(self):
        """What its entries of metrics.json say, as opposed to those of another step, other samples, features or
        references."""
        settings, guidance = self.config.eval, self.config.guidance
        guided = {"guidance": guidance[0], "interval": [*guidance[1:]]} if guidance else {}
        made = {"step": self.last_step, "seed": self.seed, "labels": settings.labels, **guided}
        return {**made, **known_by(settings), "num_samples": settings.num_samples}

    @property
    def is_measured(self):
        return distances(self).keys() >= {*self.steps}


def resolved(given):
    """The config of a file and overrides, completed from its dataset."""
    config = load_config(given[0], given[1:])
    return resolve(config, read_manifest(config.data.path), 1)


def known_by(settings):
    """How entries name the features and the reference of a config's `eval`. Raises UserError if one is missing."""
    reference = Path(settings.reference or "")
    if not settings.reference or not reference.exists():
        raise UserError(f"no reference at eval.reference={settings.reference}; the runs could not be measured")
    hashed = {"reference_sha256": sha256_of(reference)} if reference.suffix == ".npz" else {}
    return {"features_sha256": network_of(settings).sha256, "reference": settings.reference, **hashed}


def network_of(settings):
    return opened(settings.features, settings.inception_weights)


@cache
def opened(features, weights):
    import torch

    from mf_dist.evaluation.features import open_features

    return open_features(features, weights, torch.device("cpu"))


def train_and_measure_all(runs, name, jobs):
    """What is missing, `jobs` runs at a time, each of one thread. Raises UserError, before anything is trained, if the
    runs could not be measured."""
    from mf_dist.runtime.progress import progress

    missing, children = [run for run in runs if not run.is_measured], set()
    for run in missing:
        known_by(run.config.eval)

    def stop(*_):
        for child in [*children]:
            child.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # else the runs in progress would go on, and the same command be refused
    with progress(len(missing), "run", name) as bar, ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda run: train_and_measure(run, children), missing):
            bar.update()


def train_and_measure(run, children):
    """children: the processes that are running. Raises UserError, naming the run's log, if one fails."""
    settings = run.config.eval
    measure = [str(ROOT / "tools/fid_eval.py"), "--checkpoint", str(run.checkpoint), "--metrics", "fid"]
    measure += ["--nfe", ",".join(map(str, run.steps)), "--seed", str(run.seed), "--labels", settings.labels]
    measure += ["--num-samples", str(settings.num_samples), "--features", settings.features]
    measure += ["--reference", settings.reference]
    if settings.inception_weights:
        measure += ["--inception-weights", settings.inception_weights]
    if run.config.guidance:
        scale, start, end = run.config.guidance
        measure += ["--guidance", str(scale), "--interval", f"{start},{end}"]
    train = [*run.program, *run.given, f"run_dir={run.folder}", f"train.seed={run.seed}"]
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
        for call in [measure] if run.checkpoint.is_dir() else [train, measure]:
            with subprocess.Popen(
                [sys.executable, *call], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ) as child:
                children.add(child)
            children.remove(child)
            if child.returncode or not run.checkpoint.is_dir():  # a stopped training exits with 0
                raise UserError(f"{run.folder} failed; see {run.folder / 'log.txt'}")


def distances(run):
    """Frechet distance of a measured run by its number of network calls."""
    from mf_dist.evaluation.metrics import metric_name
    from mf_dist.evaluation.report import read_entries

    name = metric_name("fid", network_of(run.config.eval), run.config.eval.num_samples)
    return {
        entry["nfe"]: entry["metrics"][name]
        for entry in read_entries(run.folder / "eval" / "metrics.json")
        if name in entry["metrics"]
        and not (entry.get("sweep") or entry.get("in_training"))
        and run.measurement.items() <= {key: entry.get(key) for key in run.measurement}.items()
    }


def cell(runs, steps):
    """Mean and standard deviation of the distance over runs that differ in their seed; empty if not measured."""
    values = [measured[steps] for measured in map(distances, runs) if steps in measured]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" if values else ""


def markdown_table(heads, rows):
    lines = [heads, *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * len(heads) + "|", *text[1:]])


def draw(runs, path):
    """runs: by name. A row per run: every class at 1 and 4 steps, from the same noise."""
    import numpy as np
    import torch

    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.data.images import image_grid
    from mf_dist.objectives.sampler import uniform_grid
    from mf_dist.sampling.generator import load_trained_model

    rows = []
    for run in runs.values():
        generator = load_trained_model(find_checkpoint(run.checkpoint), None, None, torch.device("cpu")).generator
        generator.guidance = run.config.guidance
        noise, labels = generator.draw(range(generator.num_classes), "balanced", 0, 4)
        rows += [generator(noise, labels, uniform_grid(k)) for k in (1, 4)]
    image_grid(np.concatenate(rows), list(runs), ["1 step", "4 steps"]).save(path)

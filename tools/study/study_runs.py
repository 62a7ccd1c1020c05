"""What the studies share: runs that train and are measured in their own folders, and the table and picture of them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, stdev

import yaml

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import read_manifest
from mf_dist.evaluation.protocols import ADM
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
        """What its entries of metrics.json say, as opposed to those of another step, sampler or protocol, other
        samples, features or references. Raises UserError if features or reference are missing or damaged."""
        config, settings = self.config, self.config.eval
        guided = {"guidance": config.guidance[0], "interval": [*config.guidance[1:]]} if config.guidance else {}
        return {
            "protocol": ADM.name,
            "step": self.last_step,
            "seed": self.seed,
            "labels": settings.labels,
            "num_samples": settings.num_samples,
            "sampler": config.sampler,
            "ema": str(config.optim.ema_decay[0]),
            "vae": settings.vae or read_manifest(config.data.path)["vae"]["source"],
            **guided,
            "features_sha256": network_of(settings).sha256,
            **known_by(settings.reference, settings.features, settings.inception_weights),
        }

    @property
    def is_measured(self):
        return distances(self).keys() >= {*self.steps} and self.checkpoint.is_dir()


def resolved(given):
    """The config of a file and overrides, completed from its dataset. Raises UserError without one."""
    config = load_config(given[0], given[1:])
    manifest = read_manifest(config.data.path)
    if manifest is None:
        raise UserError(
            f"no finished dataset at {config.data.path!r}; docs/experiments.md has the commands that make it"
        )
    return resolve(config, manifest, 1)


def digest(given, seed, *more):
    """Of all that determines a training: what the config file and the overrides say but for how it is measured, the
    seed, and `more` texts."""
    tree = yaml.safe_load(Path(given[0]).read_text(encoding="utf-8"))
    del tree["run_dir"], tree["eval"]
    key = [tree, [text for text in given[1:] if not text.startswith("eval.")], seed, *more]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def network_of(settings):
    return opened(settings.features, settings.inception_weights)


@cache
def opened(features, weights):
    import torch

    from mf_dist.evaluation.features import open_features

    return open_features(features, weights, torch.device("cpu"))


@cache
def known_by(reference, features, weights):
    """How entries name a reference of these features."""
    from mf_dist.evaluation.measure import has_statistics
    from mf_dist.evaluation.reference import read_reference

    if not reference or not Path(reference).exists():
        raise UserError(f"no reference at eval.reference={reference}; the runs could not be measured")
    if reference.endswith(".npz") and has_statistics(reference):
        return read_reference(reference, opened(features, weights)).provenance
    return {"reference": reference}


class Study:
    """Trains and measures runs, `jobs` at a time, each of one thread; SIGTERM ends those in progress too."""

    def __init__(self, jobs):
        self.jobs, self.children, self.stopped = jobs, set(), False

    def _stop(self, *_):
        self.stopped = True
        for child in [*self.children]:
            child.terminate()
        raise KeyboardInterrupt

    def complete(self, runs, name):
        """What is missing of `runs`. Raises UserError, before anything is trained, if one could not be measured."""
        from mf_dist.runtime.progress import progress

        missing = [run for run in runs if not run.is_measured]
        before = signal.signal(signal.SIGTERM, self._stop)
        with progress(len(missing), "run", name, bool(missing)) as bar, ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(self._complete, missing):
                bar.update()
        signal.signal(signal.SIGTERM, before)

    def _complete(self, run):
        """Raises UserError, naming the run's log, if it fails."""
        later = [path.name for path in run.checkpoint.parent.glob("step-*") if path.name > run.checkpoint.name]
        if later and not run.checkpoint.is_dir():
            raise UserError(
                f"{run.folder} was trained up to {max(later)} and has no {run.checkpoint.name} any more: move it away"
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "log.txt"
        for call in [measuring(run)] if run.checkpoint.is_dir() else [training(run), measuring(run)]:
            if self._call(call, log) or not run.checkpoint.is_dir():  # a training that was stopped exits with 0
                raise UserError(f"{run.folder} failed; see {log}")
        if not run.is_measured:
            raise UserError(f"{run.folder} has no measurement of {run.measurement}; see {log}")

    def _call(self, arguments, log):
        """Exit code of a program whose output is appended to the log."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (
            log.open("a", encoding="utf-8") as file,
            subprocess.Popen([sys.executable, *arguments], stdout=file, stderr=file, env=environment) as child,
        ):
            self.children.add(child)
            if self.stopped:
                child.terminate()
        self.children.remove(child)
        return child.returncode


def training(run):
    return [*run.program, *run.given, f"run_dir={run.folder}", f"train.seed={run.seed}"]


def measuring(run):
    settings, made = run.config.eval, run.measurement
    call = [str(ROOT / "tools/fid_eval.py"), "--checkpoint", str(run.checkpoint), "--metrics", "fid"]
    call += ["--nfe", ",".join(map(str, run.steps)), "--features", settings.features, "--reference", settings.reference]
    for name in ("seed", "labels", "num_samples", "ema", "vae"):
        call += [f"--{name.replace('_', '-')}", str(made[name])]
    if settings.sampler:
        call += ["--sampler", settings.sampler]
    if settings.inception_weights:
        call += ["--inception-weights", settings.inception_weights]
    if run.config.guidance:
        scale, start, end = run.config.guidance
        call += ["--guidance", str(scale), "--interval", f"{start},{end}"]
    return call


def distances(run):
    """Frechet distance of a measured run by its number of network calls."""
    from mf_dist.evaluation.metrics import metric_name
    from mf_dist.evaluation.report import read_entries
    from mf_dist.objectives.sampler import uniform_grid

    made, name = run.measurement, metric_name("fid", network_of(run.config.eval), run.config.eval.num_samples)
    return {
        entry["nfe"]: entry["metrics"][name]
        for entry in read_entries(run.folder / "eval" / "metrics.json")
        if name in entry["metrics"]
        and not (entry.get("sweep") or entry.get("in_training"))
        and entry.get("times") == uniform_grid(entry["nfe"])
        and all(entry.get(key) == value for key, value in made.items())
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

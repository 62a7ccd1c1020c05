"""What a run's folder says about the run, read as far as it can be; the report says what is damaged or absent."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mf_dist.checkpoint.reader import step_folders
from mf_dist.runtime.errors import UserError

Table = dict[str, Any]
RUN_MARKERS = ("metrics.jsonl", "status.json", "checkpoints", "eval")
"""A folder with any of these is a run's."""


@dataclass(frozen=True)
class Measurement:
    """One number of eval/metrics.json, and under which protocol it was measured."""

    name: str
    value: float
    protocol: Table

    @property
    def is_distance(self) -> bool:
        """A Frechet distance of pooled features: fid50k, fd_digits."""
        return self.name.startswith(("fid", "fd_")) and not self.name.endswith("_std")


@dataclass(frozen=True)
class Gap:
    """Lines of metrics.jsonl that have a key, and no finite number for it."""

    count: int
    of: int
    """All lines with that key."""
    first_step: float

    def __str__(self) -> str:
        return f"not finite in {self.count:,} of {self.of:,} lines, first at step {self.first_step:,.0f}"


def describe_gaps(gaps: dict[str, Gap]) -> list[str]:
    """A sentence for all keys with the same gap."""
    alike: dict[Gap, list[str]] = {}
    for key, gap in gaps.items():
        alike.setdefault(gap, []).append(key)
    return [f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} {gap}" for gap, keys in alike.items()]


@dataclass
class Run:
    folder: Path
    name: str
    lines: list[Table] = field(default_factory=list)
    """Of metrics.jsonl, each with a step and samples_seen; every other value is a finite number too, or left out."""
    gaps: dict[str, Gap] = field(default_factory=dict)
    """Key of the lines -> where it was left out."""
    measurements: list[Measurement] = field(default_factory=list)
    status: Table = field(default_factory=dict)
    history: list[Table] = field(default_factory=list)
    """Of history.jsonl: starts, ends and warnings in order."""
    state: Table = field(default_factory=dict)
    """state.json of the newest checkpoint: config, versions, data."""
    checkpoints: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    @property
    def config(self) -> Table:
        return table(self.state.get("config"))

    @property
    def training(self) -> list[Table]:
        """The lines of training, without those of measurements."""
        return [line for line in self.lines if "seconds_per_step" in line]

    def images(self, step: float) -> float | None:
        """Images trained on at a step; None where nothing tells the batch."""
        batch = table(self.config.get("train")).get("batch_size")
        if isinstance(batch, int):
            return step * batch
        known = [line for line in self.lines if line["step"] > 0]
        return step * known[-1]["samples_seen"] / known[-1]["step"] if known else None


def table(value: Any) -> Table:
    """The value where it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_runs(folders: list[Path]) -> list[Run]:
    """UserError for one that is no run's folder. Names are as short as they can be told apart."""
    for folder in folders:
        if not any((folder / name).exists() for name in RUN_MARKERS):
            raise UserError(f"{str(folder)!r} is no run: expected a folder with {', '.join(RUN_MARKERS[:-1])} or eval")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def newest_run(root: Path) -> Path:
    """The run under `root` of which anything that marks a run was written last; UserError where there is none."""
    found: dict[Path, float] = {}
    for mark in (path for name in RUN_MARKERS for path in root.glob(f"**/{name}")):
        try:
            found[mark.parent] = max(found.get(mark.parent, 0.0), mark.stat().st_mtime)
        except OSError:  # it has just been replaced
            continue
    if not found:
        raise UserError(f"no run under {str(root)!r}: train one, or name a run's folder")
    return max(found, key=lambda folder: found[folder])


def read_run(folder: Path, name: str) -> Run:
    run = Run(folder, name)
    _read_metrics(run, _json_lines(folder / "metrics.jsonl", run.problems))
    run.history = _json_lines(folder / "history.jsonl", run.problems)
    run.status = _json(folder / "status.json", run.problems, dict) or {}
    run.measurements = _measurements(_json(folder / "eval/metrics.json", run.problems, list) or [], run.problems)
    for checkpoint in reversed(step_folders(folder / "checkpoints")):
        if (checkpoint / "manifest.json").is_file():
            run.checkpoints.insert(0, checkpoint.name)
            run.state = run.state or _json(checkpoint / "state.json", run.problems, dict) or {}
    return run


def _text(path: Path, problems: list[str]) -> str:
    """Empty where there is nothing to read. A device or pipe in a file's place has no end, and is not read."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror or error}).")
        return ""


def _json(path: Path, problems: list[str], kind: type) -> Any:
    """A `kind`, dict or list; None where it is absent, damaged or something else."""
    text = _text(path, problems)
    try:
        found = json.loads(text) if text else None
        if text and not isinstance(found, kind):
            raise ValueError(f"it holds no JSON {'object' if kind is dict else 'list'}")
        return found
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return None


def _json_lines(path: Path, problems: list[str]) -> list[Table]:
    """The lines that are JSON tables; the others are counted."""
    texts = _text(path, problems).splitlines()
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            found.append(line)
    if len(found) < len(texts):
        problems.append(f"{len(texts) - len(found)} of {len(texts)} lines of {path.name} are damaged and left out.")
    return found


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _read_metrics(run: Run, found: list[Table]) -> None:
    lines = [line for line in found if None not in (number(line.get("step")), number(line.get("samples_seen")))]
    if len(lines) < len(found):
        count = len(found) - len(lines)
        run.problems.append(f"{count} lines of metrics.jsonl have no step or samples_seen and are left out.")
    lines.sort(key=lambda line: line["step"])
    run.lines = [{key: value for key, value in line.items() if number(value) is not None} for line in lines]
    run.gaps = _gaps(lines)
    run.problems += [f"metrics.jsonl: {sentence}." for sentence in describe_gaps(run.gaps)]


def _gaps(lines: list[Table]) -> dict[str, Gap]:
    """Training writes null where a loss has no rows, which is no gap, but also for a gradient that is not finite."""
    steps: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if number(value) is None and (value is not None or key == "grad_norm"):
                steps.setdefault(key, []).append(line["step"])
    return {key: Gap(len(found), sum(key in line for line in lines), found[0]) for key, found in steps.items()}


def _measurements(entries: list[Any], problems: list[str]) -> list[Measurement]:
    found: list[Measurement] = []
    damaged = 0
    for entry in entries:
        known = table(entry)
        numbers = table(known.get("metrics")) or {str(known.get("metric")): known.get("value")}
        before = len(found)
        for name, value in numbers.items():
            if (finite := number(value)) is not None:
                found.append(Measurement(name, finite, known))
        damaged += len(found) == before
    if damaged:
        problems.append(f"{damaged} entries of eval/metrics.json have no number and are left out.")
    return found

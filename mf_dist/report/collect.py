"""Reads a run's folder as far as possible; what is damaged is listed for the report."""

import json
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mf_dist.checkpoint.reader import checkpoint_folders
from mf_dist.checkpoint.runs import folders_below
from mf_dist.runtime.errors import UserError

Table = dict[str, Any]
RUN_MARKERS = ("metrics.jsonl", "status.json", "checkpoints", "eval")
"""A folder with any of these is a run folder."""


@dataclass(frozen=True)
class Measurement:
    """One value of eval/metrics.json, with the protocol under which it was measured."""

    name: str
    value: float
    protocol: Table

    @property
    def is_distance(self) -> bool:
        """A Frechet distance of pooled features: fid50k, fd_digits."""
        return self.name.startswith(("fid", "fd_")) and not self.name.endswith("_std")

    @property
    def plus_minus(self) -> float | None:
        """Half the width of its 95 % band."""
        return number(table(self.protocol.get("plus_minus_95")).get(self.name))

    @property
    def text(self) -> str:
        """With the band."""
        return f"{self.value:.4g}" + ("" if self.plus_minus is None else f" ± {self.plus_minus:.2g}")


@dataclass(frozen=True)
class Gap:
    """Lines of metrics.jsonl in which the value of a key is not finite."""

    count: int
    total: int
    """All lines with that key."""
    first_step: float

    def __str__(self) -> str:
        return f"not finite in {self.count:,} of {self.total:,} lines, first at step {self.first_step:,.0f}"


def describe_gaps(gaps: dict[str, Gap]) -> list[str]:
    """One sentence for all keys with the same gap."""
    alike: dict[Gap, list[str]] = {}
    for key, gap in gaps.items():
        alike.setdefault(gap, []).append(key)
    return [f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} {gap}" for gap, keys in alike.items()]


@dataclass
class Run:
    folder: Path
    name: str
    lines: list[Table] = field(default_factory=list)
    """Lines of metrics.jsonl, each with a step and samples_seen; values that are not finite numbers are removed."""
    gaps: dict[str, Gap] = field(default_factory=dict)
    """Key -> the lines in which its value is not finite."""
    measurements: list[Measurement] = field(default_factory=list)
    """All but those of sweeps."""
    sweeps: list[Measurement] = field(default_factory=list)
    """Measurements of fewer samples, which chose the guidance (tools/fid_eval.py --sweep)."""
    status: Table = field(default_factory=dict)
    history: list[Table] = field(default_factory=list)
    """Entries of history.jsonl: starts, ends and warnings in order."""
    state: Table = field(default_factory=dict)
    """state.json of the newest checkpoint: config, versions, data."""
    profile: Table = field(default_factory=dict)
    """profile/profile.json of train.profile_steps (training/profile.py)."""
    checkpoints: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """A sentence for each part that could not be read."""

    @property
    def config(self) -> Table:
        return table(self.state.get("config"))

    @property
    def training(self) -> list[Table]:
        """The lines of training steps, without those of measurements."""
        return [line for line in self.lines if "seconds_per_step" in line]

    @cached_property
    def progress(self) -> list[tuple[float, float]]:
        """(step, images seen), sorted: the start, the lines of metrics.jsonl and the newest checkpoint."""
        entries = [{"step": 0, "samples_seen": 0}, self.state, *self.lines]
        pairs = {(number(entry.get("step")), number(entry.get("samples_seen"))) for entry in entries}
        return sorted((step, seen) for step, seen in pairs if step is not None and seen is not None)

    def images(self, step: float) -> float | None:
        """Images seen by a step: interpolated in `progress`, since the batch size may have changed; after its end by
        the config's batch size. None if neither is known."""
        after = bisect_right(self.progress, (step, math.inf))
        (at, seen), rest = self.progress[max(0, after - 1)], self.progress[after:]
        if rest:
            return seen + (step - at) * (rest[0][1] - seen) / (rest[0][0] - at)
        batch = number(table(self.config.get("train")).get("batch_size"))
        batch = seen / at if batch is None and at else batch
        return None if batch is None else seen + (step - at) * batch


def table(value: Any) -> Table:
    """`value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_runs(folders: list[Path]) -> list[Run]:
    """Raises UserError if a folder is not a run folder. Runs are named by folder name, or by path if names coincide."""
    for folder in folders:
        if not any((folder / name).exists() for name in RUN_MARKERS):
            raise UserError(
                f"{str(folder)!r} is not a run: expected a folder with {', '.join(RUN_MARKERS[:-1])} or eval"
            )
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def newest_run(root: Path) -> Path:
    """The run under `root`, links followed, whose RUN_MARKERS were modified last. Raises UserError without one."""
    modified: dict[Path, float] = {}
    for marker in (folder / name for folder in folders_below(root) for name in RUN_MARKERS):
        try:
            modified[marker.parent] = max(modified.get(marker.parent, 0.0), marker.stat().st_mtime)
        except OSError:  # missing, or replaced meanwhile
            continue
    if not modified:
        raise UserError(f"no run under {str(root)!r}: train one, or name a run's folder")
    return max(modified, key=lambda folder: modified[folder])


def read_run(folder: Path, name: str) -> Run:
    run = Run(folder, name)
    _read_metrics(run, _json_lines(folder / "metrics.jsonl", run.problems))
    run.history = _json_lines(folder / "history.jsonl", run.problems)
    run.status = _json(folder / "status.json", run.problems, dict) or {}
    found = _measurements(_json(folder / "eval/metrics.json", run.problems, list) or [], run.problems)
    for measured in found:
        (run.sweeps if measured.protocol.get("sweep") else run.measurements).append(measured)
    run.profile = _json(folder / "profile/profile.json", run.problems, dict) or {}
    for checkpoint in reversed(checkpoint_folders(folder / "checkpoints")):
        if (checkpoint / "manifest.json").is_file():
            run.checkpoints.insert(0, checkpoint.name)
            run.state = run.state or _json(checkpoint / "state.json", run.problems, dict) or {}
    return run


def _text(path: Path, problems: list[str]) -> str:
    """Empty if the file is missing. A device or pipe, which may have no end, is not read."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror or error}).")
        return ""


def _json(path: Path, problems: list[str], kind: type) -> Any:
    """A value of type `kind`, dict or list; None if missing, damaged or of another type."""
    text = _text(path, problems)
    try:
        value = json.loads(text) if text else None
        if text and not isinstance(value, kind):
            raise ValueError(f"not a JSON {'object' if kind is dict else 'list'}")
        return value
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return None


def _json_lines(path: Path, problems: list[str]) -> list[Table]:
    """The lines that are JSON objects; others are counted in `problems`."""
    texts = _text(path, problems).splitlines()
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    if len(lines) < len(texts):
        problems.append(f"{len(texts) - len(lines)} of {len(texts)} lines of {path.name} are damaged and left out.")
    return lines


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _read_metrics(run: Run, entries: list[Table]) -> None:
    lines = [line for line in entries if None not in (number(line.get("step")), number(line.get("samples_seen")))]
    if len(lines) < len(entries):
        count = len(entries) - len(lines)
        run.problems.append(f"{count} lines of metrics.jsonl have no step or samples_seen and are left out.")
    lines.sort(key=lambda line: line["step"])
    run.lines = [{key: value for key, value in line.items() if number(value) is not None} for line in lines]
    run.gaps = _gaps(lines)
    run.problems += [f"metrics.jsonl: {sentence}." for sentence in describe_gaps(run.gaps)]


def _gaps(lines: list[Table]) -> dict[str, Gap]:
    """Null is a gap only for grad_norm, where it means not finite; a loss is null if it has no rows."""
    steps: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if number(value) is None and (value is not None or key == "grad_norm"):
                steps.setdefault(key, []).append(line["step"])
    return {key: Gap(len(where), sum(key in line for line in lines), where[0]) for key, where in steps.items()}


def _measurements(entries: list[Any], problems: list[str]) -> list[Measurement]:
    measurements: list[Measurement] = []
    damaged = 0
    for entry in entries:
        protocol = table(entry)
        numbers = table(protocol.get("metrics")) or {str(protocol.get("metric")): protocol.get("value")}
        before = len(measurements)
        for name, value in numbers.items():
            if (finite := number(value)) is not None:
                measurements.append(Measurement(name, finite, protocol))
        damaged += len(measurements) == before
    if damaged:
        problems.append(f"{damaged} entries of eval/metrics.json have no number and are left out.")
    return measurements

"""A run in words and numbers, for the tables of its report."""

import json
import statistics
from datetime import UTC, datetime
from typing import Any

from mf_dist.fault_tolerance.status import NO_REASON
from mf_dist.report.collect import Run, Table, number, table
from mf_dist.report.curves import POINTS, tflops_per_image
from mf_dist.report.standing import ago, ends, is_alive, last_sign, standing

MAX_ROWS = 200
"""Of a table that grows with a run: the newest."""
MOODS = {
    "starting": "calm",
    "running": "calm",
    "finished": "good",
    "stopped": "calm",
    "failed": "bad",
    "crash_loop": "bad",
    "broke_off": "bad",
    "unknown": "calm",
}
"""Word of a run's status -> its colour."""
ENDS = {"finished": "finished", "stopped": "stopped", "failed": "failed", "crash_loop": "crash loop: not started again"}

Row = list[Any]


def short(value: Any) -> str:
    """A number for people; nothing for None; any other value as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def moment(seconds: Any) -> str:
    """UTC; empty where it is no time."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def status(run: Run) -> Table:
    """How the run stands, as a word, a sentence, a time and a mood for the colour; and a call that was refused since,
    or nothing."""
    said = standing(run)
    word = str(said.get("status"))
    reason, when, refused = str(said.get("reason") or ""), said.get("time"), ""
    if run.status.get("refused"):
        refused = f"The last call was refused, {moment(run.status.get('time'))} UTC: {run.status.get('reason')}"
    if word == "running":
        when = last_sign(run, said)
        reason = f"last sign of life {ago(when)}"
        if not is_alive(run, said):
            word, reason = "broke_off", f"{reason}; {NO_REASON}"
    if word not in MOODS:
        word, reason = "unknown", "nothing is known from before that call" if refused else "no status.json tells it"
    return {
        "word": word.replace("_", " "),
        "reason": reason,
        "mood": MOODS[word],
        "time": moment(when),
        "refused": refused,
    }


def overview(runs: list[Run]) -> list[Row]:
    """What one asks first: a name, and a value for each run."""
    found = [dict(_overview(run)) for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    return [[name, *(one.get(name, "") for one in found)] for name in names]


def _overview(run: Run) -> list[Row]:
    lines, train = run.training, table(run.config.get("train"))
    rows: list[Row] = []
    if lines:
        last = lines[-1]
        batch, total = number(train.get("batch_size")), number(train.get("total_images"))
        of = f" of {int(total // batch):,}" if batch and total else ""
        rows.append(["Steps", f"{int(last['step']):,}{of}"])
        rows.append(["Images seen", short(last["samples_seen"])])
        rows.append(["Time in training steps", _duration(training_seconds(lines))])
        rows += _medians(run, lines)
    if model := table(run.config.get("model")):
        rows.append(
            [
                "Model",
                f"depth {model.get('depth')}, width {model.get('hidden_size')}, "
                f"patch {model.get('patch_size')}, latent {model.get('latent_size')}",
            ]
        )
    versions = table(run.state.get("versions"))
    if versions:
        rows.append(["Device", f"{versions.get('device')}, {versions.get('ranks')} rank(s)"])
        rows.append(["Code", str(versions.get("code", "unknown"))[:12]])
    return rows


def _medians(run: Run, lines: list[Table]) -> list[Row]:
    names = {
        "images_per_second": ("Throughput, median", "{:,.0f} images/s"),
        "data_wait_share": ("Waiting for data, median", "{:.1%}"),
    }
    rows: list[Row] = []
    for key, (name, form) in names.items():
        known = [line[key] for line in lines if key in line]
        if known:
            rows.append([name, form.format(statistics.median(known))])
    if memory := [line["memory_gib"] for line in lines if "memory_gib" in line]:
        rows.append(["Memory, peak of rank 0", f"{max(memory):.2f} GiB"])
    rate, speeds = tflops_per_image(run), [line["images_per_second"] for line in lines if "images_per_second" in line]
    if rate is not None and speeds:
        rows.append(["Model FLOP/s, median", f"{rate * statistics.median(speeds):.3g} TFLOP/s a rank, by arithmetic"])
    return rows


def training_seconds(lines: list[Table]) -> float:
    """Of the steps alone: sampling, saving and pauses between starts are left out."""
    before = [0, *(line["step"] for line in lines)]
    return sum((line["step"] - first) * line["seconds_per_step"] for first, line in zip(before, lines, strict=False))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} h"


def history(run: Run) -> list[Row]:
    """Time, what, step, reason of every start, end and warning."""
    rows: list[Row] = []
    broke_off = ["", "broke off", "", NO_REASON]
    start: Table | None = None
    for entry in run.history:
        word, step, when = entry.get("status"), entry.get("step"), moment(entry.get("time"))
        if "note" in entry:
            rows.append([when, "warning", step, entry["note"]])
        elif word == "running":
            if start:
                rows.append(broke_off)
            rows.append([when, "resumed" if step else "started", step, f"on {entry.get('host')}"])
            start = entry
        else:
            said = "refused" if entry.get("refused") else ENDS.get(str(word), str(word))
            rows.append([when, said, step, entry.get("reason") or ""])
            start = None if start is None or ends(entry, start) else start
    if start and not is_alive(run, start):
        rows.append(broke_off)
    return rows[-MAX_ROWS:]


def faults(run: Run) -> list[str]:
    """Steps left out or clipped, between which lines of metrics.jsonl."""
    found = []
    for key, what in {"skipped_steps": "left out", "clipped_steps": "clipped"}.items():
        before, last_step = 0.0, 0.0
        for line in run.training:
            count = line.get(key, before)
            if count > before:
                where = f"after step {short(last_step)}, up to step {short(line['step'])}"
                found.append(f"{short(count - before)} step(s) {what} {where}")
            before, last_step = count, line["step"]
    return found[-MAX_ROWS:]


def flat(tree: Table, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def sections(run: Run) -> dict[str, list[Row]]:
    """The config: section -> keys and values; what stands outside a section is under 'run'."""
    found: dict[str, list[Row]] = {}
    for key, value in flat(run.config).items():
        section, _, name = key.rpartition(".")
        found.setdefault(section or "run", []).append([name, plain(value)])
    return found


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def environment(run: Run) -> list[Row]:
    versions = table(run.state.get("versions"))
    rows: list[Row] = [[key, value] for key, value in versions.items()]
    for part in ("dataset", "vae"):
        rows += [[f"{part} {key}", plain(value)] for key, value in table(run.state.get(part)).items()]
    if run.checkpoints:
        rows.append(["checkpoints", ", ".join(run.checkpoints[-20:])])
    if host := run.status.get("host"):
        rows.append(["host", host])
    return rows


def differing(runs: list[Run]) -> list[Row]:
    """Key and a value per run of what is not the same in all runs: config, dataset, versions."""
    trees = [
        flat(
            {
                **{key: value for key, value in run.config.items() if key != "run_dir"},
                **{part: table(run.state.get(part)) for part in ("dataset", "vae", "versions")},
            }
        )
        for run in runs
    ]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    values = {key: [plain(tree[key]) if key in tree else "absent" for tree in trees] for key in keys}
    return [[key, *found] for key, found in values.items() if len(set(found)) > 1]


def thinned(charts: list[Table]) -> str:
    """What is drawn of the curves that have too many points, in a sentence; empty where every point is drawn."""
    most = max((trace["of"] for chart in charts for trace in chart["traces"] if "low" in trace), default=0)
    if not most:
        return ""
    return (
        f"Of a curve of more than {POINTS:,} points (up to {most:,} here) the line is the median of each stretch, and "
        "the shade spans its lowest to its highest value."
    )

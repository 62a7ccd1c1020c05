"""Facts about a run, for the tables of its report."""

import json
import statistics
from datetime import UTC, datetime
from typing import Any

from mf_dist.fault_tolerance.status import NO_REASON
from mf_dist.report.collect import Run, Table, number, table
from mf_dist.report.curves import POINTS, tflops_per_image
from mf_dist.report.standing import ago, current_entry, ends, is_alive, last_activity
from mf_dist.runtime.figures import three_digits

MAX_ROWS = 200
"""Rows of a table that grows with a run; the newest are kept."""
STATUS_CLASSES = {
    "starting": "neutral",
    "running": "neutral",
    "finished": "good",
    "stopped": "neutral",
    "failed": "bad",
    "crash_loop": "bad",
    "broke_off": "bad",
    "unknown": "neutral",
}
"""Status of a run -> CSS class, which sets the colour."""
END_NAMES = {
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "crash_loop": "crash loop: not started again",
}

Row = list[Any]


def format_value(value: Any) -> str:
    """A number in readable form; empty for None; any other value as text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def format_time(seconds: Any) -> str:
    """UTC time; empty if `seconds` is not a valid time."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def status(run: Run) -> Table:
    """The run's status as a word, its reason, time and CSS class; and a sentence on a call refused since, or an empty
    one."""
    entry = current_entry(run)
    word = str(entry.get("status"))
    reason, when, refused = str(entry.get("reason") or ""), entry.get("time"), ""
    if run.status.get("refused"):
        refused = f"The last call was refused, {format_time(run.status.get('time'))} UTC: {run.status.get('reason')}"
    if word == "running":
        when = last_activity(run, entry)
        reason = f"last activity {ago(when)}"
        if not is_alive(run, entry):
            word, reason = "broke_off", f"{reason}; {NO_REASON}"
    if word not in STATUS_CLASSES:
        word = "unknown"
        reason = "no status is recorded before that call" if refused else "status.json is missing or damaged"
    return {
        "word": word.replace("_", " "),
        "reason": reason,
        "css_class": STATUS_CLASSES[word],
        "time": format_time(when),
        "refused": refused,
    }


def overview(runs: list[Run]) -> list[Row]:
    """Rows of the main facts: a name, and a value for each run."""
    columns = [dict(_overview(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "") for column in columns)] for name in names]


def _overview(run: Run) -> list[Row]:
    lines, train = run.training, table(run.config.get("train"))
    rows: list[Row] = []
    if lines:
        last = lines[-1]
        batch, total = number(train.get("batch_size")), number(train.get("total_images"))
        left = max(0, total - last["samples_seen"]) // batch if batch and total else None
        of = f" of {int(last['step'] + left):,}" if left is not None else ""
        rows.append(["Steps", f"{int(last['step']):,}{of}"])
        rows.append(["Images seen", format_value(last["samples_seen"])])
        rows.append(["Time in training steps", _duration(training_seconds(lines))])
        rows += _speed_and_memory(run, lines)
    if model := table(run.config.get("model")):
        rows.append(
            [
                "Model",
                f"{model.get('network', 'dit')}, depth {model.get('depth')}, width {model.get('hidden_size')}, "
                f"patch {model.get('patch_size')}, latent {model.get('latent_size')}",
            ]
        )
    versions = table(run.state.get("versions"))
    if versions:
        rows.append(["Device", f"{versions.get('device')}, {versions.get('ranks')} rank(s)"])
        rows.append(["Code", str(versions.get("code", "unknown"))[:12]])
    return rows


def _speed_and_memory(run: Run, lines: list[Table]) -> list[Row]:
    names = {
        "images_per_second": ("Throughput, median", lambda rate: f"{three_digits(rate)} images/s"),
        "data_wait_share": ("Waiting for data, median", "{:.1%}".format),
    }
    rows: list[Row] = []
    for key, (name, shown) in names.items():
        known = [line[key] for line in lines if key in line]
        if known:
            rows.append([name, shown(statistics.median(known))])
    if memory := [line["memory_gib"] for line in lines if "memory_gib" in line]:
        rows.append(["Memory, peak of rank 0", f"{three_digits(max(memory))} GiB"])
    rate, speeds = tflops_per_image(run), [line["images_per_second"] for line in lines if "images_per_second" in line]
    if rate is not None and speeds:
        tflops = rate * statistics.median(speeds)
        rows.append(["Model FLOP/s, median", f"{three_digits(tflops)} TFLOP/s per rank, from config and throughput"])
    return rows


def training_seconds(lines: list[Table]) -> float:
    """Time in training steps, without sampling, saving and pauses between starts."""
    before = [0, *(line["step"] for line in lines)]
    return sum((line["step"] - first) * line["seconds_per_step"] for first, line in zip(before, lines, strict=False))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} h"


def profile(run: Run) -> Table:
    """The profile of a few steps: a sentence, and tables with a title, heads and rows; empty if there is none."""
    found = run.profile
    first, steps, idle = (number(found.get(key)) for key in ("first_step", "steps", "idle_share"))
    if first is None or steps is None:
        return {}
    titles = {"classes": "By class", "costs": "The largest costs", "waits": "What the host waits in"}
    heads = {"name": "", "class": "class", "ms": "ms per step", "share": "of the step", "calls": "calls per step"}
    tables = []
    for key, title in titles.items():
        entries = [table(entry) for entry in found[key]][:MAX_ROWS] if isinstance(found.get(key), list) else []
        shown = [name for name in heads if any(name in entry for entry in entries)]
        rows = [[_profile_cell(name, entry.get(name)) for name in shown] for entry in entries]
        tables.append({"title": title, "heads": [heads[name] for name in shown], "rows": rows})
    sentence = (
        f"Steps {format_value(first)} to {format_value(first + steps - 1)} on {found.get('device')}: "
        f"{format_value(number(found.get('ms')))} ms per step while recorded"
    )
    return {"sentence": sentence + ("" if idle is None else f", GPU idle {idle:.1%}"), "tables": tables}


def _profile_cell(name: str, value: Any) -> str:
    share = number(value)
    return f"{share:.1%}" if name == "share" and share is not None else format_value(value)[:140]


def history(run: Run) -> list[Row]:
    """Time, event, step and reason of every start, end and warning."""
    rows: list[Row] = []
    broke_off = ["", "broke off", "", NO_REASON]
    start: Table | None = None
    for entry in run.history:
        word, step, when = entry.get("status"), entry.get("step"), format_time(entry.get("time"))
        if "note" in entry:
            rows.append([when, "warning", step, entry["note"]])
        elif word == "running":
            if start:
                rows.append(broke_off)
            rows.append([when, "resumed" if step else "started", step, f"on {entry.get('host')}"])
            start = entry
        else:
            event = "refused" if entry.get("refused") else END_NAMES.get(str(word), str(word))
            rows.append([when, event, step, entry.get("reason") or ""])
            start = None if start is None or ends(entry, start) else start
    if start and not is_alive(run, start):
        rows.append(broke_off)
    return rows[-MAX_ROWS:]


def faults(run: Run) -> list[str]:
    """Steps left out or clipped, located between two lines of metrics.jsonl."""
    sentences = []
    for key, what in {"skipped_steps": "left out", "clipped_steps": "clipped"}.items():
        before, last_step = 0.0, 0.0
        for line in run.training:
            count = line.get(key, before)
            if count > before:
                where = f"after step {format_value(last_step)}, up to step {format_value(line['step'])}"
                sentences.append(f"{format_value(count - before)} step(s) {what} {where}")
            before, last_step = count, line["step"]
    return sentences[-MAX_ROWS:]


def flat(tree: Table, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def sections(run: Run) -> dict[str, list[Row]]:
    """The config: section -> keys and values; keys outside a section are under 'run'."""
    rows: dict[str, list[Row]] = {}
    for key, value in flat(run.config).items():
        section, _, name = key.rpartition(".")
        rows.setdefault(section or "run", []).append([name, plain(value)])
    return rows


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
    """Rows of the keys that differ between runs, in config, dataset, VAE and versions: key, and a value per run."""
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
    return [[key, *of_key] for key, of_key in values.items() if len(set(of_key)) > 1]


def thinned(charts: list[Table]) -> str:
    """A sentence on how curves of too many points are drawn; empty if every point is drawn."""
    most = max((trace["of"] for chart in charts for trace in chart["traces"] if "low" in trace), default=0)
    if not most:
        return ""
    return (
        f"For a curve of more than {POINTS:,} points (up to {most:,} here) the line is the median of each stretch, and "
        "the shade spans its minimum to its maximum."
    )

"""Measurements of a run, for its report."""

import json
from typing import Any

from mf_dist.report.collect import Measurement, Run, Table, number
from mf_dist.report.curves import steps
from mf_dist.report.facts import format_value, plain

MAX_ROWS = 200
"""Rows of the table of measurements; the newest are kept."""
COLUMNS = {
    "protocol": "protocol",
    "sampler": "sampler",
    "guidance": "guidance",
    "interval": "guidance interval",
    "step": "step",
    "ema": "EMA",
    "num_samples": "samples",
    "labels": "labels",
    "seed": "seed",
    "seeds": "seeds",
    "features": "features",
    "reference": "reference",
    "reference_images": "real images",
    "precision": "precision",
}
"""Fields of a protocol in the table -> heading; a click shows the whole protocol."""
MUST_MATCH = {
    "protocol": "named protocol",
    "num_samples": "samples",
    "labels": "labels",
    "seed": "seed",
    "seeds": "seeds",
    "features": "features",
    "features_sha256": "weights of the features",
    "reference_sha256": "real images",
    "reference_images": "number of real images",
    "precision": "precision",
    "in_training": "time of measurement (during or after training)",
}
"""Fields of a protocol that must be equal for two distances to be comparable -> name."""

Row = list[Any]


def headline(run: Run) -> list[Table]:
    """The newest Frechet distance at each number of network calls, with its protocol."""
    ranked = sorted(
        _newest(run).values(), key=lambda m: (bool(m.protocol.get("in_training")), number(m.protocol.get("nfe")) or 0)
    )
    return [
        {
            "name": m.name,
            "steps": steps(m.protocol.get("nfe")),
            "value": m.text,
            "protocol": _protocol(m.protocol),
            "warnings": _warnings(m.protocol),
        }
        for m in ranked[:4]
    ]


def compared(runs: list[Run]) -> list[Row]:
    """Rows for each Frechet distance at each number of network calls: its name, with the fields in which the protocols
    differ, and the newest value of each run."""
    columns = [_newest(run) for run in runs]
    rows: list[Row] = []
    for key in sorted({key for column in columns for key in column}, key=lambda key: (key[0], len(key[1]), key[1])):
        protocols = [{"protocol": "adm", **column[key].protocol} for column in columns if key in column]
        different = [
            text for field, text in MUST_MATCH.items() if len({plain(entry.get(field)) for entry in protocols}) > 1
        ]
        mark = f"; protocols differ in {', '.join(different)}" if different else ""
        values = [column[key].text if key in column else "" for column in columns]
        rows.append([f"{key[0]}, {steps(key[1])}{mark}", *values])
    return rows


def _newest(run: Run) -> dict[tuple[str, str], Measurement]:
    """Name and number of network calls -> the newest Frechet distance."""
    newest: dict[tuple[str, str], Measurement] = {}
    for measured in filter(lambda m: m.is_distance, run.measurements):
        key = (measured.name, str(measured.protocol.get("nfe")))
        before = newest.get(key)
        if before is None or _recency(measured) >= _recency(before):
            newest[key] = measured
    return newest


def _recency(measured: Measurement) -> tuple[float, bool]:
    """Sort key, larger for newer; at equal steps an evaluation ranks above a measurement during training."""
    return number(measured.protocol.get("step")) or 0, not measured.protocol.get("in_training")


def _warnings(entry: Table) -> list[str]:
    warnings = entry.get("warnings")
    return [str(warning) for warning in warnings] if isinstance(warnings, list) else []


def _protocol(entry: Table) -> str:
    """A protocol as a sentence."""
    templates = {
        "protocol": "protocol {}",
        "num_samples": "{} samples",
        "labels": "{} labels",
        "seed": "seed {}",
        "seeds": "mean over the seeds {}",
        "ema": "EMA {}",
        "step": "step {}",
        "sampler": "sampler {}",
        "guidance": "guidance {}",
        "interval": "in {}",
        "reference": "against {}",
        "reference_images": "({} real images)",
    }
    parts = [text.format(format_value(entry[key])) for key, text in templates.items() if entry.get(key) is not None]
    return ", ".join(parts).replace(", (", " (") + (", measured during training" if entry.get("in_training") else "")


def measured(run: Run) -> Table:
    """The table of all measurements except those during training, which are curves; newest last."""
    entries: list[Table] = []
    for measurement in run.measurements:
        if not measurement.protocol.get("in_training") and measurement.protocol not in entries:
            entries.append(measurement.protocol)
    entries = entries[-MAX_ROWS:]
    numbers = {id(entry): {m.name: m.value for m in run.measurements if m.protocol == entry} for entry in entries}
    names = list(dict.fromkeys(name for entry in entries for name in numbers[id(entry)]))
    columns = {key: text for key, text in COLUMNS.items() if any(entry.get(key) is not None for entry in entries)}
    rows = [
        [e.get("nfe", ""), *(numbers[id(e)].get(name, "") for name in names), *(e.get(key, "") for key in columns)]
        for e in entries
    ]
    heads = ["network calls", *names, *columns.values()]
    return {"heads": heads, "rows": rows, "whole": [json.dumps(entry, indent=1) for entry in entries]}

"""What was measured of a run, in words and numbers, for its report."""

import json
from typing import Any

from mf_dist.report.collect import Measurement, Run, Table, number
from mf_dist.report.curves import steps
from mf_dist.report.facts import plain, short

MAX_ROWS = 200
"""Of the table of measurements: the newest."""
COLUMNS = {
    "sampler": "sampler",
    "step": "step",
    "ema": "EMA",
    "num_samples": "samples",
    "labels": "labels",
    "seed": "seed",
    "features": "features",
    "reference": "reference",
    "reference_images": "real images",
    "precision": "precision",
}
"""Of a measurement's protocol, in the table; the whole is behind a click."""
SAME = {
    "num_samples": "samples",
    "labels": "labels",
    "seed": "seed",
    "features": "features",
    "features_sha256": "weights of the features",
    "reference_sha256": "real images",
    "reference_images": "number of real images",
    "precision": "precision",
    "in_training": "being of training",
}
"""Of a protocol, what must be the same for two distances to be compared."""

Row = list[Any]


def headline(run: Run) -> list[Table]:
    """The newest Frechet distance at each number of network calls, with what it was measured on."""
    ranked = sorted(
        _newest(run).values(), key=lambda m: (bool(m.protocol.get("in_training")), number(m.protocol.get("nfe")) or 0)
    )
    return [
        {
            "name": m.name,
            "steps": steps(m.protocol.get("nfe")),
            "value": f"{m.value:.4g}",
            "protocol": _protocol(m.protocol),
            "warnings": _warnings(m.protocol),
        }
        for m in ranked[:4]
    ]


def compared(runs: list[Run]) -> list[Row]:
    """Of each Frechet distance at each number of network calls: its name, with what is not the same in the protocols,
    and the newest value of each run."""
    found = [_newest(run) for run in runs]
    rows: list[Row] = []
    for key in sorted({key for one in found for key in one}, key=lambda key: (key[0], len(key[1]), key[1])):
        protocols = [one[key].protocol for one in found if key in one]
        apart = [text for part, text in SAME.items() if len({plain(entry.get(part)) for entry in protocols}) > 1]
        mark = f"; protocols differ in {', '.join(apart)}" if apart else ""
        values = [f"{one[key].value:.4g}" if key in one else "" for one in found]
        rows.append([f"{key[0]}, {steps(key[1])}{mark}", *values])
    return rows


def _newest(run: Run) -> dict[tuple[str, str], Measurement]:
    """Name and number of network calls -> the newest Frechet distance."""
    newest: dict[tuple[str, str], Measurement] = {}
    for measured in filter(lambda m: m.is_distance, run.measurements):
        key = (measured.name, str(measured.protocol.get("nfe")))
        before = newest.get(key)
        if before is None or _age(measured) >= _age(before):
            newest[key] = measured
    return newest


def _age(measured: Measurement) -> tuple[float, bool]:
    """What is newer is larger; of the same step, an evaluation counts more than a measurement during training."""
    return number(measured.protocol.get("step")) or 0, not measured.protocol.get("in_training")


def _warnings(entry: Table) -> list[str]:
    said = entry.get("warnings")
    return [str(one) for one in said] if isinstance(said, list) else []


def _protocol(entry: Table) -> str:
    """A measurement's conditions, in a sentence."""
    words = {
        "num_samples": "{} samples",
        "labels": "{} labels",
        "seed": "seed {}",
        "ema": "EMA {}",
        "step": "step {}",
        "sampler": "sampler {}",
        "reference": "against {}",
        "reference_images": "({} real images)",
    }
    said = [text.format(short(entry[key])) for key, text in words.items() if entry.get(key) is not None]
    return ", ".join(said).replace(", (", " (") + (", measured during training" if entry.get("in_training") else "")


def measured(run: Run) -> Table:
    """The table of all measurements but those during training, which are curves; newest last."""
    entries: list[Table] = []
    for one in run.measurements:
        if not one.protocol.get("in_training") and one.protocol not in entries:
            entries.append(one.protocol)
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

"""Results together: the mean over several seeds, and whether two results differ by more than their noise."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mf_dist.evaluation.protocols import ADM, PROTOCOLS
from mf_dist.evaluation.report import MACHINE, METRIC_SETTINGS, OF_METRICS, read_entries
from mf_dist.runtime.errors import UserError

SAME = (
    *("protocol", "num_samples", "labels", "resolution", "features_sha256", "resize"),
    *("reference_sha256", "reference_images"),
)
"""What two results must share to be compared; labels only if both know them, unlike those of images from files."""
MADE = ("sampler", "times", "ema", "guidance", "interval")
"""What two results need not share."""
Entry = dict[str, Any]


def summary(entries: Sequence[Entry]) -> Entry:
    """An entry of the means of each metric over entries of several seeds, with their standard deviation, the lowest
    value, and the 95 % band of the mean of independent samples."""
    first, n = entries[0], len(entries)
    own = {"seed", "pixels_sha256", *MACHINE, *METRIC_SETTINGS, *OF_METRICS}
    shared = {key: value for key, value in first.items() if key not in own}
    values = {name: [entry["metrics"][name] for entry in entries] for name in first["metrics"]}
    widths = {name: [entry.get("plus_minus_95", {}).get(name) for entry in entries] for name in values}
    protocol = PROTOCOLS[first.get("protocol", ADM.name)]
    warnings = [warning for entry in entries for warning in entry["warnings"]]
    of_one_seed = protocol.overridden_seeds(1)
    return {
        "metrics": {name: statistics.fmean(of_name) for name, of_name in values.items()},
        "plus_minus_95": {name: math.hypot(*of_name) / n for name, of_name in widths.items() if None not in of_name},
        "std": {name: statistics.stdev(of_name) for name, of_name in values.items()},
        "lowest": {name: min(of_name) for name, of_name in values.items()},
        "seeds": [entry["seed"] for entry in entries],
        **shared,
        **{key: first[key] for key in MACHINE if key != "seconds"},
        "seconds": {"features": sum(entry["seconds"].get("features", 0.0) for entry in entries)},
        "warnings": [*(w for w in dict.fromkeys(warnings) if w not in of_one_seed), *protocol.overridden_seeds(n)],
    }


def entry_against(path: Path, wanted: Entry, metric: str) -> Entry:
    """The entry of a run's folder or a metrics.json that is compared with a result of the protocol `wanted`: of those
    that can be, of its last step, with the fewest network calls (which only images from files leave open), made most
    like them, of the most seeds, the newest. Raises UserError if it has none, or only of other protocols."""
    file = path / "eval/metrics.json" if (path / "eval").is_dir() else path / "metrics.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--against {str(path)!r}: no results in {str(file)!r}")
    found = [
        entry
        for entry in read_entries(file)
        if not entry.get("sweep") and not entry.get("in_training") and _same_or_unknown("nfe", entry, wanted)
    ]
    named = [entry for entry in found if metric in entry["metrics"]]
    if not named:
        names = sorted({name for entry in found for name in entry["metrics"]})
        has = f"it has {', '.join(names)}" if names else f"it has no results of nfe {wanted.get('nfe')}"
        raise UserError(f"--against {str(file)!r}: no {metric} in it; {has}")
    differences = [_differences(entry, wanted) for entry in named]
    if all(differences):
        raise UserError(f"--against {str(file)!r}: another protocol; {differences[-1]}")
    comparable = [entry for entry, difference in zip(named, differences, strict=True) if not difference]

    def rank(entry: Entry) -> tuple[int, ...]:
        alike = sum(entry.get(key) == wanted.get(key) for key in MADE)
        return entry.get("step", 0), -entry.get("nfe", 0), alike, len(entry.get("seeds", [0]))

    entry = sorted(comparable, key=rank)[-1]
    if metric not in entry.get("plus_minus_95", {}):
        raise UserError(f"--against {str(file)!r}: its {metric} has no band at 95 %; measure it again")
    return entry


def _differences(entry: Entry, wanted: Entry) -> str:
    """The fields that forbid a comparison; empty without any."""
    both = [{"protocol": ADM.name, **one} for one in (entry, wanted)]
    pairs = {key: [one.get(key) for one in both] for key in SAME}
    if _same_or_unknown("labels", *both):
        del pairs["labels"]
    return ", ".join(
        f"its {key} is {theirs}, this one's {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours
    )


def _same_or_unknown(key: str, entry: Entry, wanted: Entry) -> bool:
    return None in (entry.get(key), wanted.get(key)) or entry[key] == wanted[key]


def verdict(entry: Entry, other: Entry, metric: str) -> str:
    """A sentence: which of the two is lower, or that their noise explains the difference. The noise of both is taken as
    independent; samples of one seed share their noise, and differ by less."""
    value, theirs = entry["metrics"][metric], other["metrics"][metric]
    width, their_width = entry["plus_minus_95"][metric], other["plus_minus_95"][metric]
    difference, noise = value - theirs, math.hypot(width, their_width)
    keys = ("images", "nfe", "step", *MADE, "seed", "seeds")
    said = ", ".join(f"{key} {other[key]}" for key in keys if other.get(key) is not None)
    text = f"{metric} {value:.6g} +- {width:.2g} against {theirs:.6g} +- {their_width:.2g} ({said})"
    change = f"a difference of {difference:+.3g} +- {noise:.2g} at 95 %"
    if abs(difference) <= noise:
        return f"{text}: {change}, no more than noise"
    return f"{text}: {change}, {'lower' if difference < 0 else 'higher'} beyond noise"

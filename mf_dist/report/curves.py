"""The curves of runs, as plain data for the page's plots."""

import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mf_dist.config.cost import forward_flops, forwards_per_image
from mf_dist.config.loader import from_tree
from mf_dist.config.objectives import OBJECTIVES
from mf_dist.config.schema import Config
from mf_dist.report.collect import Run, describe_gaps, number, table
from mf_dist.runtime.errors import UserError

POINTS, STRETCHES = 600, 300
"""A curve of more than POINTS points is drawn as at most STRETCHES stretches."""
DISTANCE = re.compile(r"(?P<name>(fid|fd_)[^/]*)/nfe(?P<nfe>\d+)/ema(?P<ema>.+)")
"""Key in metrics.jsonl of a Frechet distance measured during training."""
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s by a part of the device's name; the first match counts (NVIDIA's data sheets)."""

Point = tuple[float, float, float]
"""Images seen, value, step."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    keys: dict[str, str]
    """Key in metrics.jsonl -> label of its curve."""
    is_log: bool = False


def _charts_of_objectives() -> list[Chart]:
    """Of what the losses log."""
    found: dict[str, Chart] = {}
    sums = {name: curve for objective in OBJECTIVES.values() for name, curve in objective.SUMS.items() if curve}
    for name, curve in sums.items():
        chart = found.setdefault(curve.title, Chart(curve.title, curve.unit, {}, curve.is_log))
        chart.keys[name] = curve.label
    return list(found.values())


LOSSES = (
    *_charts_of_objectives(),
    Chart("Gradient norm", "all ranks, before clipping", {"grad_norm": ""}, True),
    Chart("Learning rate", "", {"lr": ""}),
)
SPEED = (
    Chart("Throughput", "images / s, all ranks", {"images_per_second": ""}),
    Chart("Waiting for data", "share of a step", {"data_wait_share": ""}),
    Chart("Memory", "GiB, peak of rank 0", {"memory_gib": ""}),
    Chart("Model FLOP/s", "TFLOP/s per rank", {"tflops_per_rank": ""}),
    Chart("MFU", "share of the device's bf16 peak", {"mfu": ""}),
)


def charts(runs: list[Run], chosen: tuple[Chart, ...]) -> list[dict[str, Any]]:
    """The charts that have a curve, as data for the page."""
    drawn = []
    for chart in chosen:
        traces = [
            trace
            for index, run in enumerate(runs)
            for dash, (key, label) in enumerate(chart.keys.items())
            for trace in _traces(_points(run, key), run, index, label, dash, len(runs))
        ]
        if traces:
            drawn.append(
                {
                    "title": chart.title,
                    "unit": chart.unit,
                    "log": chart.is_log,
                    "traces": traces,
                    "gaps": [gap for run in runs for gap in _gaps(run, chart)],
                }
            )
    return drawn


def missing(runs: list[Run], drawn: list[dict[str, Any]], chosen: tuple[Chart, ...]) -> list[str]:
    """Titles of the charts for which no run has numbers, with the reason if known."""
    titles_drawn = {chart["title"] for chart in drawn}
    titles = []
    for chart in (chart for chart in chosen if chart.title not in titles_drawn):
        reasons = [reason for run in runs for reason in [*_gaps(run, chart), *_why_no_mfu(run, chart)]]
        titles.append(chart.title + (f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""))
    return titles


def _gaps(run: Run, chart: Chart) -> list[str]:
    """Sentences on the chart's values that are not finite."""
    return describe_gaps({key: run.gaps[key] for key in chart.keys if key in run.gaps})


def _why_no_mfu(run: Run, chart: Chart) -> list[str]:
    """Why a run has no MFU, which requires bf16 and a device whose peak is known."""
    if "mfu" not in chart.keys or device_peak(run) is not None:
        return []
    versions, engine = table(run.state.get("versions")), table(run.config.get("engine"))
    if not versions:
        return ["the device is recorded in the first checkpoint, and there is none yet"]
    if not any(part in str(versions.get("device")) for part in PEAKS):
        return [f"no known peak of {versions.get('device')}"]
    return [f"the known peak is for bf16, the run's precision is {engine.get('precision', 'unknown')}"]


def distances(runs: list[Run]) -> list[dict[str, Any]]:
    """A chart for each Frechet distance by name: those measured during training as curves, those of tools/fid_eval.py
    as unconnected points, since their protocols may differ. A curve has its points' 95 % bands, if all have one."""
    traces: dict[str, list[dict[str, Any]]] = {}
    for index, run in enumerate(runs):
        bands = _bands(run)
        for (name, nfe, ema, are_points), points in _distance_points(run).items():
            label = f"{steps(nfe)}, EMA {ema}" + (", evaluated" if are_points else "")
            dash = max(0, int(nfe).bit_length() - 1)
            for trace in _traces(points, run, index, label, dash, len(runs)):
                widths = [bands.get((name, nfe, ema, step)) for step in trace["step"]]
                band = {} if are_points or "low" in trace else _band(trace["y"], widths)
                traces.setdefault(name, []).append({**trace, **band, "points": are_points})
    return [
        {"title": name, "unit": "lower is better", "log": True, "traces": of_name, "gaps": []}
        for name, of_name in traces.items()
    ]


def _bands(run: Run) -> dict[tuple[str, str, str, Any], float]:
    """(metric, network calls, EMA, step) -> half the width of the 95 % band of a distance measured during training."""
    return {
        (m.name, str(m.protocol.get("nfe")), str(m.protocol.get("ema")), m.protocol.get("step")): m.plus_minus
        for m in run.measurements
        if m.protocol.get("in_training") and m.plus_minus is not None
    }


def _band(values: list[float], widths: list[float | None]) -> dict[str, Any]:
    pairs = [(value, width) for value, width in zip(values, widths, strict=True) if width is not None]
    if len(pairs) < len(values):
        return {}
    low, high = (_rounded(value + sign * width for value, width in pairs) for sign in (-1, 1))
    return {"low": low, "high": high, "is_band": True}


def steps(nfe: Any) -> str:
    return f"{nfe} step{'' if str(nfe) == '1' else 's'}"


def _distance_points(run: Run) -> dict[tuple[str, str, str, bool], list[Point]]:
    """(metric, network calls, EMA, whether from tools/fid_eval.py) -> points. Distances measured during training are
    read from metrics.jsonl; eval/metrics.json repeats them."""
    series: dict[tuple[str, str, str, bool], list[Point]] = {}
    for line in run.lines:
        for key, value in line.items():
            if match := DISTANCE.fullmatch(key):
                points = series.setdefault((match["name"], match["nfe"], match["ema"], False), [])
                points.append((line["samples_seen"], value, line["step"]))
    for measured in run.measurements:
        entry = measured.protocol
        step, nfe, ema = entry.get("step"), entry.get("nfe"), str(entry.get("ema"))
        if measured.is_distance and not entry.get("in_training") and isinstance(step, int) and isinstance(nfe, int):
            recorded = number(entry.get("samples_seen"))
            seen = run.images(step) if recorded is None else recorded
            if seen is not None:
                series.setdefault((measured.name, str(nfe), ema, True), []).append((seen, measured.value, step))
    return {key: sorted(points) for key, points in sorted(series.items())}


def _points(run: Run, key: str) -> list[Point]:
    scale, source = 1.0, key
    if key in ("tflops_per_rank", "mfu") and not any(key in line for line in run.lines):
        rate = tflops_per_image(run)
        peak = device_peak(run)
        if rate is None or (key == "mfu" and peak is None):
            return []
        scale, source = rate if key == "tflops_per_rank" else rate * 1e12 / (peak or 1), "images_per_second"
    return [(line["samples_seen"], line[source] * scale, line["step"]) for line in run.lines if source in line]


def tflops_per_image(run: Run) -> float | None:
    """TFLOP of training on an image (cost.py) per rank; None if the config or the number of ranks is unknown."""
    try:
        config = from_tree(Config, run.config, "config")
        ranks = int(run.state["versions"]["ranks"])
        return forwards_per_image(config) * forward_flops(config.model) / 1e12 / ranks
    except (UserError, KeyError, TypeError, ValueError, AssertionError, ZeroDivisionError):
        return None


def device_peak(run: Run) -> float | None:
    """bf16 FLOP/s of the run's device; None if unknown or if the run is not in bf16."""
    versions, engine = run.state.get("versions"), run.config.get("engine")
    if not isinstance(versions, dict) or not isinstance(engine, dict) or engine.get("precision") != "bf16":
        return None
    return next((peak for part, peak in PEAKS.items() if part in str(versions.get("device"))), None)


def _traces(points: list[Point], run: Run, index: int, label: str, dash: int, count: int) -> Iterator[dict[str, Any]]:
    if not points:
        return
    name = " · ".join(part for part in (run.name if count > 1 else "", label) if part)
    yield {"name": name or run.name, "run": index, "dash": dash, "of": len(points), **thin(points)}


def thin(points: list[Point]) -> dict[str, list[float]]:
    """x, y and step of all points; above POINTS the median of each stretch at its end, with its minimum and maximum."""
    if len(points) <= POINTS:
        x, y, step = zip(*points, strict=True)
        return {"x": list(x), "y": _rounded(y), "step": list(step)}
    size = -(-len(points) // STRETCHES)
    stretches = [points[first : first + size] for first in range(0, len(points), size)]
    values = [[value for _, value, _ in stretch] for stretch in stretches]
    return {
        "x": [stretch[-1][0] for stretch in stretches],
        "y": _rounded(map(statistics.median, values)),
        "low": _rounded(map(min, values)),
        "high": _rounded(map(max, values)),
        "step": [stretch[-1][2] for stretch in stretches],
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]

"""The curves of runs, as plain tables for the page's plots."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mf_dist.config import Config
from mf_dist.config_loader import from_tree
from mf_dist.cost import forward_flops, forwards_per_image
from mf_dist.errors import UserError
from mf_dist.report.collect import Run

POINTS = 1500
"""Of a curve, at most, in a report of one run."""
DISTANCE = re.compile(r"(?P<name>(fid|fd_)[^/]*)/nfe(?P<nfe>\d+)/ema(?P<ema>.+)")
"""A Frechet distance that was measured during training, in metrics.jsonl."""
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
}  # fmt: skip
"""Dense bf16 FLOP/s by a part of the device's name, the first that fits (NVIDIA's data sheets)."""

Point = tuple[float, float, float]
"""Images seen, value, step."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    keys: dict[str, str]
    """Key of a line of metrics.jsonl -> what it is called; several are several curves."""
    is_log: bool = False


LOSSES = (
    Chart(
        "Raw loss", "per row, sum over C, H, W", {"raw_loss_r_equals_t": "r = t", "raw_loss_r_below_t": "r < t"}, True
    ),
    Chart("v-loss", "of u(z, t, t) against v", {"v_loss": ""}, True),
    Chart("|du/dt|", "norm per row", {"du_dt_norm": ""}),
    Chart("Gradient norm", "all ranks, before clipping", {"grad_norm": ""}, True),
    Chart("Learning rate", "", {"lr": ""}),
)
SPEED = (
    Chart("Throughput", "images / s, all ranks", {"images_per_second": ""}),
    Chart("Waiting for data", "share of a step", {"data_wait_share": ""}),
    Chart("Memory", "GiB, peak of rank 0", {"memory_gib": ""}),
    Chart("Model FLOP/s", "TFLOP/s a rank", {"tflops_per_rank": ""}),
    Chart("MFU", "share of the device's bf16 peak", {"mfu": ""}),
)


def charts(runs: list[Run], chosen: tuple[Chart, ...]) -> list[dict[str, Any]]:
    """For the page: of each chart its title and curves. One without a curve is left out."""
    found = []
    for chart in chosen:
        traces = [
            trace
            for index, run in enumerate(runs)
            for dash, (key, label) in enumerate(chart.keys.items())
            for trace in _traces(_points(run, key), run, index, label, dash, len(runs))
        ]
        if traces:
            found.append({"title": chart.title, "unit": chart.unit, "log": chart.is_log, "traces": traces})
    return found


def missing(drawn: list[dict[str, Any]], chosen: tuple[Chart, ...]) -> list[str]:
    """Titles of the charts that no run has numbers for."""
    shown = {chart["title"] for chart in drawn}
    return [chart.title for chart in chosen if chart.title not in shown]


def distances(runs: list[Run]) -> list[dict[str, Any]]:
    """A chart for every kind of Frechet distance: those during training as curves; those of tools/fid_eval.py as points
    that nothing joins, since their protocols may differ."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for index, run in enumerate(runs):
        for (name, nfe, ema, are_points), points in _distance_points(run).items():
            label = f"{steps(nfe)}, EMA {ema}" + (", evaluated" if are_points else "")
            dash = max(0, int(nfe).bit_length() - 1)
            for trace in _traces(points, run, index, label, dash, len(runs)):
                kinds.setdefault(name, []).append({**trace, "points": are_points})
    return [{"title": name, "unit": "lower is better", "log": True, "traces": found} for name, found in kinds.items()]


def steps(nfe: Any) -> str:
    return f"{nfe} step{'' if str(nfe) == '1' else 's'}"


def _distance_points(run: Run) -> dict[tuple[str, str, str, bool], list[Point]]:
    """(metric, network calls, EMA, whether it is of tools/fid_eval.py) -> points. What was measured during training is
    in the lines, and again in eval/metrics.json."""
    found: dict[tuple[str, str, str, bool], list[Point]] = {}
    for line in run.lines:
        for key, value in line.items():
            if match := DISTANCE.fullmatch(key):
                place = found.setdefault((match["name"], match["nfe"], match["ema"], False), [])
                place.append((line["samples_seen"], value, line["step"]))
    for measured in run.measurements:
        entry = measured.protocol
        step, nfe, ema = entry.get("step"), entry.get("nfe"), str(entry.get("ema"))
        if measured.is_distance and not entry.get("in_training") and isinstance(step, int) and isinstance(nfe, int):
            seen = run.images(step)
            if seen is not None:
                found.setdefault((measured.name, str(nfe), ema, True), []).append((seen, measured.value, step))
    return {key: sorted(points) for key, points in sorted(found.items())}


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
    """TFLOP of training on an image (cost.py), shared by the ranks; None where config or ranks are not known."""
    try:
        config = from_tree(Config, run.config, "config")
        ranks = int(run.state["versions"]["ranks"])
        return forwards_per_image(config) * forward_flops(config.model) / 1e12 / ranks
    except (UserError, KeyError, TypeError, ValueError, AssertionError, ZeroDivisionError):
        return None


def device_peak(run: Run) -> float | None:
    """bf16 FLOP/s of the run's device; None where it is not known or the run is not in bf16."""
    versions, engine = run.state.get("versions"), run.config.get("engine")
    if not isinstance(versions, dict) or not isinstance(engine, dict) or engine.get("precision") != "bf16":
        return None
    return next((peak for part, peak in PEAKS.items() if part in str(versions.get("device"))), None)


def _traces(points: list[Point], run: Run, index: int, label: str, dash: int, count: int) -> Iterator[dict[str, Any]]:
    if not points:
        return
    shown = thin(points, max(100, POINTS // count))
    x, y, step = zip(*shown, strict=True)
    name = " · ".join(part for part in (run.name if count > 1 else "", label) if part)
    yield {
        "name": name or run.name, "run": index, "dash": dash, "x": x, "y": [float(f"{value:.5g}") for value in y],
        "step": step, "of": len(points),
    }  # fmt: skip


def thin(points: list[Point], limit: int) -> list[Point]:
    """At most `limit` of them: of each stretch of the curve the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return points
    stretches = max(1, limit // 2 - 1)
    size = -(-(len(points) - 2) // stretches)
    kept = [points[0]]
    for first in range(1, len(points) - 1, size):
        stretch = points[first : min(first + size, len(points) - 1)]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}, key=lambda p: p[2])
    return [*kept, points[-1]]

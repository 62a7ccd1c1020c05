"""Sweeps of guidance, as charts: the distance against the scale."""

from typing import Any

from mf_dist.report.collect import Measurement, Run, Table, number
from mf_dist.report.curves import steps
from mf_dist.report.facts import format_value, plain
from mf_dist.report.results import MUST_MATCH

Curve = dict[float, Measurement]
"""Scale of guidance -> its newest measurement."""
SAME = ("checkpoint_sha256", "step", "ema", "sampler", "times", "vae_sha256", *MUST_MATCH)
"""Fields of a protocol that all points of a curve share."""


def sweeps(runs: list[Run]) -> list[Table]:
    """A chart for each Frechet distance by name, with a curve for each interval and number of network calls."""
    traces: dict[str, list[Table]] = {}
    for index, run in enumerate(runs):
        for (name, nfe, interval), curve in _curves(run).items():
            label = f"guidance in {interval}, {steps(nfe)}"
            of_name = traces.setdefault(name, [])
            dash = sum(trace["run"] == index for trace in of_name)
            of_name.append(
                {
                    "name": f"{run.name} · {label}" if len(runs) > 1 else label,
                    "run": index,
                    "dash": dash,
                    **_trace(curve),
                }
            )
    return [
        {"title": name, "unit": "lower is better", "log": False, "x": "guidance", "traces": of_name, "gaps": []}
        for name, of_name in traces.items()
    ]


def _curves(run: Run) -> dict[tuple[str, str, str], Curve]:
    """(metric, network calls, interval) -> curve. Of several protocols the one of the highest step, then the newest."""
    curves: dict[tuple[str, str, str], dict[str, Curve]] = {}
    for measured in filter(lambda m: m.is_distance, run.sweeps):
        entry = measured.protocol
        scale = number(entry.get("guidance"))
        if scale is not None:
            key = (measured.name, str(entry.get("nfe")), _interval(entry.get("interval")))
            of_key = curves.setdefault(key, {})
            same = plain([entry.get(field) for field in SAME])
            of_key[same] = of_key.pop(same, {}) | {scale: measured}  # the newest protocol last
    return {key: max(reversed(of_key.values()), key=_step) for key, of_key in curves.items()}


def _interval(value: Any) -> str:
    return f"[{', '.join(map(format_value, value))}]" if isinstance(value, list) else plain(value)


def _step(curve: Curve) -> float:
    return max(number(measured.protocol.get("step")) or 0 for measured in curve.values())


def _trace(curve: Curve) -> dict[str, Any]:
    scales = sorted(curve)
    return {
        "of": len(scales),
        "x": scales,
        "y": [float(f"{curve[scale].value:.5g}") for scale in scales],
        "step": [number(curve[scale].protocol.get("step")) or 0 for scale in scales],
    }

"""Options of the commands that sample, in place of the run's settings. No torch."""

import argparse
from typing import Literal

from mf_dist.runtime.errors import UserError


def add_sampling_options(parser: argparse.ArgumentParser, intervals: Literal["store", "append"] = "store") -> None:
    """--sampler, --guidance and --interval; what is not given is None. intervals: one, or a list of all given."""
    parser.add_argument(
        "--sampler",
        choices=("meanflow", "restart"),
        help="several steps along the path, or with fresh noise between them (default: the run's)",
    )
    parser.add_argument(
        "--guidance",
        type=_scale,
        metavar="SCALE",
        help="scale of guidance, for networks that take it as an input (default: the run's eval.guidance)",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        action=intervals,
        metavar="START,END",
        help="guidance applies for START <= t <= END, such as 0.4,0.65 (default: the run's eval.interval)",
    )


def _scale(text: str) -> float:
    if not (scale := _number(text)) >= 1:
        raise UserError(f"--guidance must be a number >= 1, got {text!r}")
    return scale


def _interval(text: str) -> tuple[float, float]:
    start, _, end = text.partition(",")
    interval = _number(start), _number(end)
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"--interval must be START,END with 0 <= START <= END <= 1, got {text!r}")
    return interval


def _number(text: str) -> float:
    """NaN, which no comparison accepts, for what is none."""
    try:
        return float(text) if float(text) < float("inf") else float("nan")
    except ValueError:
        return float("nan")

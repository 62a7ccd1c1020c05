"""A progress bar with throughput and ETA; in a log file one line every 30 s."""

import sys
from typing import Never

from tqdm import tqdm


def progress(total: int, unit: str, what: str, shown: bool = True) -> "tqdm[Never]":
    """Call update(n) on it; use it in a `with` block. shown=False: no output, for ranks other than 0. On a terminal a
    bar within another one stands below it, and vanishes at its end."""
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=unit,
        desc=what,
        mininterval=0.1 if on_terminal else 30,
        dynamic_ncols=on_terminal,
        position=None if on_terminal else 0,
        leave=None,  # but not below another
        disable=not shown,
    )

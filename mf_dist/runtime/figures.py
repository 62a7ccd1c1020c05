"""Numbers for people."""

import math


def three_digits(value: float) -> str:
    """At least three significant digits: 0.0144, 1.44, 14.4, 144, 1,440. Zero and what is not finite as it is."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded number
    return f"{value:.2e}" if exponent < -4 else f"{value:,.{max(0, 2 - exponent)}f}"

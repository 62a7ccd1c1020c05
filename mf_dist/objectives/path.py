"""The straight path from data to noise (rectified flow): t = 0 is data, t = 1 is noise.

Shapes: B rows, C channels, S side; times (B,).
"""

from torch import Tensor


def per_row(a: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to broadcast over images."""
    return a[:, None, None, None]


def path(x: Tensor, e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z = (1 - t) x + t e and the conditional velocity v = dz/dt = e - x; all (B, C, S, S)."""
    t = per_row(t)
    return (1 - t) * x + t * e, e - x

"""What a loss calls."""

from collections.abc import Callable

from torch import Tensor

Net = Callable[..., Tensor]
"""u = net(z, r, t, y), and (u, du) = net(z, r, t, y, tangent=(dz, dr, dt)); dtype=... in that dtype."""

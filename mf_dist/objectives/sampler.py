"""From noise to data in k network calls.

Each takes times 1 = t_0 > ... > t_k = 0, and noise (n, B, C, S, S): sample_restart takes n >= k, the others use the
first alone.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from mf_dist.objectives.network import Net
from mf_dist.objectives.path import path

Sampler = Callable[[Net, Tensor, Tensor, list[float]], Tensor]


def uniform_grid(nfe: int) -> list[float]:
    """Times 1 = t_0 > ... > t_nfe = 0, equally spaced."""
    return [1 - i / nfe for i in range(nfe)] + [0.0]


def sample_average(net: Net, noise: Tensor, y: Tensor, times: list[float]) -> Tensor:
    """z_r = z_t - (t - r) u(z_t, r, t | y) along the grid (MeanFlow, Algorithm 2 and its few-step form)."""
    z = noise[0]
    for t, r in pairwise(times):
        z = z - (t - r) * net(z, _rows(z, r), _rows(z, t), y)
    return z


def sample_restart(net: Net, noise: Tensor, y: Tensor, times: list[float]) -> Tensor:
    """Each call goes to t = 0, x = z - t u(z, 0, t | y); then fresh noise leads back to the next time (SoFlow,
    alpha-Flow's XL; multistep sampling of consistency models, arXiv 2303.01469, Algorithm 1)."""
    x = torch.zeros_like(noise[0])
    for e, t in zip(noise, times[:-1], strict=False):
        z, _ = path(x, e, _rows(x, t))
        x = z - t * net(z, _rows(z, 0.0), _rows(z, t), y)
    return x


def sample_euler(net: Net, noise: Tensor, y: Tensor, times: list[float]) -> Tensor:
    """Euler steps of the instantaneous velocity, z_r = z_t - (t - r) u(z_t, t, t | y): for plain flow matching,
    trained at r = t only."""
    z = noise[0]
    for t, r in pairwise(times):
        z = z - (t - r) * net(z, _rows(z, t), _rows(z, t), y)
    return z


def _rows(z: Tensor, time: float) -> Tensor:
    return torch.full((len(z),), time, device=z.device, dtype=z.dtype)


SAMPLERS: dict[str, Sampler] = {"meanflow": sample_average, "restart": sample_restart, "euler": sample_euler}
"""By the names in results."""

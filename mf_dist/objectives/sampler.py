"""From noise to data in k network calls (paper, Algorithm 2 and its few-step form)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from mf_dist.objectives.network import Net

Sampler = Callable[[Net, Tensor, Tensor, list[float]], Tensor]


def uniform_grid(nfe: int) -> list[float]:
    """Times 1 = t_0 > ... > t_nfe = 0, equally spaced."""
    return [1 - i / nfe for i in range(nfe)] + [0.0]


def sample_meanflow(net: Net, z: Tensor, y: Tensor, times: list[float]) -> Tensor:
    """z_r = z_t - (t - r) u(z_t, r, t | y) along the grid; z (B, C, S, S) is noise at times[0]."""
    for t, r in pairwise(times):
        z = z - (t - r) * net(z, _rows(z, r), _rows(z, t), y)
    return z


def sample_euler(net: Net, z: Tensor, y: Tensor, times: list[float]) -> Tensor:
    """Euler steps of the instantaneous velocity, z_r = z_t - (t - r) u(z_t, t, t | y): for plain flow matching,
    trained at r = t only."""
    for t, r in pairwise(times):
        z = z - (t - r) * net(z, _rows(z, t), _rows(z, t), y)
    return z


def _rows(z: Tensor, time: float) -> Tensor:
    return torch.full((len(z),), time, device=z.device, dtype=z.dtype)

"""A mixture of Gaussians in the plane, whose flow is known in closed form: the reference of tools/study/toy_flow.py.

x ~ sum_k N(m_k, s^2 I) / K, e ~ N(0, I), z_t = (1 - t) x + t e. Given component k, z_t ~ N((1 - t) m_k, q I) with
q = (1 - t)^2 s^2 + t^2, and x and e are Gaussian with the means below; weighted by the components' posteriors they give
    v(z, t) = E[e - x | z_t = z]                                        the marginal (instantaneous) velocity
    u(z, r, t) = 1/(t - r) integral from r to t of v(z_a, a) da         the average velocity along its trajectory
"""

import math

import torch
from torch import Tensor

STD = 0.25
"""s: the standard deviation of each component."""
RADIUS, COMPONENTS = 2.0, 5
"""The means lie on a circle."""


def means(dtype: torch.dtype = torch.float64) -> Tensor:
    """(K, 2)."""
    angle = 2 * math.pi * torch.arange(COMPONENTS, dtype=dtype) / COMPONENTS + math.pi / 2
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)


def sample_data(count: int, generator: torch.Generator) -> Tensor:
    """x (count, 2) fp64."""
    which = torch.randint(COMPONENTS, (count,), generator=generator)
    return means()[which] + STD * torch.randn(count, 2, dtype=torch.float64, generator=generator)


def marginal_velocity(z: Tensor, t: Tensor) -> Tensor:
    """v: z (B, 2), t (B,) in [0, 1] -> (B, 2)."""
    t = t[:, None, None]
    m = means(z.dtype)
    q = (1 - t) ** 2 * STD**2 + t**2
    off = z[:, None] - (1 - t) * m  # (B, K, 2)
    posterior = torch.softmax(-off.square().sum(dim=2) / (2 * q[:, :, 0]), dim=1)
    x = m + (1 - t) * STD**2 / q * off
    e = t / q * off
    return (posterior[:, :, None] * (e - x)).sum(dim=1)


def trajectory(z: Tensor, t: Tensor, r: Tensor, steps: int = 200) -> Tensor:
    """Positions (steps + 1, B, 2) on the marginal trajectory from z at t back to r, both (B,), by Runge-Kutta 4."""
    path, h = [z], (r - t) / steps
    for i in range(steps):
        a = t + i * h
        k1 = marginal_velocity(z, a)
        k2 = marginal_velocity(z + h[:, None] / 2 * k1, a + h / 2)
        k3 = marginal_velocity(z + h[:, None] / 2 * k2, a + h / 2)
        k4 = marginal_velocity(z + h[:, None] * k3, a + h)
        z = z + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(z)
    return torch.stack(path)


def average_velocity(z: Tensor, r: Tensor, t: Tensor, steps: int = 200) -> Tensor:
    """u: the displacement over the time, (z_t - z_r) / (t - r); r < t."""
    return (z - trajectory(z, t, r, steps)[-1]) / (t - r)[:, None]

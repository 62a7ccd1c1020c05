"""Classifier-free guidance built into the training target (MeanFlow paper, section "MeanFlow with Guidance"), and the
laws of guidance as an input of the network (iMF).

Shapes: B rows, of which the last B - n_eq have r < t; images (B, C, S, S), times t and labels y (B,).
"""

import torch
from torch import Tensor

from mf_dist.objectives.network import Net


def drop_labels(y: Tensor, uniforms: Tensor, num_r_equals_t: int, share: float, null_label: int) -> Tensor:
    """Replaces the label of `share` of all rows by the null label: y (B,), uniforms (B,) in [0, 1).

    As in MeanFlow's code, only r = t rows (the first num_r_equals_t) are dropped, each with probability
    share / (num_r_equals_t / B). If there are too few of them, every row is dropped with probability share."""
    if share > num_r_equals_t / len(y):
        return torch.where(uniforms < share, null_label, y)
    is_equal = torch.arange(len(y), device=y.device) < num_r_equals_t
    chance = share * len(y) / max(1, num_r_equals_t)
    return torch.where(is_equal & (uniforms < chance), null_label, y)


def guiding_velocities(
    net: Net, z: Tensor, t: Tensor, y: Tensor, n_eq: int, null_label: int, kappa: float
) -> tuple[Tensor, Tensor | None]:
    """u(z, t, t | null) on all rows and, if kappa is not 0, u(z, t, t | y) on the r < t rows, from one batched call; on
    r = t rows the latter is the regression's own."""
    null = torch.full_like(y, null_label)
    if not kappa:
        return net(z, t, t, null), None
    z, t, y = torch.cat([z, z[n_eq:]]), torch.cat([t, t[n_eq:]]), torch.cat([null, y[n_eq:]])
    u = net(z, t, t, y)
    return u[: len(null)], u[len(null) :]


def guided_velocity(v: Tensor, u_cond: Tensor | None, u_null: Tensor, omega: float | Tensor, kappa: float) -> Tensor:
    """v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null). omega: one for all rows, or
    (B, 1, 1, 1). u_cond may be None if kappa = 0."""
    v_g = omega * v + (1 - omega - kappa) * u_null
    return v_g if u_cond is None else v_g + kappa * u_cond


def sample_omega(uniforms: Tensor, largest: float, exponent: float) -> Tensor:
    """omega (B,) in [1, largest] of density proportional to omega^-exponent (iMF; the authors' sample_cfg_scale);
    uniforms (B,) in [0, 1)."""
    if exponent == 1:
        return largest**uniforms
    power = 1 - exponent
    return (1 + uniforms * (largest**power - 1)) ** (1 / power)


def sample_interval(uniforms: Tensor, num_r_equals_t: int) -> tuple[Tensor, Tensor]:
    """start in [0, 1/2) and end in [1/2, 1) of the guidance interval, both (B,) uniform; r = t rows, the first
    num_r_equals_t, get [0, 1] (iMF; the authors' sample_cfg_interval). uniforms (B, 2) in [0, 1)."""
    is_equal = torch.arange(len(uniforms), device=uniforms.device) < num_r_equals_t
    start, end = uniforms.unbind(dim=1)
    return torch.where(is_equal, 0.0, start / 2), torch.where(is_equal, 1.0, (1 + end) / 2)

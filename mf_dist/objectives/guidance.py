"""Classifier-free guidance built into the training target (paper, section "MeanFlow with Guidance")."""

import torch
from torch import Tensor

from mf_dist.config.schema import MeanFlowConfig
from mf_dist.objectives.path import per_row


def drop_labels(y: Tensor, uniforms: Tensor, num_r_equals_t: int, share: float, null_label: int) -> Tensor:
    """Replaces the label of `share` of all rows by the null label: y (B,), uniforms (B,) in [0, 1).

    As in the authors' code, only r = t rows (the first num_r_equals_t) are dropped, each with probability
    share / (num_r_equals_t / B). If there are too few of them, every row is dropped with probability share."""
    if share > num_r_equals_t / len(y):
        return torch.where(uniforms < share, null_label, y)
    is_equal = torch.arange(len(y), device=y.device) < num_r_equals_t
    chance = share * len(y) / max(1, num_r_equals_t)
    return torch.where(is_equal & (uniforms < chance), null_label, y)


def guided_velocity(
    v: Tensor, u_cond: Tensor | None, u_null: Tensor, t: Tensor, y: Tensor, null_label: int, recipe: MeanFlowConfig
) -> Tensor:
    """v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null), like v (B, C, S, S).

    Rows whose t lies outside [guidance_start, guidance_end], and rows with the null label, keep v.
    u_cond may be None if kappa = 0."""
    omega, kappa = recipe.omega, recipe.kappa
    v_g = omega * v + (1 - omega - kappa) * u_null
    if u_cond is not None:
        v_g = v_g + kappa * u_cond
    inside = (recipe.guidance_start <= t) & (t <= recipe.guidance_end) & (y != null_label)
    return torch.where(per_row(inside), v_g, v)

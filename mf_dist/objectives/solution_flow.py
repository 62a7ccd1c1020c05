"""The loss of SoFlow (arXiv 2512.15657): flow matching on r = t rows, the discrete target on r < t rows.

    residual    d = u - v_g on r = t rows, (u - u_tgt) / a on r < t rows (discrete.py)
    loss        mean over rows of w m / stopgrad((m + eps)^p),  m = mean over C, H, W of d^2,  w = 1 or a / 2

SoFlow writes the r < t rows' loss as <u, stopgrad(d / (m + eps)^p)>: the gradient is the same. The share a falls
exponentially over the run. Guidance fades where t is near 1, so that v_g is smooth in t.
"""

import torch
from torch import Tensor

from mf_dist.config.objectives import SolutionFlowConfig
from mf_dist.models.network import Network
from mf_dist.objectives.base import Loss, Sums, log_sums
from mf_dist.objectives.discrete import discrete_target, with_value
from mf_dist.objectives.guidance import guided_velocity, guiding_velocities
from mf_dist.objectives.network import Net
from mf_dist.objectives.path import path, per_row
from mf_dist.objectives.times import GAP, sample_times_by_row
from mf_dist.objectives.weighting import adaptive

FADE = 0.025
"""How abruptly guidance fades."""


def guidance_strength(t: Tensor, full_below: float) -> Tensor:
    """1 for t <= full_below, then 1 - exp(-FADE d / (1 - d)) with d = (1 - t) / (1 - full_below): 0 at t = 1."""
    d = ((1 - t) / max(1 - full_below, 1e-6)).clamp(0, 1 - 1e-6)
    return torch.where(t <= full_below, 1.0, 1 - torch.exp(-FADE * d / (1 - d)))


def faded_velocity(
    v: Tensor, u_cond: Tensor | None, u_null: Tensor, t: Tensor, y: Tensor, null_label: int, recipe: SolutionFlowConfig
) -> Tensor:
    """v_g, whose scale falls to 1 with the strength of guidance; rows with the null label keep v."""
    unguided = 1 - recipe.kappa
    omega = unguided + guidance_strength(t, recipe.guidance_full_below) * (recipe.omega - unguided)
    v_g = guided_velocity(v, u_cond, u_null, per_row(omega), recipe.kappa)
    return torch.where(per_row(y != null_label), v_g, v)


def solution_flow_loss(
    net: Net,
    x: Tensor,
    e: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    n_eq: int,
    null_label: int,
    share: Tensor,
    recipe: SolutionFlowConfig,
    in_bf16: bool = False,
) -> tuple[Tensor, Sums]:
    """x, e (B, C, S, S) and r, t (B,) in fp32, y (B,) with dropped labels, share () in (0, 1]; rows :n_eq have
    r = t. in_bf16: whether the layers compute in bf16."""
    z, v = path(x, e, t)
    z_lt, v_lt, r_lt, t_lt, y_lt = z[n_eq:], v[n_eq:], r[n_eq:], t[n_eq:], y[n_eq:]
    with torch.no_grad():
        if recipe.guided:
            u_null, u_cond_lt = guiding_velocities(net, z, t, y, n_eq, null_label, recipe.kappa)
            v_lt = faded_velocity(v_lt, u_cond_lt, u_null[n_eq:], t_lt, y_lt, null_label, recipe)
        a = torch.maximum(share, GAP / (t_lt - r_lt)).clamp(max=1)
        u_tgt_lt, u_lt = discrete_target(net, z_lt, v_lt, r_lt, t_lt, y_lt, a, in_fp32=in_bf16)

    u = net(z, r, t, y)

    v_eq = v[:n_eq]
    if recipe.guided:
        u_cond = u[:n_eq].detach() if recipe.kappa else None
        v_eq = faded_velocity(v_eq, u_cond, u_null[:n_eq], t[:n_eq], y[:n_eq], null_label, recipe)
    m_eq = (u[:n_eq] - v_eq).square().mean(dim=(1, 2, 3))
    m_lt = ((with_value(u[n_eq:], u_lt) - u_tgt_lt) / per_row(a)).square().mean(dim=(1, 2, 3))
    weighted = torch.cat(
        [
            adaptive(m_eq, recipe.adaptive_eps, recipe.adaptive_p),
            a / 2 * adaptive(m_lt, recipe.adaptive_eps, recipe.adaptive_p),
        ]
    )
    with torch.no_grad():
        rows, values = len(x), x[0].numel()
        sums = log_sums(
            raw_loss_r_equals_t=(values * m_eq.sum(), n_eq),
            raw_loss_r_below_t=(values * m_lt.sum(), rows - n_eq),
            loss=(weighted.sum(), rows),
            v_loss=((u - v).square().sum(), rows),
        )
    return weighted.mean(), sums


class SolutionFlowLoss(Loss):
    def __init__(self, net: Network, recipe: SolutionFlowConfig) -> None:
        super().__init__(net, recipe)
        self.recipe = recipe

    def forward(self, x: Tensor, y: Tensor, draws: dict[str, Tensor], schedule: Tensor) -> tuple[Tensor, Sums]:
        recipe, n_eq = self.recipe, self.num_r_equals_t(len(x))
        r, t = sample_times_by_row(
            draws["time_normals"],
            n_eq,
            (recipe.velocity_time_mean, recipe.velocity_time_std),
            (recipe.time_mean, recipe.time_std),
            (recipe.r_mean, recipe.r_std),
        )
        y = torch.where(draws["drop_uniforms"] < recipe.label_drop, self.null_label, y)
        e, null = draws["e"], self.null_label
        return solution_flow_loss(self.net, x, e, r, t, y, n_eq, null, schedule, recipe, self.in_bf16)

"""The loss of alpha-Flow (arXiv 2510.20771), whose target changes over the run.

    trajectory flow matching    u_tgt = v_g
    discrete target             as in discrete.py, clipped, with a share a that falls from 1 to 0 by a sigmoid
    MeanFlow target             u_tgt = v_g - (t - r) du/dt, by a Jacobian-vector product along v_g (meanflow.py)
    loss                        mean over rows of w m / stopgrad(m + eps),  m = mean over C, H, W of (u - u_tgt)^2,
                                w = a on r < t rows of the discrete target, else 1

Labels are dropped before guidance, on rows within the guidance interval; unlike MeanFlow's, those rows are guided too.
"""

import torch
from torch import Tensor

from mf_dist.config.objectives import AlphaFlowConfig
from mf_dist.models.network import Network
from mf_dist.objectives.base import Loss, Sums
from mf_dist.objectives.discrete import discrete_target, with_value
from mf_dist.objectives.guidance import guided_velocity, guiding_velocities
from mf_dist.objectives.meanflow import meanflow_sums
from mf_dist.objectives.path import path, per_row
from mf_dist.objectives.times import sample_times
from mf_dist.objectives.weighting import adaptive


class AlphaFlowLoss(Loss):
    def __init__(self, net: Network, recipe: AlphaFlowConfig) -> None:
        super().__init__(net, recipe)
        self.recipe = recipe

    def forward(self, x: Tensor, y: Tensor, draws: dict[str, Tensor], schedule: Tensor) -> tuple[Tensor, Sums]:
        recipe, n_eq = self.recipe, self.num_r_equals_t(len(x))
        r, t = sample_times(draws["time_normals"], n_eq, recipe.time_mean, recipe.time_std)
        inside = (recipe.guidance_start <= t) & (t <= recipe.guidance_end)
        y = torch.where(inside & (draws["drop_uniforms"] < recipe.label_drop), self.null_label, y)
        z, v = path(x, draws["e"], t)
        lt, eq, v_lt, v_eq = slice(n_eq, None), slice(n_eq), v[n_eq:], v[:n_eq]
        with torch.no_grad():
            if recipe.guided:
                u_null, u_cond_lt = guiding_velocities(self.net, z, t, y, n_eq, self.null_label, recipe.kappa)
                v_g = guided_velocity(v_lt, u_cond_lt, u_null[lt], recipe.omega, recipe.kappa)
                v_lt = torch.where(per_row(inside[lt]), v_g, v_lt)
            u_tgt, u_lt, du_dt = v_lt, None, None
            if self.phase == recipe.DISCRETE and n_eq < len(x):
                rows = z[lt], v_lt, r[lt], t[lt], y[lt]
                u_tgt, u_lt = discrete_target(self.net, *rows, schedule, in_fp32=self.in_bf16)
                u_tgt = u_tgt.clamp(-recipe.clip, recipe.clip)
            elif self.phase == recipe.MEANFLOW and n_eq < len(x):
                direction = v_lt, torch.zeros_like(t[lt]), torch.ones_like(t[lt])
                _, du_dt = self.net(z[lt], r[lt], t[lt], y[lt], tangent=direction)
                u_tgt = v_lt - per_row(t - r)[lt] * du_dt

        u = self.net(z, r, t, y)

        if recipe.guided:
            u_cond = u[eq].detach() if recipe.kappa else None
            v_g = guided_velocity(v_eq, u_cond, u_null[eq], recipe.omega, recipe.kappa)
            v_eq = torch.where(per_row(inside[eq]), v_g, v_eq)
        squares = (torch.cat([u[eq], with_value(u[lt], u_lt)]) - torch.cat([v_eq, u_tgt])).square()
        weighted = adaptive(squares.mean(dim=(1, 2, 3)), recipe.adaptive_eps)
        if self.phase == recipe.DISCRETE:
            weighted = torch.cat([weighted[eq], schedule * weighted[lt]])
        return weighted.mean(), meanflow_sums(squares.sum(dim=(1, 2, 3)), weighted, u, v, du_dt, n_eq)

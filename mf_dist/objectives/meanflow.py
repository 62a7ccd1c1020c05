"""The MeanFlow loss (paper, Algorithm 1 with guidance) as a target, then an ordinary regression.

    MeanFlow identity   u = v - (t - r) du/dt,  du/dt = JVP of u at (z, r, t) along (v_g, 0, 1)
    target              u_tgt = stopgrad(v_g - (t - r) du/dt)
    loss                mean over rows of s / stopgrad((s + eps)^p),  s = sum over C, H, W of (u - u_tgt)^2

Only rows with r < t need the JVP, and rows with r = t get u(z, t, t | y) from the regression itself. Rows are
ordered: the first num_r_equals_t have r = t. With guidance and kappa > 0, at the paper's 25 % of r < t rows, a
step costs 4.75 forwards instead of 6, with the same result row for row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mf_dist.config.schema import MeanFlowConfig
from mf_dist.models.dit import DiT
from mf_dist.objectives.guidance import drop_labels, guided_velocity
from mf_dist.objectives.path import path, per_row
from mf_dist.objectives.times import sample_times

Net = Callable[..., Tensor]
"""u = net(z, r, t, y), and (u, du) = net(z, r, t, y, tangent=(dz, dr, dt))."""


class Draws(NamedTuple):
    """Random draws of one micro-batch: noise e (B, C, S, S), normals of the times (B, 2), uniforms of the label drop
    (B,)."""

    e: Tensor
    time_normals: Tensor
    drop_uniforms: Tensor


def meanflow_target(
    net: Net, z: Tensor, v: Tensor, r: Tensor, t: Tensor, y: Tensor, n_eq: int, null_label: int, recipe: MeanFlowConfig
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The parts of the target that do not depend on the regression: u_null on all rows (None without guidance), and on
    the r < t rows (the last B - n_eq) the guided velocity v_g and du/dt. Call under torch.no_grad()."""
    b, z_lt, v_lt, t_lt, y_lt = len(z), z[n_eq:], v[n_eq:], t[n_eq:], y[n_eq:]
    u_null, u_cond_lt = None, None
    if recipe.guided:
        null = torch.full_like(y, null_label)
        rows = (torch.cat([z, z_lt]), torch.cat([t, t_lt]), torch.cat([null, y_lt])) if recipe.kappa else (z, t, null)
        u_both = net(rows[0], rows[1], rows[1], rows[2])
        u_null, u_cond_lt = u_both[:b], u_both[b:] if recipe.kappa else None
        v_lt = guided_velocity(v_lt, u_cond_lt, u_null[n_eq:], t_lt, y_lt, null_label, recipe)
    if n_eq == b:
        return u_null, v_lt, torch.zeros_like(v_lt)
    direction = (v_lt, torch.zeros_like(t_lt), torch.ones_like(t_lt))
    _, du_dt = net(z_lt, r[n_eq:], t_lt, y_lt, tangent=direction)
    return u_null, v_lt, du_dt


def meanflow_loss(
    net: Net, x: Tensor, e: Tensor, r: Tensor, t: Tensor, y: Tensor, n_eq: int, null_label: int, recipe: MeanFlowConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """x, e (B, C, S, S) and r, t (B,) in fp32, y (B,) with dropped labels; rows :n_eq have r = t.

    Returns the loss (scalar, fp32) and sums over rows for the log (see `log_sums`)."""
    z, v = path(x, e, t)
    with torch.no_grad():
        u_null, v_lt, du_dt = meanflow_target(net, z, v, r, t, y, n_eq, null_label, recipe)

    u = net(z, r, t, y)

    v_eq = v[:n_eq]
    if u_null is not None:
        v_eq = guided_velocity(v_eq, u[:n_eq].detach(), u_null[:n_eq], t[:n_eq], y[:n_eq], null_label, recipe)
    u_tgt = torch.cat([v_eq, v_lt - per_row(t - r)[n_eq:] * du_dt])
    s = (u - u_tgt).square().sum(dim=(1, 2, 3))
    weighted = s / (s.detach() + recipe.adaptive_eps) ** recipe.adaptive_p
    return weighted.mean(), log_sums(s, weighted, u, v, du_dt, n_eq)


@torch.no_grad()
def log_sums(s: Tensor, weighted: Tensor, u: Tensor, v: Tensor, du_dt: Tensor, n_eq: int) -> dict[str, Tensor]:
    """(sum over rows, number of rows) of each logged quantity, so that means over ranks and steps are exact.

    raw_loss: s on r = t and on r < t rows; v_loss: sum of (u - v)^2 on all rows, as the authors log it;
    du_dt_norm: the root of sum (du/dt)^2 on r < t rows."""
    v_loss = (u - v).square().sum()
    du_dt_norm = du_dt.square().sum(dim=(1, 2, 3)).sqrt().sum()
    n_lt = len(s) - n_eq
    sums = [s[:n_eq].sum(), s[n_eq:].sum(), weighted.sum(), v_loss, du_dt_norm]
    names = ["raw_loss_r_equals_t", "raw_loss_r_below_t", "loss", "v_loss", "du_dt_norm"]
    counts = [n_eq, n_lt, len(s), len(s), n_lt]
    return {
        name: torch.stack([total.float(), torch.full_like(total, n, dtype=torch.float)])
        for name, total, n in zip(names, sums, counts, strict=True)
    }


class MeanFlowLoss(nn.Module):
    """The loss of one micro-batch as a module: one engine call runs target and regression."""

    def __init__(self, net: DiT, null_label: int, recipe: MeanFlowConfig) -> None:
        super().__init__()
        self.net, self.null_label, self.recipe = net, null_label, recipe
        self.share_numerator, self.share_denominator = recipe.share_r_equals_t.as_integer_ratio()

    def forward(self, x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, C, S, S) latents as the network sees them, y (B,) labels before the label drop."""
        recipe = self.recipe
        n_eq = len(x) * self.share_numerator // self.share_denominator
        r, t = sample_times(draws.time_normals, n_eq, recipe.time_mean, recipe.time_std)
        y = drop_labels(y, draws.drop_uniforms, n_eq, recipe.label_drop, self.null_label)
        return meanflow_loss(self.net, x, draws.e, r, t, y, n_eq, self.null_label, recipe)

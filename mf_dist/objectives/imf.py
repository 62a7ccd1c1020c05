"""The loss of improved MeanFlow (iMF, arXiv 2512.02012): guidance is an input, targets come from a second head.

The network has two heads, u and v, and inputs g = (omega, [start, end]): the scale and the interval of guidance. With
v(omega) = v-head at (z, t, t | y), the interval [0, 1], and v(1 | null) the same without class:

    guided velocity     v_g = v + (1 - 1 / omega') (v(omega') - v(1 | null)),  omega' = omega in the interval, else 1
    MeanFlow identity   u = v_g - (t - r) du/dt,  du/dt = JVP of u at (z, r, t) along (v(omega'), 0, 1)
    loss                mean over rows of A(u - u_tgt) + A(v-head - v_g),  A(d) = s / stopgrad((s + eps)^p),
                        s = sum over C, H, W of d^2

Rows whose label is dropped keep v. As in the authors' code v(1 | null) has omega = 1, and the network gets omega also
where t is outside the interval. They compute the velocity three times on all rows, and the JVP on all rows. Here r = t
rows, whose interval is [0, 1], take v(omega) from the regression, which computes just that, and only r < t rows have a
JVP: with half of the rows r = t, and 8 of 12 blocks in each head, 7.5 forwards instead of 9, the same row for row.
"""

import torch
from torch import Tensor

from mf_dist.config.objectives import ImfConfig
from mf_dist.models.imf_dit import Guidance, ImfDiT
from mf_dist.objectives.base import Loss, Sums, log_sums
from mf_dist.objectives.guidance import drop_labels, sample_interval, sample_omega
from mf_dist.objectives.meanflow import meanflow_sums
from mf_dist.objectives.network import Net
from mf_dist.objectives.path import path, per_row
from mf_dist.objectives.times import sample_times
from mf_dist.objectives.weighting import adaptive


def velocity_guided_by(v: Tensor, v_cond: Tensor, v_null: Tensor, omega: Tensor) -> Tensor:
    """v_g = v + (1 - 1 / omega) (v_cond - v_null), per row: omega (B,)."""
    return v + per_row(1 - 1 / omega) * (v_cond - v_null)


def imf_target(
    net: Net, z: Tensor, v: Tensor, r: Tensor, t: Tensor, y: Tensor, guidance: Guidance, n_eq: int, null_label: int
) -> tuple[Tensor, Tensor, Tensor]:
    """v(1 | null) on all rows, and on the r < t rows (the last B - n_eq) the guided velocity v_g and du/dt. Call under
    torch.no_grad()."""
    lt = slice(n_eq, None)
    z_lt, r_lt, t_lt, y_lt, guidance_lt = z[lt], r[lt], t[lt], y[lt], Guidance(*(a[lt] for a in guidance))
    inside = (guidance_lt.start <= t_lt) & (t_lt <= guidance_lt.end)
    omega = torch.where(inside, guidance_lt.omega, 1.0)
    times, labels = torch.cat([t, t_lt]), torch.cat([torch.full_like(y, null_label), y_lt])
    everywhere = Guidance(torch.cat([torch.ones_like(t), omega]), torch.zeros_like(times), torch.ones_like(times))
    v_head = net(torch.cat([z, z_lt]), times, times, labels, everywhere, head="v")
    v_null, v_cond = v_head[: len(z)], v_head[len(z) :]
    direction = v_cond, torch.zeros_like(t_lt), torch.ones_like(t_lt)
    _, du_dt = net(z_lt, r_lt, t_lt, y_lt, guidance_lt, tangent=direction)
    return v_null, velocity_guided_by(v[lt], v_cond, v_null[lt], omega), du_dt


def imf_loss(
    net: Net,
    x: Tensor,
    e: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    guidance: Guidance,
    n_eq: int,
    null_label: int,
    recipe: ImfConfig,
) -> tuple[Tensor, Sums]:
    """x, e (B, C, S, S), r, t and guidance (B,) in fp32, y (B,) with dropped labels; rows :n_eq have r = t and the
    interval [0, 1]."""
    z, v = path(x, e, t)
    with torch.no_grad():
        v_null, v_lt, du_dt = imf_target(net, z, v, r, t, y, guidance, n_eq, null_label)

    u, v_head = net(z, r, t, y, guidance, head="both")

    v_eq = velocity_guided_by(v[:n_eq], v_head[:n_eq].detach(), v_null[:n_eq], guidance.omega[:n_eq])
    v_g = torch.where(per_row(y == null_label), v, torch.cat([v_eq, v_lt]))
    u_tgt = torch.cat([v_g[:n_eq], v_g[n_eq:] - per_row(t - r)[n_eq:] * du_dt])
    s, s_head = ((a - b).square().sum(dim=(1, 2, 3)) for a, b in ((u, u_tgt), (v_head, v_g)))
    weighted = adaptive(s, recipe.adaptive_eps, recipe.adaptive_p)
    weighted = weighted + adaptive(s_head, recipe.adaptive_eps, recipe.adaptive_p)
    sums = log_sums(velocity_head=(s_head.detach().sum(), len(s_head)))
    return weighted.mean(), sums | meanflow_sums(s, weighted, u, v, du_dt, n_eq)


class ImfLoss(Loss):
    def __init__(self, net: ImfDiT, recipe: ImfConfig) -> None:
        super().__init__(net, recipe)
        self.recipe = recipe

    def forward(self, x: Tensor, y: Tensor, draws: dict[str, Tensor], schedule: Tensor) -> tuple[Tensor, Sums]:
        recipe, n_eq = self.recipe, self.num_r_equals_t(len(x))
        r, t = sample_times(draws["time_normals"], n_eq, recipe.time_mean, recipe.time_std)
        y = drop_labels(y, draws["drop_uniforms"], n_eq, recipe.label_drop, self.null_label)
        omega = sample_omega(draws["omega_uniforms"], recipe.omega_max, recipe.omega_exponent)
        guidance = Guidance(omega, *sample_interval(draws["interval_uniforms"], n_eq))
        return imf_loss(self.net, x, draws["e"], r, t, y, guidance, n_eq, self.null_label, recipe)

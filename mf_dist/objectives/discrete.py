"""The discrete target of SoFlow (arXiv 2512.15657) and alpha-Flow (arXiv 2510.20771): a second forward in place of a
Jacobian-vector product.

    s = t - a (t - r),  u_tgt = stopgrad(a v_g + (1 - a) u(z - (t - s) v_g, r, s))

The velocity v_g is taken for the share a of [r, t], and the network's own average velocity for the rest. At a = 1 it is
trajectory flow matching, u_tgt = v_g, which needs no second forward. As a -> 0, (u - u_tgt) / a -> u - v_g +
(t - r) du/dt: MeanFlow's residual.

The difference of two passes is divided by a, and with it their rounding errors: in bf16 they would exceed those of
MeanFlow's tangent (docs/performance.md). So where the layers compute in bf16, both passes of it are made in fp32.
"""

import torch
from torch import Tensor

from mf_dist.objectives.network import Net
from mf_dist.objectives.path import per_row


def discrete_target(
    net: Net, z: Tensor, v_g: Tensor, r: Tensor, t: Tensor, y: Tensor, share: Tensor, in_fp32: bool = False
) -> tuple[Tensor, Tensor | None]:
    """u_tgt (B, C, S, S) on rows with r < t; share () or (B,) in (0, 1]. in_fp32: computed in fp32, and then also
    u(z, r, t | y), for `with_value`. Call under torch.no_grad()."""
    share = share.expand_as(t)
    step = share * (t - r)
    z_s, s, u = z - per_row(step) * v_g, t - step, None
    if in_fp32:
        rows = torch.cat([z_s, z]), torch.cat([r, r]), torch.cat([s, t]), torch.cat([y, y])
        u_s, u = net(*rows, dtype=torch.float32).chunk(2)
    else:
        u_s = net(z_s, r, s, y)
    return per_row(share) * v_g + per_row(1 - share) * u_s, u


def with_value(u: Tensor, value: Tensor | None) -> Tensor:
    """`value`, if there is one, with the gradient of u."""
    return u if value is None else u + (value - u).detach()

"""The discrete target of SoFlow (arXiv 2512.15657) and alpha-Flow (arXiv 2510.20771): a second forward in place of a
Jacobian-vector product.

    s = t - a (t - r),  u_tgt = stopgrad(a v_g + (1 - a) u(z - (t - s) v_g, r, s))

The velocity v_g is taken for the share a of [r, t], and the network's own average velocity for the rest. At a = 1 it is
trajectory flow matching, u_tgt = v_g, which needs no second forward. As a -> 0, (u - u_tgt) / a -> u - v_g +
(t - r) du/dt: MeanFlow's residual.
"""

from torch import Tensor

from mf_dist.objectives.network import Net
from mf_dist.objectives.path import per_row


def discrete_target(net: Net, z: Tensor, v_g: Tensor, r: Tensor, t: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """u_tgt (B, C, S, S) on rows with r < t; share () or (B,) in (0, 1]. Call under torch.no_grad()."""
    share = share.expand_as(t)
    step = share * (t - r)
    u_s = net(z - per_row(step) * v_g, r, t - step, y)
    return per_row(share) * v_g + per_row(1 - share) * u_s

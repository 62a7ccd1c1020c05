"""Reference implementations: networks with a known average velocity, and the loss in full-batch form."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mf_dist.models.dit import DiT
from mf_dist.models.imf_dit import Guidance, ImfDiT


def small_dit(seed: int = 0, num_classes: int = 3, **changes) -> DiT:
    """A DiT in float64 with all weights random: with the initial weights u and du/dt are 0, which tests nothing."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"latent_size": 4, "latent_channels": 3, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
    return randomised(DiT(**{**sizes, **changes}, num_classes=num_classes, generator=g), g)


def small_imf_dit(seed: int = 0, num_classes: int = 3, **changes) -> ImfDiT:
    """As small_dit; 6 tokens of conditions, 2 shared blocks, one in each head."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"latent_size": 4, "latent_channels": 3, "patch_size": 2, "hidden_size": 16, "depth": 3, "num_heads": 2}
    tokens = {"class_tokens": 2, "guidance_tokens": 1, "start_tokens": 1, "end_tokens": 1, "time_tokens": 1}
    sizes |= {"head_depth": 1, **tokens, **changes}
    return randomised(ImfDiT(**sizes, num_classes=num_classes, generator=g), g)


@torch.no_grad()
def randomised(net, g):
    """In float64. Weights of norms and gates are near 1, which they multiply by."""
    for name, p in net.double().named_parameters():
        p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * (0.3 if p.ndim > 1 else 0.1))
        if "norm" in name or "gate" in name:
            p.add_(1)
    return net


def random_guidance(rows: int, dtype=torch.float64) -> Guidance:
    """omega in [1, 8], start in [0, 1/2], end in [1/2, 1]."""
    a, b, c = torch.rand(3, rows, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return Guidance(1 + 7 * a, b / 2, (1 + c) / 2)


def random_batch(num_classes, rows, n_eq, seed, dropped):
    """x, e, r, t, y in float64 for small_dit; the first n_eq rows have r = t, the rows `dropped` the null label."""
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, rows, 3, 4, 4, generator=g, dtype=torch.float64)
    t, r = torch.rand(2, rows, generator=g, dtype=torch.float64).sort(dim=0, descending=True)[0]
    r = torch.where(torch.arange(rows) < n_eq, t, r)
    y = torch.randint(0, num_classes, (rows,), generator=g)
    y[list(dropped)] = num_classes
    return x, e, r, t, y


def func_jvp(function, primals, tangents):
    """torch.func.jvp, with plain attention: the fused kernels have no forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


class Closed:
    """A closed-form u(z, r, t) with the network's interface; tangents by torch.func.jvp."""

    def __init__(self, u):
        self.u = u

    def __call__(self, z, r, t, y, tangent=None):
        if tangent is None:
            return self.u(z, r, t)
        return torch.func.jvp(self.u, (z, r, t), tangent)


def column(a):
    return a[:, None, None, None]


def point_mass(x0):
    """All data at x0; the average velocity is (z - x0) / t for every r."""
    return lambda z, r, t: (z - x0) / column(t)


class GaussianData:
    """Data N(0, s^2 I): z_t is N(0, sigma(t)^2 I); the marginal flow from t to r scales z by sigma(r) / sigma(t)."""

    def __init__(self, s):
        self.s = s

    def sigma(self, t):
        return ((1 - t) ** 2 * self.s**2 + t**2).sqrt()

    def velocity(self, z, t):
        return z * column((t - (1 - t) * self.s**2) / self.sigma(t) ** 2)

    def u(self, z, r, t):
        return z * column((1 - self.sigma(r) / self.sigma(t)) / (t - r))


def full_batch_rows(net, x, e, r, t, y, null_label, recipe, jvp=func_jvp):
    """Per-row s and weighted loss as in the authors' code: guidance and one JVP on every row of the batch."""
    z, v = (1 - column(t)) * x + column(t) * e, e - x
    u_cond, u_null = net(z, t, t, y).detach(), net(z, t, t, torch.full_like(y, null_label)).detach()
    inside = (t >= recipe.guidance_start) & (t <= recipe.guidance_end) & (y != null_label)
    omega = column(torch.where(inside, torch.full_like(t, recipe.omega), 1.0))
    kappa = column(torch.where(inside, torch.full_like(t, recipe.kappa), 0.0))
    v_g = omega * v + kappa * u_cond + (1 - omega - kappa) * u_null
    u, du_dt = jvp(lambda a, b, c: net(a, b, c, y), (z, r, t), (v_g, torch.zeros_like(r), torch.ones_like(t)))
    s = ((u - (v_g - column(t - r) * du_dt).detach()) ** 2).sum(dim=(1, 2, 3))
    return s, s / (s.detach() + recipe.adaptive_eps) ** recipe.adaptive_p

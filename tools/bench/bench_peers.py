"""The peers of tools/bench/bench_step.py: a DiT without tangent code, and the loss as other projects compute it.

All forms compute the same loss from the same draws (tim's up to its truncation error), which the bench checks before
it measures. Shapes as in mf_dist/models/dit.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mf_dist.models.dit import DiT
from mf_dist.objectives.meanflow import velocity_in_interval
from mf_dist.objectives.path import path, per_row


def layer_norm(x):
    """In fp32, as the kernels compute it: of bf16 values torch's forward mode makes fp32 tangents on a GPU."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


class PlainBlock(nn.Module):
    """adaLN-zero block of torch's own layers; parameter names as in our Block, so that weights can be copied."""

    def __init__(self, width, num_heads, plain_attention):
        super().__init__()
        self.num_heads, self.plain_attention = num_heads, plain_attention
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        h = layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(h)
        h = layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](h), approximate="tanh"))

    def attend(self, h):
        q, k, v = self.attention["qkv"](h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.plain_attention:  # torch.func.jvp cannot pass the fused kernels
            o = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v)
        return self.attention["proj"](o.transpose(1, 2).flatten(2))


class PlainDiT(DiT):
    """Our DiT's input and output layers around plain blocks."""

    def __init__(self, *, plain_attention, hidden_size, num_heads, depth, **rest):
        super().__init__(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **rest)
        self.blocks = nn.ModuleList(PlainBlock(hidden_size, num_heads, plain_attention) for _ in range(depth))

    def forward(self, z, r, t, y):
        dtype = self.patch_in.weight.dtype
        x = self.patch_in(self._patchify(z).to(dtype))[0] + self.positions.to(dtype)
        c, _ = self._condition(r, t, y, None, None, dtype)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.last_modulation(c)[0].unsqueeze(1).chunk(2, dim=-1)
        h = layer_norm(x) * (1 + scale) + shift
        return self._unpatchify(self.patch_out(h)[0]).to(z.dtype)


def plain_like(net):
    """A PlainDiT of the sizes of a DiT, which torch.func.jvp can pass; with weights of its own."""
    return PlainDiT(
        plain_attention=True,
        latent_size=net.tokens_per_side * net.patch,
        latent_channels=net.channels,
        num_classes=net.null_label,
        patch_size=net.patch,
        hidden_size=net.patch_in.out_features,
        depth=len(net.blocks),
        num_heads=net.blocks[0].attention.num_heads,
        generator=torch.Generator(),
    )


class DiffusersBlock(nn.Module):
    """The same block with attention and MLP from diffusers."""

    def __init__(self, width, num_heads):
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.attention = Attention(width, heads=num_heads, dim_head=width // num_heads, bias=True)
        self.mlp = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)


class DiffusersDiT(PlainDiT):
    """Our DiT's input and output layers around diffusers' blocks."""

    def __init__(self, *, hidden_size, num_heads, depth, **rest):
        super().__init__(plain_attention=False, hidden_size=hidden_size, num_heads=num_heads, depth=depth, **rest)
        self.blocks = nn.ModuleList(DiffusersBlock(hidden_size, num_heads) for _ in range(depth))


def plain(net, x, e, r, t, y, n_eq, null_label, recipe):
    """Flow matching: one forward and backward, no target to compute. The unit of the bench's ratios."""
    z, v = path(x, e, t)
    return (net(z, t, t, y) - v).square().sum(dim=(1, 2, 3)).mean()


def _guided(net, z, v, t, y, null_label, recipe):
    """v_g on all rows, with two more forwards of the whole batch."""
    if not recipe.guided:
        return v
    with torch.no_grad():
        u_cond, u_null = net(z, t, t, y), net(z, t, t, torch.full_like(y, null_label))
    return velocity_in_interval(v, u_cond, u_null, t, y, null_label, recipe)


def _weighted(u, u_tgt, recipe):
    s = (u - u_tgt).square().sum(dim=(1, 2, 3))
    return (s / (s.detach() + recipe.adaptive_eps) ** recipe.adaptive_p).mean()


def authors(net, x, e, r, t, y, n_eq, null_label, recipe):
    """The authors' computation: one torch.func.jvp over the whole batch gives u, with a graph, and du/dt."""
    z, v = path(x, e, t)
    v_g = _guided(net, z, v, t, y, null_label, recipe)
    direction = (v_g, torch.zeros_like(r), torch.ones_like(t))
    u, du_dt = torch.func.jvp(lambda a, b, c: net(a, b, c, y), (z, r, t), direction)
    return _weighted(u, v_g - per_row(t - r) * du_dt.detach(), recipe)


def port(net, x, e, r, t, y, n_eq, null_label, recipe):
    """The common PyTorch port: torch.func.jvp over the whole batch without a graph, then a forward with one."""
    z, v = path(x, e, t)
    v_g = _guided(net, z, v, t, y, null_label, recipe)
    direction = (v_g, torch.zeros_like(r), torch.ones_like(t))
    with torch.no_grad():
        _, du_dt = torch.func.jvp(lambda a, b, c: net(a, b, c, y), (z, r, t), direction)
    return _weighted(net(z, r, t, y), v_g - per_row(t - r) * du_dt, recipe)


def tim(net, x, e, r, t, y, n_eq, null_label, recipe, h=5e-3):
    """TiM's derivative: a central difference along (v_g, 0, 1), two forwards of the r < t rows."""
    z, v = path(x, e, t)
    v_g = _guided(net, z, v, t, y, null_label, recipe)
    a, b, c, d, label = z[n_eq:], r[n_eq:], t[n_eq:], v_g[n_eq:], y[n_eq:]
    with torch.no_grad():
        du_dt = (net(a + h * d, b, c + h, label) - net(a - h * d, b, c - h, label)) / (2 * h)
    u_tgt = torch.cat([v_g[:n_eq], d - per_row(c - b) * du_dt])
    return _weighted(net(z, r, t, y), u_tgt, recipe)

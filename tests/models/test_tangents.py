"""Every tangent rule compared with torch.func.jvp, the DiT also with a central difference; float64, random weights."""

import pytest
import torch
from oracles import func_jvp, random_guidance, small_dit, small_imf_dit
from torch import nn

from mf_dist.models import imf_dit
from mf_dist.models.attention import RotaryAttention, SelfAttention, attention, attention_with_tangent
from mf_dist.models.layers import (
    Linear,
    Mlp,
    RmsNorm,
    SwiGlu,
    TimeEmbedding,
    gated_add,
    gelu,
    layer_norm,
    modulate,
    rotary,
    rotary_angles,
    silu,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=100 + i))
    return module


def heads(layer, x, dx, **settings):
    """A layer of (B, N, H, K) on (B, N, D), with K = 2."""
    y, dy = layer(x.unflatten(-1, (-1, 2)), None if dx is None else dx.unflatten(-1, (-1, 2)), **settings)
    return y.flatten(-2), None if dy is None else dy.flatten(-2)


def plain_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def residual(x, dx):
    h, dh = silu(x, dx)
    return imf_dit.gated_add(x, GATE, h, dx, dh)


COS, SIN = rotary_angles(5, 2, torch.zeros((), dtype=torch.float64))
ROTARY_ATTENTION, IMF_BLOCK = randomised(RotaryAttention(6, 3)), randomised(imf_dit.Block(6, 3))
GATE = torch.linspace(-1, 1, 6, dtype=torch.float64)

LAYERS = {
    "linear": randomised(Linear(6, 5)),
    "silu": silu,
    "gelu": gelu,
    "layer_norm": layer_norm,
    "mlp": randomised(Mlp(6, 24)),
    "attention": randomised(SelfAttention(6, 3)),
    "rms_norm": randomised(RmsNorm(6)),
    "swiglu": randomised(SwiGlu(6)),
    "rotary": lambda x, dx=None: heads(rotary, x, dx, cos=COS, sin=SIN),
    "rotary attention": lambda x, dx=None: ROTARY_ATTENTION(x, COS, SIN, dx),
    "residual of imf_dit": lambda x, dx=None: residual(x, dx),
    "block of imf_dit": lambda x, dx=None: IMF_BLOCK(x, COS, SIN, dx),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layer_of_one_input(name):
    layer, x, dx = LAYERS[name], 2 * randn(4, 5, 6), randn(4, 5, 6, seed=1)
    y, dy = layer(x, dx)
    value, tangent = func_jvp(lambda a: layer(a)[0], (x,), (dx,))
    torch.testing.assert_close(y, value, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(dy, tangent, atol=1e-10, rtol=1e-10)
    assert tangent.abs().max() > 0.1
    value_only, no_tangent = layer(x)
    assert no_tangent is None
    torch.testing.assert_close(value_only, y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", [modulate, gated_add])
def test_layer_of_three_inputs(rule):
    shapes = [(4, 5, 6), (4, 6), (4, 6)] if rule is modulate else [(4, 5, 6), (4, 6), (4, 5, 6)]
    primals = tuple(randn(*shape, seed=i) for i, shape in enumerate(shapes))
    tangents = tuple(randn(*shape, seed=10 + i) for i, shape in enumerate(shapes))
    y, dy = rule(*primals, *tangents)
    value, tangent = torch.func.jvp(lambda *a: rule(*a, None, None, None)[0], primals, tangents)
    torch.testing.assert_close(y, value, atol=0, rtol=0)
    torch.testing.assert_close(dy, tangent, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layer", [TimeEmbedding(6), imf_dit.ScalarTokens(6, 3)])
@torch.no_grad()
def test_time_embedding(layer):
    layer, t, dt = randomised(layer), torch.rand(4, dtype=torch.float64), randn(4)
    y, dy = layer(t, dt, torch.float64)
    value, tangent = torch.func.jvp(lambda a: layer(a, None, torch.float64)[0], (t,), (dt,))
    torch.testing.assert_close(y, value, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(dy, tangent, atol=1e-10, rtol=1e-10)


def test_attention_value_equals_the_fused_one():
    q, k, v, *tangents = (randn(2, 3, 7, 4, seed=i) for i in range(6))
    torch.testing.assert_close(attention_with_tangent(q, k, v, *tangents)[0], attention(q, k, v))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@torch.no_grad()
def test_dit(patch_size):
    net = small_dit(patch_size=patch_size)
    z, dz, y = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    r, t = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).sort(dim=0)[0]
    dr, dt = randn(5, seed=3), randn(5, seed=4)
    u, du = net(z, r, t, y, tangent=(dz, dr, dt))
    value, tangent = func_jvp(lambda a, b, c: net(a, b, c, y), (z, r, t), (dz, dr, dt))
    torch.testing.assert_close(u, value, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(du, tangent, atol=1e-10, rtol=1e-10)
    assert du.abs().mean() > 0.05
    h = 1e-5
    central = (net(z + h * dz, r + h * dr, t + h * dt, y) - net(z - h * dz, r - h * dr, t - h * dt, y)) / (2 * h)
    torch.testing.assert_close(du, central, atol=1e-4, rtol=1e-5)  # truncation and rounding of the difference


@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_imf_dit(patch_size):
    net = small_imf_dit(patch_size=patch_size)
    z, dz, y = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    r, t = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).sort(dim=0)[0]
    r[0], (dr, dt), guidance = t[0], randn(2, 5, seed=3), random_guidance(5)
    u, du = net(z, r, t, y, guidance, tangent=(dz, dr, dt))
    value, tangent = func_jvp(lambda a, b, c: net(a, b, c, y, guidance), (z, r, t), (dz, dr, dt))
    torch.testing.assert_close(u, value, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(du, tangent, atol=1e-10, rtol=1e-10)
    assert du.abs().mean() > 0.05
    h = 1e-5
    central = net(z + h * dz, r + h * dr, t + h * dt, y, guidance) - net(
        z - h * dz, r - h * dr, t - h * dt, y, guidance
    )
    torch.testing.assert_close(du, central / (2 * h), atol=1e-4, rtol=1e-5)  # truncation and rounding of the difference


@pytest.mark.parametrize(
    ("small", "conditions"), [(small_dit, ()), (small_imf_dit, (random_guidance(8, torch.float32),))]
)
@torch.no_grad()
def test_bf16_tangents_are_as_accurate_as_those_of_func_jvp(small, conditions):
    """Mean relative error of du over 20 networks, with float64 as reference; u and du have the dtype of z."""
    y, ours, func = torch.tensor([0, 3] * 4), 0.0, 0.0
    for seed in range(20):
        net, exact = small(seed).bfloat16(), small(seed).bfloat16().double()
        z, dz = randn(2, 8, 3, 4, 4, seed=seed).float()
        r = 0.1 + 0.02 * torch.arange(8)
        primals, tangents = (z, r, r + 0.4), (dz, torch.zeros(8), torch.ones(8))
        u, du = net(*primals, y, *conditions, tangent=tangents)
        assert u.dtype == du.dtype == torch.float32
        wide, dwide = ([a.double() for a in part] for part in (primals, tangents))
        _, reference = exact(*wide, y, *conditions, tangent=tuple(dwide))
        _, func_du = func_jvp(lambda *a, net=net: net(*a, y, *conditions), primals, tangents)
        ours += (du - reference).norm() / reference.norm() / 20
        func += (func_du - reference).norm() / reference.norm() / 20
    assert 0.01 < ours < 1.1 * func, (ours, func)

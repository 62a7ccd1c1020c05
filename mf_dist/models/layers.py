"""Layers that propagate a tangent with the value: forward-mode differentiation by ordinary operations.

Every layer takes (x, dx) and returns (y, dy) with dy = J(x) dx. With dx = None it computes the value only, and dy
is None. Ordinary operations run under every ZeRO stage, compile into one graph with the value, and keep no backward
graph under no_grad; torch.func.jvp does none of the three. Tests compare each rule with torch.func.jvp in float64.

Shapes: B rows, N tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Dual = tuple[Tensor, Tensor | None]
"""A value and its tangent, which is None if the input had none."""


class Linear(nn.Linear):
    """y = x W^T + b, dy = dx W^T. Computes in the dtype of x, whatever the dtype of the weights."""

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Dual:  # type: ignore[override]
        weight = self.weight.to(x.dtype)
        y = F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        # matmul, not F.linear: ZeRO-3 replaces F.linear by a function that keeps its own graph
        return y, None if dx is None else dx @ weight.t()


# The Jacobians of silu, gelu and layer_norm are symmetric (two are diagonal), so torch's backward kernel computes J dx,
# in one pass and rounded once.


def silu(x: Tensor, dx: Tensor | None = None) -> Dual:
    """y = x s(x) with the logistic function s; y' = s (1 + x (1 - s))."""
    return F.silu(x), None if dx is None else torch.ops.aten.silu_backward(dx, x)


def gelu(x: Tensor, dx: Tensor | None = None) -> Dual:
    """The tanh form, y = x (1 + h)/2 with h = tanh(g), g = sqrt(2/pi) (x + 0.044715 x^3); y' = (1 + h)/2 +
    x (1 - h^2) g'/2."""
    y = F.gelu(x, approximate="tanh")
    return y, None if dx is None else torch.ops.aten.gelu_backward(dx, x, approximate="tanh")


def layer_norm(x: Tensor, dx: Tensor | None = None, eps: float = 1e-6) -> Dual:
    """Over the last dimension, without affine: y = (x - m)/s, dy = (dx - mean(dx) - y mean(y dx))/s."""
    shape = x.shape[-1:]
    if dx is None:
        return F.layer_norm(x, shape, eps=eps), None
    y, mean, inverse = torch.native_layer_norm(x, shape, None, None, eps)
    needed = [True, False, False]  # gradients of x, weight, bias
    return y, torch.ops.aten.native_layer_norm_backward(dx, x, shape, mean, inverse, None, None, needed)[0]


def rms_norm(x: Tensor, weight: Tensor, dx: Tensor | None = None, eps: float = 1e-6) -> Dual:
    """Over the last dimension: y = w n with n = x/s, s = sqrt(mean(x^2) + eps); dy = w (dx - n mean(n dx))/s."""
    if dx is None:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps), None
    # not torch's backward kernel, which exists on GPUs only; in fp32 inside, so that results are rounded once, too
    wide, dwide, weight = _at_least_fp32(x), _at_least_fp32(dx), _at_least_fp32(weight)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    n = wide * inverse
    dn = (dwide - n * (n * dwide).mean(dim=-1, keepdim=True)) * inverse
    return (weight * n).to(x.dtype), (weight * dn).to(x.dtype)


def rotary(x: Tensor, dx: Tensor | None = None, *, cos: Tensor, sin: Tensor) -> Dual:
    """Rotary positions (arXiv 2104.09864): each pair (x_2i, x_2i+1) turns by its angle. x (B, N, H, K); cos, sin
    (N, K/2) in fp32 or wider, in which the products are made."""
    return _turn(x, cos, sin), None if dx is None else _turn(dx, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def rotary_angles(tokens: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (N, K/2) of n theta_i, theta_i = 10000^(-2 i / K), at positions n = 0, ..., N - 1, on the device of
    `like`; in its dtype, but at least fp32."""
    wide = torch.promote_types(like.dtype, torch.float32)
    theta = 10_000 ** -(torch.arange(0, head_size, 2, dtype=wide, device=like.device) / head_size)
    angle = torch.arange(tokens, dtype=wide, device=like.device)[:, None] * theta
    return angle.cos(), angle.sin()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, dx: Tensor | None, dshift: Tensor | None, dscale: Tensor | None
) -> Dual:
    """y = x (1 + scale) + shift, per row: x (B, N, D), shift and scale (B, D)."""
    shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    y = x * (1 + scale) + shift
    if dx is None or dshift is None or dscale is None:
        return y, None
    return y, dx * (1 + scale) + (x * dscale.unsqueeze(1) + dshift.unsqueeze(1))


def gated_add(x: Tensor, gate: Tensor, h: Tensor, dx: Tensor | None, dgate: Tensor | None, dh: Tensor | None) -> Dual:
    """The residual y = x + gate h: x and h (B, N, D), gate (B, D)."""
    y = x + gate.unsqueeze(1) * h
    if dx is None or dgate is None or dh is None:
        return y, None
    # small terms first: every addition to the large dx rounds it once more
    return y, dx + (dgate.unsqueeze(1) * h + gate.unsqueeze(1) * dh)


class LinearGelu(Linear):
    """Linear, GELU-tanh."""

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Dual:  # type: ignore[override]
        if dx is not None or torch.is_grad_enabled() or not x.is_cuda or x.dtype != torch.bfloat16:
            return gelu(*super().forward(x, dx))
        # cuBLAS applies the tanh form to the numbers that it has just computed: they are written once, instead of
        # written, read and written. Of no use where x W^T + b is needed, for a tangent or a backward.
        bias, weight = self.bias.to(x.dtype), self.weight.to(x.dtype)
        y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return y.view(*x.shape[:-1], -1), None


class Mlp(nn.Module):
    """Linear, GELU-tanh, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = LinearGelu(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Dual:
        return self.fc2(*self.fc1(x, dx))


class RmsNorm(nn.Module):
    """Root mean square normalisation with a weight per feature, which starts at 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Dual:
        return rms_norm(x, self.weight, dx)


class SwiGlu(nn.Module):
    """W2 (silu(a) b) with (a, b) = W1 x, without biases (arXiv 2002.05202); 8/3 of the width inside, rounded down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.fc1 = Linear(width, 2 * hidden, bias=False)
        self.fc2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Dual:
        ab, dab = self.fc1(x, dx)
        a, b = ab.chunk(2, dim=-1)
        da, db = dab.chunk(2, dim=-1) if dab is not None else (None, None)
        s, ds = silu(a, da)
        return self.fc2(s * b, None if ds is None or db is None else ds * b + s * db)


class TimeEmbedding(nn.Module):
    """Raw time in [0, 1] (not x1000) -> 256 sinusoids in fp32 -> Linear, SiLU, Linear (DiT's TimestepEmbedder)."""

    num_sinusoids = 256
    max_period = 10_000

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(self.num_sinusoids, width)
        self.fc2 = Linear(width, width)

    def forward(self, t: Tensor, dt: Tensor | None, dtype: torch.dtype) -> Dual:
        """t, dt (B,) -> (B, D) in `dtype`, in which the linears compute."""
        half = self.num_sinusoids // 2
        wide = t.dtype if t.dtype == torch.float64 else torch.float32
        frequency = torch.exp(-math.log(self.max_period) / half * torch.arange(half, dtype=wide, device=t.device))
        angle = t[:, None].to(wide) * frequency
        cos, sin = angle.cos(), angle.sin()
        sinusoids = torch.cat([cos, sin], dim=-1)
        if dt is None:
            return self.fc2(*silu(*self.fc1(sinusoids.to(dtype))))
        tangent = torch.cat([-sin, cos], dim=-1) * frequency.repeat(2) * dt[:, None].to(wide)
        return self.fc2(*silu(*self.fc1(sinusoids.to(dtype), tangent.to(dtype))))

"""Multi-head self-attention with a tangent rule.

Shapes: B rows, H heads, N tokens, K head size, D = H K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_dist.models.layers import Dual, Linear, RmsNorm, rotary

if torch.cuda.is_available():  # without a GPU, triton may be missing
    from mf_dist.models.fused_attention import fused_attention_with_tangent

FUSED_FROM_TOKENS = 1024
"""Number of tokens from which a GPU in bf16 runs the fused kernel: an assumption, to be checked with
tools/bench/bench_attention.py."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by torch's fused kernels; q, k, v (B, H, N, K)."""
    return F.scaled_dot_product_attention(q, k, v)


def attention_with_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """o = P v with P = softmax(S), S = q k^T / sqrt(K); do = dP v + P dv, dP = P (dS - rowsum(P dS)).

    Softmax's Jacobian is symmetric: its backward kernel computes dP."""
    scale = q.shape[-1] ** -0.5
    p = torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1)
    ds = (dq @ k.transpose(-2, -1) + q @ dk.transpose(-2, -1)) * scale
    dp = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
    return p @ v, dp @ v + p @ dv


def self_attention(qkv: Tensor, dqkv: Tensor | None, num_heads: int) -> Dual:
    """qkv (B, N, 3 D), laid out as q, k, v with consecutive heads in each -> o (B, N, D)."""
    if dqkv is None:
        return _merge_heads(attention(*_split_heads(qkv, num_heads))), None
    if qkv.is_cuda and qkv.dtype == torch.bfloat16 and qkv.shape[1] >= FUSED_FROM_TOKENS:
        return fused_attention_with_tangent(qkv, dqkv, num_heads)
    o, do = attention_with_tangent(*_split_heads(qkv, num_heads), *_split_heads(dqkv, num_heads))
    return _merge_heads(o), _merge_heads(do)


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, 3 D) -> q, k, v, each (B, H, N, K)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(o: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, D)."""
    return o.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Linear for q, k, v (with bias, no normalisation), attention, output linear."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Dual:
        """x, dx (B, N, D) -> (B, N, D)."""
        qkv, dqkv = self.qkv(x, dx)
        return self.proj(*self_attention(qkv, dqkv, self.num_heads))


class RotaryAttention(nn.Module):
    """Linear for q, k, v without bias; q and k of each head are normalised, then turned; attention, output linear
    without bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_norm = RmsNorm(width // num_heads)
        self.k_norm = RmsNorm(width // num_heads)
        self.proj = Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dx: Tensor | None = None) -> Dual:
        """x, dx (B, N, D) -> (B, N, D); cos, sin (N, K/2) as from rotary_angles."""
        qkv, dqkv = self.qkv(x, dx)
        (q, k, v), (dq, dk, dv) = self._heads(qkv), self._heads(dqkv)
        q, dq = rotary(*self.q_norm(q, dq), cos=cos, sin=sin)
        k, dk = rotary(*self.k_norm(k, dk), cos=cos, sin=sin)
        o, do = self_attention(self._joined(q, k, v), self._joined(dq, dk, dv), self.num_heads)
        return self.proj(o, do)

    def _heads(self, qkv: Tensor | None) -> tuple[Any, ...]:
        """(B, N, 3 D) -> q, k, v, each (B, N, H, K); None -> three times None."""
        return (None, None, None) if qkv is None else qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def _joined(self, *qkv: Any) -> Any:
        """The inverse of _heads."""
        return None if qkv[0] is None else torch.cat([a.flatten(2) for a in qkv], dim=-1)

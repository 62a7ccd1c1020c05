# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention with its tangent in one pass over the keys: a Triton kernel without a backward, for the target pass.

Online softmax as in FlashAttention (arXiv 2205.14135), with three additional running sums. With S = q k^T / sqrt(K),
dS = (dq k^T + q dk^T) / sqrt(K) and the unnormalised weights E = exp(S - max S):
    o = sum(E v) / sum(E)
    do = (sum(E dS v) + sum(E dv)) / sum(E) - o sum(E dS) / sum(E)
No N x N matrix is stored; scores, weights and sums are fp32. Block sizes are fixed: autotuning could choose different
ones after a restart, which would change the rounding of a resumed run.

Shapes: B rows, H heads, N tokens, K head size, D = H K.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.utils.flop_counter import register_flop_formula

WARPS = 8


def block_sizes(dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys per block. Of those tried, bf16's spill the fewest registers on sm_80 and sm_90, by ptxas -v
    (docs/performance.md); in fp32 a block of these sizes would not fit into shared memory."""
    return (64, 16) if dtype == torch.float32 else (128, 32)


@triton.jit
def _load(ptr, dptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0), tl.load(dptr + at, mask=mask, other=0.0)


@triton.jit
def _dot(a, b, sum):
    return tl.dot(a, b, sum, input_precision="ieee")  # fp32 stays fp32


@triton.jit
def _add_scores(q, dq, k, dk, s, ds):
    k, dk = tl.trans(k), tl.trans(dk)
    return _dot(q, k, s), _dot(q, dk, _dot(dq, k, ds))


@triton.jit
def _add_values(e, e_ds, v, dv, shrink, acc, dacc):
    e, e_ds = e.to(v.dtype), e_ds.to(v.dtype)
    return _dot(e, v, acc * shrink), _dot(e, dv, _dot(e_ds, v, dacc * shrink))


@triton.jit
def _store(o_ptr, do_ptr, at, mask, acc, dacc, total, mean_ds):
    o = acc / total
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(do_ptr + at, (dacc / total - mean_ds * o).to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    qkv_ptr,
    dqkv_ptr,
    o_ptr,
    do_ptr,
    heads,
    tokens,
    scale: tl.constexpr,  # as an argument it is a double where torch.compile launches the kernel
    SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head and row. HEAD + TAIL cover the head size (see _cut); a indexes HEAD, b TAIL."""
    width = heads * SIZE
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    first = row * tokens * 3 * width + head * SIZE
    n, a = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES))[:, None], tl.arange(0, HEAD)[None, :]
    q, dq = _load(qkv_ptr, dqkv_ptr, first + n * 3 * width + a, (n < tokens) & (a < SIZE))
    acc, dacc = tl.zeros([QUERIES, HEAD], tl.float32), tl.zeros([QUERIES, HEAD], tl.float32)
    if TAIL:
        b = HEAD + tl.arange(0, TAIL)[None, :]
        q_b, dq_b = _load(qkv_ptr, dqkv_ptr, first + n * 3 * width + b, (n < tokens) & (b < SIZE))
        acc_b, dacc_b = tl.zeros([QUERIES, TAIL], tl.float32), tl.zeros([QUERIES, TAIL], tl.float32)
    top = tl.full([QUERIES, 1], float("-inf"), tl.float32)
    total, dtotal = tl.zeros([QUERIES, 1], tl.float32), tl.zeros([QUERIES, 1], tl.float32)
    zeros = tl.zeros([QUERIES, KEYS], tl.float32)
    for start in range(0, tokens, KEYS):
        m = (start + tl.arange(0, KEYS))[:, None]
        key = first + width + m * 3 * width
        k, dk = _load(qkv_ptr, dqkv_ptr, key + a, (m < tokens) & (a < SIZE))
        s, ds = _add_scores(q, dq, k, dk, zeros, zeros)
        if TAIL:
            k, dk = _load(qkv_ptr, dqkv_ptr, key + b, (m < tokens) & (b < SIZE))
            s, ds = _add_scores(q_b, dq_b, k, dk, s, ds)
        s = tl.where(tl.trans(m) < tokens, s * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1, keep_dims=True))
        shrink, e = tl.exp(top - new_top), tl.exp(s - new_top)
        e_ds = e * (ds * scale)
        top, total = new_top, total * shrink + tl.sum(e, 1, keep_dims=True)
        dtotal = dtotal * shrink + tl.sum(e_ds, 1, keep_dims=True)
        v, dv = _load(qkv_ptr, dqkv_ptr, key + width + a, (m < tokens) & (a < SIZE))
        acc, dacc = _add_values(e, e_ds, v, dv, shrink, acc, dacc)
        if TAIL:
            v, dv = _load(qkv_ptr, dqkv_ptr, key + width + b, (m < tokens) & (b < SIZE))
            acc_b, dacc_b = _add_values(e, e_ds, v, dv, shrink, acc_b, dacc_b)
    out = row * tokens * width + head * SIZE + n * width
    _store(o_ptr, do_ptr, out + a, (n < tokens) & (a < SIZE), acc, dacc, total, dtotal / total)
    if TAIL:
        _store(o_ptr, do_ptr, out + b, (n < tokens) & (b < SIZE), acc_b, dacc_b, total, dtotal / total)


def _cut(size: int) -> tuple[int, int]:
    """Head size -> (HEAD, TAIL), a power of two, and the rest rounded up to a power of two: 72 costs 80, not 128. The
    matrix units need at least 16; TAIL is 0 if nothing is left."""
    head = max(16, 1 << (size.bit_length() - 1))
    rest = size - head
    return head, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


def _launch(kernel: Any, qkv: Tensor, dqkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = width // num_heads
    qkv, dqkv = qkv.contiguous(), dqkv.contiguous()
    o, do = qkv.new_empty(rows, tokens, width), qkv.new_empty(rows, tokens, width)
    (head, tail), (queries, keys) = _cut(size), block_sizes(qkv.dtype)
    kernel[(triton.cdiv(tokens, queries), rows * num_heads)](
        qkv, dqkv, o, do, num_heads, tokens, size**-0.5, size, head, tail, queries, keys, num_warps=WARPS
    )
    return o, do


@triton_op("mf_dist::fused_attention_with_tangent", mutates_args={})
def fused_attention_with_tangent(qkv: Tensor, dqkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """qkv, dqkv (B, N, 3 D), laid out as q, k, v with consecutive heads in each -> o, do (B, N, D), on a GPU.
    Sums in fp32; the softmax weights are rounded to the dtype of qkv before the product with v."""
    return _launch(wrap_triton(_attend), qkv, dqkv, num_heads)


@register_flop_formula(torch.ops.mf_dist.fused_attention_with_tangent)  # type: ignore[untyped-decorator]
def _flops(qkv_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Six products of N x N x D; a multiply-add counts as 2."""
    rows, tokens, width3 = qkv_shape
    return 6 * 2 * rows * tokens * tokens * (width3 // 3)

"""Errors of the fused kernel relative to the plain rule in float64, one JSON line per case. Without a GPU it runs in
Triton's interpreter, which must be selected before triton is imported: hence a separate process."""

import json
import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from mf_dist.models import fused_attention as fused  # noqa: E402
from mf_dist.models.attention import attention_with_tangent  # noqa: E402

HEADS, ROWS = 2, 2


def plain(qkv, dqkv):
    """(B, N, 3 D) -> o, do (B, N, D) by the plain rule in float64."""
    split = (a.double().unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0) for a in (qkv, dqkv))
    return (a.transpose(1, 2).flatten(2) for a in attention_with_tangent(*next(split), *next(split)))


def errors(size, tokens, dtype, score_factor=1.0):
    """Relative errors of o and do."""
    g = torch.Generator().manual_seed(tokens)
    qkv, dqkv = torch.randn(2, ROWS, tokens, 3 * HEADS * size, generator=g, dtype=torch.float64)
    qkv[..., : HEADS * size] *= score_factor
    qkv, dqkv = (a.to("cuda" if HAS_GPU else "cpu", dtype) for a in (qkv, dqkv))
    if HAS_GPU:
        computed = fused.fused_attention_with_tangent(qkv, dqkv, HEADS)
    else:
        computed = fused._launch(fused._attend, qkv, dqkv, HEADS)
    assert all(a.shape == (ROWS, tokens, HEADS * size) and a.dtype == dtype for a in computed)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(computed, plain(qkv, dqkv), strict=True)]


# tl.dot of triton 3.9's interpreter is wrong in bf16: without a GPU fp16 is tested instead
for dtype in (torch.float32, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16):
    for size in (24, 64, 72, 80, 96, 128):
        for tokens in (1, 37, 130 if size in (72, 128) else 97):  # the last block in part
            print(json.dumps([str(dtype), f"size {size}, {tokens} tokens", *errors(size, tokens, dtype)]))
print(json.dumps(["large scores", "scores of several hundred", *errors(64, 70, torch.float32, score_factor=40.0)]))

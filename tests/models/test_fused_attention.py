"""The fused kernel: accuracy, shapes and FLOPs as an operator, and compilation for GPUs."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

triton = pytest.importorskip("triton", reason="triton is available for Linux only")
TOLERANCE = {"torch.float32": 3e-6, "torch.float16": 1e-3, "torch.bfloat16": 8e-3, "large scores": 3e-5}


@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_value_and_tangent_against_float64(device):
    if device == "gpu" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    lines = run_python(Path(__file__).with_name("fused_cases.py")).stdout.splitlines()
    assert len(lines) == 2 * 6 * 3 + 1
    for dtype, case, error, tangent_error in map(json.loads, lines):
        assert error < TOLERANCE[dtype] and tangent_error < TOLERANCE[dtype], (dtype, case, error, tangent_error)


def test_operator_has_shapes_and_flops_without_running():
    from mf_dist.models.fused_attention import fused_attention_with_tangent

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        qkv = torch.empty(2, 100, 3 * 144, dtype=torch.bfloat16, device="cuda")
        o, do = fused_attention_with_tangent(qkv, qkv, 2)
    assert o.shape == do.shape == (2, 100, 144) and o.dtype == torch.bfloat16
    assert counter.get_total_flops() == 6 * 2 * 2 * 100 * 100 * 144


@pytest.mark.parametrize("size", [64, 72, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("capability", "shared_memory"), [(80, 166_912), (90, 232_448)])
def test_compiles_for_gpus_without_one(capability, shared_memory, dtype, size, tmp_path, monkeypatch):
    """The compiler may reject what the interpreter accepts; a block must fit into the GPU's shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mf_dist.models import fused_attention as fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = fused._attend.arg_names
    blocks = fused.block_sizes({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    constants = (size**-0.5, size, *fused._cut(size), *blocks)
    signature = dict.fromkeys(names[:4], f"*{dtype}") | dict.fromkeys(names[4:6], "i32")
    signature |= dict.fromkeys(names[6:], "constexpr")
    source = ASTSource(fused._attend, signature, dict(zip(names[6:], constants, strict=True)))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fused.WARPS})
    assert len(compiled.asm["cubin"]) > 1000 and 0 < compiled.metadata.shared <= shared_memory

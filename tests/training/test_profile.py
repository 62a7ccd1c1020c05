"""The table of a trace: against torch's own figures of the same recorded steps, and for a GPU against arithmetic."""

import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mf_dist.config.schema import OptimConfig
from mf_dist.models.attention import attention_with_tangent
from mf_dist.training import trace
from mf_dist.training.optimizer import AdamWEma
from mf_dist.training.trace import as_text, class_of, summarize

STEPS = 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """torch's own table of three small training steps, and ours of their trace."""
    linear = torch.nn.Linear(64, 64)
    optimizer = AdamWEma(linear.parameters(), OptimConfig())
    batches = iter(torch.utils.data.DataLoader(list(torch.randn(9, 1, 64, 64)), batch_size=None))

    def step():
        x = linear(next(batches))
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x).clone()
        loss = x.square().mean() + attention_with_tangent(*[x.detach()[None]] * 6)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    once = schedule(wait=0, warmup=1, active=STEPS, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=once) as profiler:
        for _ in range(1 + STEPS):
            step()
            profiler.step()
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    profiler.export_chrome_trace(str(path))
    own = {row.key: row for row in profiler.key_averages()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "LARGEST", 1000)
        return own, summarize(json.loads(path.read_text())["traceEvents"])


def test_times_are_those_of_torchs_table(recorded):
    own, table = recorded
    for name in {row["name"] for row in table["costs"]}:
        rows = [row for row in table["costs"] if row["name"] == name]  # one for each class
        assert sum(row["calls"] for row in rows) * STEPS >= own[name].count - 0.1  # torch counts f within f as one call
        assert sum(row["ms"] for row in rows) * STEPS * 1e3 == pytest.approx(own[name].self_cpu_time_total, abs=1)
    assert table["ms"] * STEPS * 1e3 == pytest.approx(own["ProfilerStep*"].cpu_time_total, rel=0.05)
    assert table["steps"] == STEPS and table["idle_share"] is None
    assert "GPU" not in as_text({"first_step": 4, "device": "CPU", **table})


def test_classes_follow_from_names_and_callers(recorded):
    own, table = recorded
    microseconds = {row["name"]: row["ms"] * STEPS * 1e3 for row in table["classes"]}
    assert microseconds.keys() == {"matrix products", "attention", "optimizer", "copies", "other"}
    update = own["Optimizer.step#AdamWEma.step"]
    assert microseconds["optimizer"] == pytest.approx(update.cpu_time_total - update.self_cpu_time_total, rel=0.01)
    is_product = re.compile(r"aten::((add|b)?mm|linear|matmul)").fullmatch
    products = sum(row.self_cpu_time_total for name, row in own.items() if is_product(name))
    within = [row["ms"] for row in table["costs"] if row["class"] == "attention" and is_product(row["name"])]
    assert len(within) >= 1  # scaled_dot_product_attention in its math form
    assert microseconds["matrix products"] + sum(within) * STEPS * 1e3 == pytest.approx(products, rel=0.01)
    operators = [row for name, row in own.items() if not re.match("ProfilerStep|enumerate|Optimizer", name)]
    assert sum(microseconds.values()) == pytest.approx(sum(row.self_cpu_time_total for row in operators), rel=0.01)
    waits = {row["name"]: row["calls"] for row in table["waits"]}
    assert waits["data loader"] == 1 and waits["item()"] >= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("_attend", "attention"),
        ("triton_poi_fused_add_gelu_mul_12", "compiled kernels"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "other"),
    ],
)
def test_kernels_are_known_by_name(name, expected):
    assert class_of([name, "cudaLaunchKernel", "aten::mm"]) == expected
    assert class_of([name, "cuLaunchKernelEx", "Optimizer.step#AdamWEma.step"]) == "optimizer"


def event(category, name, start, duration, thread=1, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread, "args": args}


def test_kernels_idle_time_and_waits_of_a_gpu():
    """A trace as torch writes it on a GPU, by hand: two steps of 1 ms."""
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "ProfilerStep#3", 0, 1000),
        event("user_annotation", "ProfilerStep#4", 1000, 1000),
        event("gpu_user_annotation", "ProfilerStep#3", 50, 1900, thread=7),  # no kernel, though on the GPU
        event("cpu_op", "aten::mm", 10, 30),
        event("cuda_runtime", "cudaLaunchKernel", 20, 5, correlation=1),
        event("kernel", "nvjet_tst_128", 100, 400, thread=7, correlation=1),
        event("kernel", "ncclDevKernel_AllReduce", 300, 400, thread=8, correlation=2),  # overlaps: 100 to 700 is busy
        event("user_annotation", "Optimizer.step#AdamWEma.step", 700, 200),
        event("cpu_op", "aten::item", 705, 110),
        event("cpu_op", "aten::_local_scalar_dense", 710, 100),
        event("cuda_runtime", "cudaMemcpyAsync", 711, 2, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 720, 30, thread=7, correlation=3),
        event("cuda_runtime", "cudaStreamSynchronize", 715, 90),
        event("cuda_driver", "cuLaunchKernelEx", 850, 5, correlation=4),
        event("kernel", "triton_poi_fused_lerp_0", 900, 200, thread=7, correlation=4),
        event("user_annotation", "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 1100, 300),
        event("cuda_runtime", "cudaDeviceSynchronize", 1500, 400),
        event("kernel", "triton_red_fused_1", 1900, 300, thread=7),  # until after the steps, and launched before them
        event("kernel", "nvjet_tst_128", 2500, 300, thread=7, correlation=5),
    ]
    table = summarize(events)
    assert (table["steps"], table["ms"]) == (2, 1.0)
    assert table["idle_share"] == pytest.approx(1 - (600 + 30 + 200 + 100) / 2000)
    assert {row["name"]: row["ms"] for row in table["classes"]} == pytest.approx(
        {"matrix products": 0.2, "collectives": 0.2, "optimizer": 0.115, "compiled kernels": 0.05}
    )
    assert [row["name"] for row in table["costs"]][:2] == ["nvjet_tst_128", "ncclDevKernel_AllReduce"]
    waits = {row["name"]: (row["ms"], row["calls"]) for row in table["waits"]}
    assert waits == {
        "cudaDeviceSynchronize in python": (0.2, 0.5),
        "data loader": (0.15, 0.5),
        "cudaStreamSynchronize in item()": (0.045, 0.5),
    }
    text = as_text({"first_step": 4, "device": "NVIDIA H100", **table})
    assert text.startswith("NVIDIA H100, steps 4 to 5: 1.00 ms per step while recorded, GPU idle 53.5%\n")


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="has no steps"):
        summarize([event("cpu_op", "aten::mm", 0, 1)])

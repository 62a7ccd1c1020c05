"""What tools/bench/bench_step.py measures of a case (a loss and its network) besides time."""

import os
import statistics
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise each profile prints log lines


def now():
    """Time in seconds, after waiting for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(case):
    """Bytes of the tensors saved for the backward, weights excluded."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in case.net.parameters()}
    saved = {}

    def keep(tensor):
        unwrapped = tensor
        while torch._C._functorch.is_functorch_wrapped_tensor(unwrapped):  # by torch.func.jvp
            unwrapped = torch._C._functorch.get_unwrapped(unwrapped)
        if unwrapped._is_zerotensor():  # represents zeros, has no storage
            return tensor
        storage = unwrapped.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), unwrapped)  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.call()
    return sum(nbytes for nbytes, _ in saved.values())


def peak_bytes(case):
    """Peak bytes allocated in a forward and backward beyond those allocated before, gradients included."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case.step()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative when memory is freed
        peak = max(peak, held)
    return peak


def counted_flops(case):
    """FLOPs of the eager form with plain attention, since the counter does not know every fused kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def addmm(bias, x, weight, **options):
        return 2 * x[0] * x[1] * weight[1]

    with_gelu = {torch.ops.aten._addmm_activation: addmm}  # what a GPU's null pass uses; torch does not count it
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=with_gelu) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        case.value().backward()
    case.net.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def matmul_peak(device, dtype):
    """FLOP/s of the best of several square products, measured; dtype: fp32, tf32 or bf16. Products that take more than
    a second are not repeated, nor larger ones tried: a CPU without instructions for bf16 takes 30 s for the largest."""
    import torch

    best, before = 0.0, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    for n in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        times = []
        while len(times) < 10 and sum(times) < 1:
            start = now()
            a @ a
            times.append(now() - start)
        best = max(best, 2 * n**3 / statistics.median(times[2:] or times))
        if sum(times) >= 1 and device.type == "cpu":
            break
    torch.backends.cuda.matmul.allow_tf32 = before
    return best

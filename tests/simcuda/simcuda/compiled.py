"""torch.compile for the simulated GPU: everything up to the launch of a kernel.

inductor generates Triton for sm_90 and Triton compiles it to cubins. Launches, matrix products and attention are
counted and leave their outputs as they are: zeros. So graphs, guards, hooks, copies, waits and memory are real, numbers
are not.
"""

import collections
import os
import types
from pathlib import Path

from simcuda_build import CACHE

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))

import torch  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402
import triton  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers, triton_heuristics  # noqa: E402
from torch._inductor.select_algorithm import extern_kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from simcuda import device, waits  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
ATTENTION = {"math": 0, "flash": 1, "efficient": 2, "cudnn": 3}
"""What _fused_sdp_choice answers: cudnn on an H100, flash on an A100, efficient in fp32."""

compiled: list[tuple[str, dict, int, int]] = []
"""(name, block sizes, warps, shared memory in bytes) of each compiled Triton configuration."""
launches: collections.Counter = collections.Counter()
"""(phase, kernel) -> launches of Triton kernels."""
moved: collections.Counter = collections.Counter()
"""(phase, kernel) -> bytes of all tensors that it is given; those written in place twice."""
calls: collections.Counter = collections.Counter()
"""(phase, operator) -> calls of matrix products, attention and convolutions."""
code: list[str] = []
"""Generated source of each graph."""
phase = [""]
"""What launches are counted under; set by whoever measures."""


class Driver:
    """Triton's view of an H100."""

    binary_ext = "cubin"
    utils = types.SimpleNamespace(
        get_device_properties=lambda _: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
    )

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, _=None):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_benchmarker(self):
        return lambda *_, **__: 1.0

    def is_active(self):
        return True


def _make_launcher(self):
    """In place of loading the cubin."""

    def launcher(*_, **__):
        pass

    metadata = self.kernel.metadata
    launcher.config, launcher.n_regs, launcher.n_spills = self.config, 0, 0
    launcher.shared, launcher.cache_hash, launcher.store_cubin = metadata.shared, "", False
    launcher.fn, launcher.bin = None, self.kernel
    compiled.append((metadata.name, dict(self.config.kwargs), self.config.num_warps, metadata.shared))
    return launcher


def _run(self, *args, stream=None, **_):
    """In place of a launch."""
    key = phase[0], self.fn.__name__
    launches[key] += 1
    for name, tensor in zip(self.fn.arg_names, args, strict=False):
        if isinstance(tensor, torch.Tensor):
            moved[key] += tensor.numel() * tensor.element_size() * (2 if name.startswith("in_out") else 1)


def _count_only(name):
    def call(*_, **options):
        calls[phase[0], name] += 1
        return options.get("out")

    return call


def _shapes_only(library, name):
    """An operator whose CUDA kernel is a library's: outputs of the right shapes, of zeros."""
    operator = getattr(torch.ops.aten, name).default

    def kernel(*args, **options):
        calls[phase[0], name] += 1
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def fake(value):
                return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

            outputs = operator(*map(fake, args), **{key: fake(value) for key, value in options.items()})

        def real(value):
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

        return tuple(map(real, outputs)) if isinstance(outputs, (tuple, list)) else real(outputs)

    library.impl(name, kernel, "CUDA")


def _convolution_format(x, weight, _):
    """cuDNN keeps channels last; this build, which has no cuDNN, would answer contiguous."""
    is_last = [
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (x, weight)
    ]
    return torch.channels_last if any(is_last) else torch.contiguous_format


def install() -> None:
    waits.uninstall_copies()
    device.zeroed(True)
    device.set_sdp(ATTENTION[os.environ.get("SIMCUDA_ATTENTION", "cudnn")])
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = triton_heuristics.triton_helpers.set_driver_to_gpu = lambda: None
    inductor_config.compile_threads, inductor_config.use_static_cuda_launcher = 1, False
    inductor_config.force_disable_caches = True  # graphs from a cache would not be counted
    torch._functorch.config.enable_autograd_cache = False
    torch._functorch.config.graphsafe_rng_functionalization = False  # it needs a real CUDA generator
    triton_heuristics.TritonCompileResult.make_launcher = _make_launcher
    triton_heuristics.CachingAutotuner.run = _run
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    global _library
    _library = torch.library.Library("aten", "IMPL")
    for kind in ("cudnn", "flash", "efficient"):
        _shapes_only(_library, f"_scaled_dot_product_{kind}_attention")
        _shapes_only(_library, f"_scaled_dot_product_{kind}_attention_backward")
    _shapes_only(_library, "convolution")
    torch._C._conv_determine_backend_memory_format = _convolution_format
    for name in ("mm", "addmm", "bmm", "baddbmm"):
        setattr(extern_kernels, name, _count_only(name))
    _shapes_only(_library, "_addmm_activation")
    compile_to_module = GraphLowering.compile_to_module

    def keep_code(self):
        module = compile_to_module(self)
        code.append(Path(module.__file__).read_text())
        return module

    GraphLowering.compile_to_module = keep_code


install()

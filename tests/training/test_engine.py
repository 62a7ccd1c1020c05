"""What the engine refuses before anything is built."""

import pytest
import torch

from mf_dist.runtime.errors import UserError
from mf_dist.training import engine


@pytest.mark.parametrize(
    ("has_gpu", "needed"), [(False, r"a C\+\+ compiler on a CPU"), (True, "a C compiler for Triton")]
)
def test_a_missing_compiler_is_one_line(monkeypatch, has_gpu, needed):
    engine._check_compiler()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=f"engine.compile=true needs {needed}: install .*engine.compile=false"):
        engine._check_compiler()


def test_missing_python_headers_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"needs .*Python.h for Triton: install the python headers"):
        engine._check_compiler()


def test_memory_is_read_where_gpus_are_named_by_uuid(monkeypatch):
    """With nvidia-ml-py DeepSpeed takes CUDA_VISIBLE_DEVICES for a list of numbers; without it, it asks torch."""
    from deepspeed.accelerator import cuda_accelerator

    nvml = type("nvml", (), {"nvmlDeviceGetHandleByIndex": int})
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a6c1e-0000-4c1d-9f5e-1b2a3c4d5e6f")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"total_memory": 80}))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index=None: 30)
    accelerator = cuda_accelerator.CUDA_Accelerator.__new__(cuda_accelerator.CUDA_Accelerator)
    with pytest.raises(ValueError, match="GPU-8f3a6c1e"):
        accelerator.available_memory(0)
    engine._read_memory_by_torch()
    assert accelerator.available_memory(0) == 50

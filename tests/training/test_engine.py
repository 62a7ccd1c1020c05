"""What the engine changes in DeepSpeed."""

import pytest
import torch

from mf_dist.training import engine


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

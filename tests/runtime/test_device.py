"""Which device a rank takes; a GPU that torch cannot use is never replaced by the CPU in silence."""

import pytest
import torch

from mf_dist.runtime import distributed
from mf_dist.runtime.distributed import choose_device
from mf_dist.runtime.errors import UserError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")


@pytest.fixture
def gpu_files(monkeypatch, tmp_path):
    """The files of a driver, as on a machine with two GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(distributed, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device(3) == torch.device("cpu")


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_gpu_that_torch_cannot_use_is_refused(gpu_files, monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    expected = "driver is missing or too old" if cuda else "a build without CUDA"
    with pytest.raises(UserError, match=f"a GPU that torch cannot use: .*{expected}.*CUDA_VISIBLE_DEVICES=-1"):
        choose_device(0)


def test_a_gpu_that_is_named_and_absent_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2c")
    with pytest.raises(UserError, match="torch cannot use"):
        choose_device(0)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_the_cpu_can_be_asked_for(gpu_files, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device(0) == torch.device("cpu")

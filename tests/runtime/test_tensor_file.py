"""Reading .safetensors: equal to the library's own reader; damage is one line, also while it is read."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mf_dist.runtime.errors import UserError
from mf_dist.runtime.tensor_file import DTYPES, each_tensor, load_tensors, read_metadata


@pytest.fixture
def path(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {f"of {name}": torch.randint(0, 2, (3, 5), generator=g).float().to(DTYPES[name]) for name in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "large": torch.randn(300, 400, generator=g)}
    save_file(tensors, tmp_path / "x.safetensors", {"mf_dist": "text"})
    return tmp_path / "x.safetensors"


def test_tensors_are_those_of_the_library(path):
    expected, found = load_file(path), load_tensors(path)
    assert found.keys() == expected.keys() and len(found) == len(DTYPES) + 3
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor.float(), expected[name].float())
    assert read_metadata(path) == {"mf_dist": "text"}


def test_a_file_that_becomes_shorter_is_an_error(path):
    """Under a memory map the process would end by SIGBUS."""
    tensors = each_tensor(path)
    next(tensors)
    os.truncate(path, 4096)
    with pytest.raises(UserError, match=r"x\.safetensors: it ends within .*; it was longer when it was opened"):
        list(tensors)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 8, b"\x02" + bytes(7) + b"{]", b"GGUF" * 100])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x as safetensors"):
        load_tensors(tmp_path / "x")


def test_types_that_torch_code_here_does_not_use_are_named(tmp_path):
    save_file({"w": torch.zeros(4).to(torch.uint16)}, tmp_path / "x")
    with pytest.raises(UserError, match="w has type U16, expected one of F64"):
        load_tensors(tmp_path / "x")

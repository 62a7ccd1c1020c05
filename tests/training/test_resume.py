"""Initial weights of files from elsewhere."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mf_dist.checkpoint.writer import write_tensors
from mf_dist.config.schema import ModelConfig
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.generator import build_network
from mf_dist.training.resume import load_initial_weights

MODEL = ModelConfig(2, 32, 2, 2, latent_size=8, latent_channels=4, num_classes=10)
KEY = "blocks.0.mlp.fc1.weight"


def weights(seed=1):
    return {name: p.detach().clone() for name, p in build_network(MODEL, seed).named_parameters()}


def load(path, tensors, description=None):
    """The weights of a fresh network after loading the tensors from a file."""
    write_tensors(path, tensors, description) if description else save_file(tensors, path)
    net = build_network(MODEL, 0)
    load_initial_weights(net, str(path))
    return dict(net.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_floating_point_type_are_taken(tmp_path, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in weights().items()}
    loaded = load(tmp_path / "w.safetensors", stored)
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.masked_fill(a == a.max(), torch.nan), "is not finite"),
        (lambda a: a.masked_fill(a == a.max(), torch.inf), "is not finite"),
        (lambda a: a.double() * 1e300, "is not finite"),
        (lambda a: (100 * a).int(), "has type int32, which holds no weights"),
        (lambda a: a > 0, "has type bool"),
        (lambda a: a.to(torch.float8_e4m3fn), "has type float8_e4m3fn"),
        (lambda a: a[1:], r"has shape \(127, 32\), this network needs \(128, 32\)"),
    ],
    ids=["nan", "inf", "too large", "int32", "bool", "float8", "shape"],
)
def test_what_is_no_weight_is_refused_by_its_name(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"^train.init_from .*w.safetensors: {KEY} {message}"):
        load(tmp_path / "w.safetensors", {**weights(), KEY: change(weights()[KEY]).contiguous()})


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    with pytest.raises(UserError, match="blocks.0.attention.proj.bias is missing"):
        load(tmp_path / "w.safetensors", {f"module.{name}": tensor for name, tensor in weights().items()})
    with pytest.raises(UserError, match="zzz is unexpected"):
        load(tmp_path / "w.safetensors", {**weights(), "zzz": torch.zeros(1)})


def test_moments_of_an_optimizer_are_refused(tmp_path):
    """By what training wrote into the file; in a file of another origin by their size, as for all-zero weights."""
    g = torch.Generator().manual_seed(0)
    moments = {name: 1e-3 * torch.randn(a.shape, generator=g) for name, a in weights().items()}
    with pytest.raises(UserError, match="its blocks.0.attention.proj.bias is exp_avg of an optimizer, not a weight"):
        load(tmp_path / "any name.safetensors", weights(), {"kind": "exp_avg"})
    for tensors in (moments, {name: a.square() for name, a in moments.items()}):
        with pytest.raises(UserError, match=r"has \d\.\de-\d+ of the size of initial weights"):
            load(tmp_path / "w.safetensors", tensors)
    with pytest.raises(UserError, match="has 0.0e.00 of the size"):
        load(tmp_path / "w.safetensors", {name: torch.zeros_like(a) for name, a in weights().items()})
    loaded = load(tmp_path / "w.safetensors", {name: a / 10 for name, a in weights().items()}, {"kind": "ema-0.9"})
    assert np.array_equal(loaded[KEY].detach(), weights()[KEY] / 10)

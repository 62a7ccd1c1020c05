"""Initial weights of files from elsewhere, and of models of other data."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mf_dist.checkpoint.model_folder import write_model
from mf_dist.checkpoint.writer import write_tensors
from mf_dist.config.loader import from_tree, to_tree
from mf_dist.config.schema import Config, ModelConfig
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.generator import build_network
from mf_dist.training.initial_weights import load_initial_weights

MODEL = ModelConfig(2, 32, 2, 2, latent_size=8, latent_channels=4, num_classes=10)
KEPT = "initial weights: the source's 10 classes are kept by number: they have no names to compare"
KEY = "blocks.0.mlp.fc1.weight"
PATCH_LAYERS = {"patch_in.weight", "patch_in.bias", "patch_out.weight", "patch_out.bias"}


def config(path, data=None, **model):
    """Of a run with MODEL, but for the changes given, that starts from `path`."""
    tree = {"run_dir": "run", "data": {"path": "data", **(data or {})}, "model": {**to_tree(MODEL), **model}}
    train = {"total_images": 100, "init_from": str(path)}
    return from_tree(Config, {**tree, "train": train, "meanflow": {}}, "test")


def weights(seed=1):
    """None of them zero."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + 0.01 * torch.randn(p.shape, generator=g)
        for name, p in build_network(MODEL, seed).named_parameters()
    }


def load(path, tensors, description=None):
    """The weights of a fresh network after loading the tensors from a file."""
    write_tensors(path, tensors, description) if description else save_file(tensors, path)
    net = build_network(MODEL, 0)
    load_initial_weights(net, config(path), [])
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


def start(folder, run, classes, names):
    """(parameters, log) of a fresh network for `run` after loading a model with `names` of classes."""
    source = config("elsewhere", num_classes=len(names) or 10)
    tensors = weights()
    tensors["label.weight"] = torch.arange(len(names) or 10, -1, -1.0)[:, None].expand(-1, 32).contiguous()
    state = {"step": 5, "samples_seen": 80, "guard": {}, "config": to_tree(source), "classes": names, "ema": "0.9999"}
    write_model(folder, tensors, state)
    net = build_network(run.model, 0)
    lines = load_initial_weights(net, run, classes)
    assert lines[0] == f"initial weights: {folder}/model.safetensors, its EMA of decay 0.9999"
    for name, p in net.named_parameters():
        if name not in PATCH_LAYERS | {"label.weight"}:
            assert torch.equal(p, tensors[name])
    return dict(net.named_parameters()), lines[1:]


@pytest.mark.parametrize(
    ("names", "classes", "rows"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [3, 2, 1, 0]),
        (["a", "b", "c"], ["c", "b", "a"], [1, 2, 3, 0]),
        (["a", "b", "c"], ["b", "x"], [2, None, 0]),
        (["a", "b"], ["x", "y", "z", "b"], [None, None, None, 1, 0]),
        ([], ["x", "y"], [None, None, 0]),
        (["a", "b"], [], [0]),
    ],
    ids=["the same", "another order", "fewer", "more", "without names", "without classes"],
)
def test_classes_keep_their_row_by_name(tmp_path, names, classes, rows):
    """Row n of the source has the number len(names) - n; the null class, the last, 0."""
    run = config(tmp_path, num_classes=len(classes))
    loaded, lines = start(tmp_path, run, classes, names)
    fresh = build_network(run.model, 0).label.weight
    for number, (row, expected) in enumerate(zip(loaded["label.weight"], rows, strict=True)):
        assert torch.equal(row, fresh[number] if expected is None else torch.full((32,), float(expected)))
    kept = sum(row is not None for row in rows) - 1
    assert [f"of {len(classes)} classes, {kept} have the row of the same name" in line for line in lines] == (
        [] if names == classes else [True]
    )


def test_as_many_classes_without_names_keep_their_rows(tmp_path):
    loaded, lines = start(tmp_path, config(tmp_path), [], [])
    assert lines == [KEPT] and loaded["label.weight"][:, 0].tolist() == [*range(10, -1, -1)]


def test_another_resolution_other_channels_and_numbers_are_said(tmp_path):
    loaded, lines = start(tmp_path, config(tmp_path, latent_size=16), [], [])
    assert lines == [KEPT, "initial weights: positions are computed for latents of 16, the source's were 8"]
    run = config(tmp_path, latent_channels=16, data={"normalisation": "channel"})
    loaded, lines = start(tmp_path, run, [], [])
    assert "the patch layers are new, for patches of 2 of 16 channels; the source's were 2 of 4 channels" in lines[0]
    assert (
        lines[2].startswith("warning: ")
        and "data.normalisation=scale, this run has data.normalisation=channel" in lines[2]
    )
    fresh = dict(build_network(run.model, 0).named_parameters())
    assert all(torch.equal(loaded[name], fresh[name]) for name in PATCH_LAYERS) and len(lines) == 3 and lines[1] == KEPT


@pytest.mark.parametrize("network", ["dit", "imf_dit"])
def test_a_bare_file_of_other_channels_and_classes(tmp_path, network):
    imf = {"network": network, "imf_dit": {"head_depth": 1}} if network == "imf_dit" else {}
    source = config("elsewhere", **imf)
    tensors = {name: p.detach() + 0.01 for name, p in build_network(source.model, 1).named_parameters()}
    save_file(tensors, tmp_path / "w.safetensors")
    run = config(tmp_path / "w.safetensors", latent_channels=3, num_classes=4, **imf)
    net = build_network(run.model, 0)
    fresh = dict(build_network(run.model, 0).named_parameters())
    lines = load_initial_weights(net, run, ["a", "b", "c", "d"])
    assert len(lines) == 3 and "the source's were of another size" in lines[1] and "of 4 classes, 0 have" in lines[2]
    new = {name for name, p in net.named_parameters() if torch.equal(p, fresh[name])}
    assert new == PATCH_LAYERS | ({"v_patch_out.weight", "v_patch_out.bias"} if imf else set())
    assert torch.equal(net.label.weight[4], tensors["label.weight"][10])


def test_a_source_without_a_v_head_and_of_other_channels(tmp_path):
    """The v head starts as the u head, with patch layers of its own size."""
    imf = {"network": "imf_dit", "imf_dit": {"head_depth": 1}}
    net = build_network(config("elsewhere", **imf).model, 1, for_sampling=True)
    save_file({name: p.detach() + 0.01 for name, p in net.named_parameters()}, tmp_path / "w.safetensors")
    run = config(tmp_path / "w.safetensors", latent_channels=3, **imf)
    net = build_network(run.model, 0)
    lines = load_initial_weights(net, run, [])
    assert "starts as a copy of the u head" in lines[1] and "the patch layers are new" in lines[2]
    assert torch.equal(net.v_blocks[0].attention.qkv.weight, net.u_blocks[0].attention.qkv.weight)
    assert net.v_patch_out.weight.shape == net.patch_out.weight.shape == (12, 32)


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match="a network of model.network=dit, not imf_dit"):
        start(tmp_path, config(tmp_path, network="imf_dit", imf_dit={"head_depth": 1}), [], [])

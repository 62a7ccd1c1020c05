"""Imported weights give the outputs of the projects' own networks (make_sit_golden.py), and nothing else is taken."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mf_dist.runtime.errors import UserError
from mf_dist.sampling.foreign_weights import check_velocity
from mf_dist.sampling.generator import build_network
from mf_dist.sampling.sit_weights import from_repa, from_sit

CONVERTERS = {"sit": from_sit, "repa": from_repa}


def generator():
    return torch.Generator().manual_seed(1)


def golden(project):
    """(weights by their names, everything else by name)."""
    found = load_file(Path(__file__).with_name("sit_golden.safetensors"))
    own = {name.removeprefix(f"{project}/"): tensor for name, tensor in found.items() if name.startswith(project)}
    weights = {name.removeprefix("weights/"): own.pop(name) for name in list(own) if name.startswith("weights/")}
    return weights, own


def imported(project, weights=None):
    converted = CONVERTERS[project](golden(project)[0] if weights is None else weights, 2, generator())
    net = build_network(converted.model, seed=0)
    net.load_state_dict(converted.tensors)
    return net, converted


@pytest.mark.parametrize("project", CONVERTERS)
def test_outputs_are_those_of_the_projects_own_network_at_all_times(project):
    """SiT's time runs from noise to data, and its velocity with it: v(z, t) of ours is -v(z, 1 - t) of SiT."""
    _, own = golden(project)
    net, converted = imported(project)
    t, v = (1 - own["t"], -own["v"]) if project == "sit" else (own["t"], own["v"])
    with torch.no_grad():
        for r in (t, torch.zeros_like(t)):
            error = (net(own["z"], r, t, own["y"]) - v).abs().max() / v.abs().max()
            assert error < 1e-5
    assert (converted.model.latent_size, converted.model.num_classes, converted.model.depth) == (8, 5, 2)
    expected = {"sit": 1, "repa": 6}
    assert len(converted.left_out) == expected[project]


def test_training_can_change_the_embedding_of_the_interval():
    """Its last layer is zero and gets a gradient, since the first is not."""
    net, _ = imported("sit")
    _, own = golden("sit")
    net(own["z"], own["t"] * 0, own["t"], own["y"]).square().mean().backward()
    assert net.interval.fc2.weight.eq(0).all() and net.interval.fc2.weight.grad.abs().max() > 1e-6


def test_blocks_that_repa_called_decoder_blocks():
    weights, _ = golden("repa")
    earlier = {re.sub(r"^blocks\.1\.", "decoder_blocks.0.", name): tensor for name, tensor in weights.items()}
    assert earlier.keys() != weights.keys()
    _, expected = imported("repa")
    _, converted = imported("repa", earlier)
    assert all(torch.equal(converted.tensors[name], tensor) for name, tensor in expected.tensors.items())


CHANGES = {
    "positions of another kind": ("sit", lambda w: w["pos_embed"].add_(1e-3), "pos_embed of shape"),
    "not finite": ("sit", lambda w: w["blocks.1.mlp.fc1.bias"].fill_(torch.nan), "blocks.1.mlp.fc1.bias is not finite"),
    "integers": ("sit", lambda w: w.update({"blocks.0.mlp.fc1.bias": torch.zeros(64, dtype=torch.int32)}), "int32"),
    "without a layer": ("sit", lambda w: w.pop("blocks.0.attn.qkv.bias"), "blocks.0.attn.qkv.bias is missing"),
    "without a block": ("sit", lambda w: [w.pop(n) for n in list(w) if n.startswith("blocks.0.")], "blocks.0.*missing"),
    "without blocks": ("sit", lambda w: [w.pop(n) for n in list(w) if n.startswith("blocks.")], "blocks.0.*missing"),
    "with another layer": ("sit", lambda w: w.update(x=torch.zeros(2)), "x is unexpected"),
    "another first layer": ("sit", lambda w: w.update({"x_embedder.proj.weight": torch.zeros(16, 16)}), "has shape"),
    "an empty layer": ("sit", lambda w: w.update({"x_embedder.proj.weight": torch.zeros(16, 4, 0, 0)}), "is empty"),
    "no network": ("sit", lambda w: w.clear(), "x_embedder.proj.weight is missing"),
    "other sinusoids": (
        "sit",
        lambda w: w.update({"t_embedder.mlp.0.weight": torch.zeros(16, 64)}),
        "takes 64 numbers",
    ),
    "of SiT, as of REPA": (
        "repa",
        lambda w: w.update(golden("sit")[0]),
        "final_layer.linear has 32 outputs, expected 16",
    ),
    "normalised queries": ("repa", lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}), "normalises"),
    "of DMF": ("repa", lambda w: w.update({"logvar_linear.weight": torch.ones(1, 256)}), "cannot represent it"),
}


@pytest.mark.parametrize(("project", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_is_no_such_network_is_refused(project, change, message):
    weights, _ = golden(project)
    change(weights)
    with pytest.raises(UserError, match=message):
        imported(project, weights)


def test_the_number_of_heads_of_an_unusual_width_must_be_given():
    for heads, message in ((None, "give --num-heads"), (3, "does not divide")):
        with pytest.raises(UserError, match=message):
            from_sit(golden("sit")[0], heads, generator())


def test_only_a_velocity_is_accepted():
    """Layers that copy z to the output; a network that predicts noise has the other sign once it is taken for SiT's."""
    net, _ = imported("sit")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.patch_in.weight.copy_(10 * torch.eye(16))
        net.patch_out.weight.copy_(torch.eye(16))
        check_velocity(net, generator())
        net.patch_out.weight.neg_()
    with pytest.raises(UserError, match="correlation -.* facebook's DiT"):
        check_velocity(net, generator())
    net.patch_out.weight.data.zero_()
    with pytest.raises(UserError, match="correlation nan"):
        check_velocity(net, generator())

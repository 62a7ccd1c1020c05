"""iMF's loss and its gradient against the authors' module in JAX (imf_jax_reference.safetensors by
make_imf_jax_reference.py), from the same weights and draws, in float64."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mf_dist.config.objectives import ImfConfig
from mf_dist.config.schema import ImfDitConfig, ModelConfig
from mf_dist.objectives.guidance import drop_labels, sample_interval
from mf_dist.objectives.imf import ImfLoss
from mf_dist.objectives.times import sample_times
from mf_dist.runtime.tensor_file import load_tensors
from mf_dist.sampling.generator import build_network
from mf_dist.sampling.imf_weights import from_authors

MODEL = ModelConfig(3, 12, 2, 2, 8, 4, 4, network="imf_dit", imf_dit=ImfDitConfig(head_depth=1))
RECIPES = {
    "recipe": ImfConfig(),
    "other": ImfConfig(
        share_r_equals_t=Fraction(3, 8),
        time_mean=0.2,
        time_std=1.5,
        omega_exponent=2.0,
        adaptive_p=0.5,
        adaptive_eps=0.1,
    ),
}


@pytest.fixture(scope="module")
def reference():
    """weight, gradient, draw and loss, each by name; what is not int64 in float64."""
    kinds = {"weight": {}, "gradient": {}, "draw": {}, "loss": {}}
    for name, tensor in load_tensors(Path(__file__).parent / "imf_jax_reference.safetensors").items():
        kind, _, name = name.partition(":")
        kinds[kind][name] = tensor if tensor.dtype == torch.int64 else tensor.double()
    return kinds


def by_our_names(tensors):
    """from_authors, which only moves numbers, in float64: it moves their places, which fp32 holds."""
    places = torch.arange(sum(a.numel() for a in tensors.values()), dtype=torch.float64)
    numbers = torch.cat([a.flatten() for a in tensors.values()])
    parts = places.split([a.numel() for a in tensors.values()])
    moved = from_authors({name: part.view_as(a) for (name, a), part in zip(tensors.items(), parts, strict=True)})
    return {name: numbers[place.long()] for name, place in moved.items()}


def network(reference):
    net = build_network(MODEL, 0).double()
    net.load_state_dict(by_our_names(reference["weight"]))
    return net


def loss_of(net, draws, recipe):
    draws = dict(draws)
    return ImfLoss(net, recipe)(draws.pop("x"), draws.pop("y"), draws, torch.tensor(0.0))[0]


def test_rows_are_of_every_kind(reference):
    """r = t with and without label, r < t within and outside the interval of guidance, on both sides of it."""
    draws = reference["draw"]
    _, t = sample_times(draws["time_normals"], 4, RECIPES["recipe"].time_mean, RECIPES["recipe"].time_std)
    start, end = sample_interval(draws["interval_uniforms"], 4)
    before, after = t < start, t > end
    assert before[4:].any() and after[4:].any() and not (before | after)[4:].all()
    y = drop_labels(draws["y"], draws["drop_uniforms"], 4, RECIPES["recipe"].label_drop, MODEL.num_classes)
    assert (y == MODEL.num_classes).tolist() == [True] * 2 + [False] * 6


@pytest.mark.parametrize("case", ["recipe", "other"])
def test_the_loss_is_the_authors(reference, case):
    loss = loss_of(network(reference), reference["draw"], RECIPES[case])
    torch.testing.assert_close(loss.detach(), reference["loss"][case], atol=0, rtol=1e-10)


def test_the_gradient_is_the_authors(reference):
    net = network(reference)
    loss_of(net, reference["draw"], RECIPES["recipe"]).backward()
    theirs = by_our_names(reference["gradient"])
    assert theirs.keys() == dict(net.named_parameters()).keys()
    for name, p in net.named_parameters():
        scale = theirs[name].abs().max()
        assert scale > 1e-4 and (p.grad - theirs[name]).abs().max() <= 1e-10 * scale, name

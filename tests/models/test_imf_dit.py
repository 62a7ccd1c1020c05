"""iMF's network against the authors' (imf_reference.safetensors by make_imf_reference.py); its sizes and state."""

from pathlib import Path

import pytest
import torch
from oracles import random_guidance, small_imf_dit

from mf_dist.config import cost
from mf_dist.config.schema import ImfDitConfig, ModelConfig
from mf_dist.models.imf_dit import Guidance, ImfDiT
from mf_dist.models.sizes import named_imf_dit
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.tensor_file import load_tensors
from mf_dist.runtime.weights import load_weights
from mf_dist.sampling.generator import build_network, sampling_network
from mf_dist.sampling.imf_weights import from_authors

MODEL = ModelConfig(3, 20, 2, 2, 4, 4, 3, network="imf_dit", imf_dit=ImfDitConfig(head_depth=1))


@pytest.fixture(scope="module")
def reference():
    """weight, input and output, each by name."""
    kinds = {"weight": {}, "input": {}, "output": {}}
    for name, tensor in load_tensors(Path(__file__).parent / "imf_reference.safetensors").items():
        kind, _, name = name.partition(":")
        kinds[kind][name] = tensor
    return kinds


def inputs_of(reference, dtype):
    """z, r, t, y, guidance; r = t - h with t = 1, h = 0 in two rows."""
    z, h, omega, start, end = (reference["input"][name].to(dtype) for name in ("z", "h", "omega", "start", "end"))
    return z, 1 - h, torch.ones_like(h), reference["input"]["y"], Guidance(omega, start, end)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_u_and_v_are_those_of_the_authors(reference, dtype, tolerance):
    net = build_network(MODEL, 0).to(dtype)
    load_weights(net, from_authors(reference["weight"]), "reference")
    u, v = net(*inputs_of(reference, dtype), head="both")
    for name, ours in (("u", u), ("v", v)):
        theirs = reference["output"][f"{name}.{str(dtype).removeprefix('torch.')}"]
        assert theirs.dtype == dtype and theirs.abs().max() > 1
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
def test_the_network_for_sampling_has_no_v_head_and_the_same_u(reference):
    """The authors' files for sampling hold the v head's last layer without its blocks."""
    z, r, t, y, guidance = inputs_of(reference, torch.float32)
    without = {f"net.{name}": w for name, w in reference["weight"].items() if not name.startswith("v_heads.")}
    trained = from_authors(reference["weight"])
    for weights in (trained, from_authors(without)):
        net = sampling_network(MODEL, weights, "reference")
        assert not any(name.startswith("v_") for name, _ in net.named_parameters())
        u = net(z, r, t, y, guidance)
        torch.testing.assert_close(u, reference["output"]["u.float32"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("u_heads.0.mlp.w3._flax_linear.weight"), "u_heads.0.mlp.w3._flax_linear.weight is missing"),
        (lambda w: w.pop("omega_tokens"), "omega_tokens is missing"),
        (lambda w: w.update(pos_embed=torch.zeros(3)), "pos_embed is unexpected"),
        (lambda w: w.update({"shared_blocks.0.attn.k_proj._flax_linear.weight": torch.zeros(20, 3)}), "k_proj"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(20, 16)}), "shape (20, 16), not (D, C, P, P)"),
    ],
)
def test_other_weights_are_refused_by_name(reference, change, expected):
    weights = dict(reference["weight"])
    change(weights)
    with pytest.raises(UserError) as error:
        from_authors(weights)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "at_inference", "in_training"),
    [  # counted in the authors' module, with eval_mode and without
        ("B/2", 88_948_256, 145_596_960),
        ("M/2", 173_921_312, 230_570_016),
        ("L/2", 409_071_648, 509_752_352),
        ("XL/2", 610_433_056, 711_113_760),
    ],
)
def test_parameter_counts_are_the_authors(name, at_inference, in_training):
    model = named_imf_dit(name, 32)
    with torch.device("meta"):
        net, sampling = build_network(model, 0), build_network(model, 0, for_sampling=True)
    assert sum(p.numel() for p in net.parameters()) == cost.parameters(model) == in_training
    last_v = 17 * model.hidden_size + 16  # the v head's last layer, which their network keeps
    count = sum(p.numel() for p in sampling.parameters())
    assert count == cost.parameters(model, for_sampling=True) == at_inference - last_v


@torch.no_grad()
def test_initial_weights_are_distributed_as_the_authors():
    model = ModelConfig(2, 128, 2, 2, 8, 4, 100, network="imf_dit", imf_dit=ImfDitConfig(head_depth=1))
    net = build_network(model, 1)
    assert isinstance(net, ImfDiT)
    for name, p in net.named_parameters():
        last = name in ("patch_out.weight", "v_patch_out.weight")
        if name.endswith(("bias", "gate1", "gate2")) or last:
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            uniform = (2 / (16 + 128)) ** 0.5  # of the Xavier-uniform patches
            std = uniform if name == "patch_in.weight" else (0.32 if "blocks." in name else 1) * p.shape[1] ** -0.5
            assert p.std() == pytest.approx(std, rel=0.12 if name.endswith("tokens") else 0.06), name
    assert net.patch_in.weight.abs().max() <= (6 / (16 + 128)) ** 0.5
    same, other = build_network(model, 1), build_network(model, 2)
    for name, p in net.state_dict().items():
        assert torch.equal(p, same.state_dict()[name])
    assert not torch.equal(net.patch_in.weight, other.patch_in.weight)


@torch.no_grad()
def test_heads_agree_and_only_t_minus_r_is_seen():
    net, guidance, y = small_imf_dit(), random_guidance(2), torch.tensor([0, 3])
    z, r, t = torch.randn(2, 3, 4, 4).double(), torch.tensor([0.2, 0.5]).double(), torch.tensor([0.7, 0.5]).double()
    u, v = net(z, r, t, y, guidance, head="both")
    assert torch.equal(net(z, r, t, y, guidance), u) and torch.equal(net(z, r, t, y, guidance, head="v"), v)
    assert (u - v).abs().max() > 0.1
    torch.testing.assert_close(net(z, r + 0.2, t + 0.2, y, guidance), u)
    changed = [guidance._replace(**{name: getattr(guidance, name) * 0.8}) for name in Guidance._fields]
    others = [net(z, r - 0.1, t, y, guidance), net(z, r, t, 1 + 0 * y, guidance)]
    others += [net(z, r, t, y, other) for other in changed]
    assert all((u - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3 for other in others)


def test_backward_recomputes_each_block_once():
    net, y = small_imf_dit(), torch.tensor([0, 3])
    z, time, calls = torch.randn(2, 3, 4, 4).double(), torch.rand(2).double(), []
    for branch in net.branches():
        for block in branch.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for net.checkpoint_blocks in (False, True):
        u, v = net(z, time / 2, time, y, random_guidance(2), head="both")
        gradients.append(torch.autograd.grad(u.square().sum() + v.square().sum(), list(net.parameters())))
    assert len(calls) == 3 * 4  # of four blocks: a forward each, and the recomputation
    for saved, recomputed in zip(*gradients, strict=True):
        assert saved.any() and torch.equal(saved, recomputed)


def test_a_step_is_one_graph():
    """A target's passes and the regression, the JVP in another dtype than the rest: torch.compile breaks nowhere."""
    net, y, guidance = small_imf_dit(depth=2).float(), torch.tensor([0, 3]), random_guidance(2, torch.float32)
    net.tangent_dtype = torch.float64
    z, t = torch.randn(2, 3, 4, 4), torch.rand(2)

    def step(z, r, t):
        with torch.no_grad():
            v_c = net(z, t, t, y, guidance, head="v")
            _, du_dt = net(z, r, t, y, guidance, tangent=(v_c, torch.zeros_like(t), torch.ones_like(t)))
        u, v = net(z, r, t, y, guidance, head="both")
        return (u + du_dt).square().sum() + (v - v_c).square().sum()

    eager, compiled = (run(z, t / 2, t) for run in (step, torch.compile(step, backend="eager", fullgraph=True)))
    torch.testing.assert_close(eager, compiled)

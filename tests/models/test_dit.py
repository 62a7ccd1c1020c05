"""The network's shapes, sizes and initial state."""

import pytest
import torch
import torch.nn.functional as F
from oracles import small_dit

from mf_dist.config.schema import load_config
from mf_dist.models.dit import DiT, sine_cosine_positions
from mf_dist.models.layers import LinearGelu, gelu
from mf_dist.sampling.generator import build_network


@pytest.mark.parametrize(
    ("name", "millions"), [("b4", 131), ("b2", 131), ("m2", 308), ("l2", 459), ("xl2", 676), ("xl2plus", 676)]
)
def test_parameter_counts_of_the_presets_match_the_paper(name, millions):
    config = load_config(f"configs/imagenet256_{name}.yaml", [])
    model = config.model
    with torch.device("meta"):
        net = DiT(
            latent_size=32,
            latent_channels=4,
            num_classes=1000,
            patch_size=model.patch_size,
            hidden_size=model.hidden_size,
            depth=model.depth,
            num_heads=model.num_heads,
            generator=None,
        )
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


def test_u_and_its_tangent_start_at_zero():
    g = torch.Generator().manual_seed(0)
    net = DiT(
        latent_size=4, latent_channels=3, num_classes=2, patch_size=2, hidden_size=16, depth=1, num_heads=2, generator=g
    )
    z = torch.randn(2, 3, 4, 4)
    u, du = net(z, torch.zeros(2), torch.ones(2), torch.tensor([0, 2]), tangent=(z, torch.zeros(2), torch.ones(2)))
    assert u.abs().max() == 0 and du.abs().max() == 0


def test_initial_weights_follow_from_the_seed_alone():
    config = load_config(
        "configs/digits_cpu.yaml", ["model.latent_size=8", "model.latent_channels=4", "model.num_classes=10"]
    )
    a, b, c = build_network(config.model, 1), build_network(config.model, 1), build_network(config.model, 2)
    for name, p in a.state_dict().items():
        assert torch.equal(p, b.state_dict()[name])
    assert not torch.equal(a.patch_in.weight, c.patch_in.weight)


def test_patch_order():
    net = small_dit()
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(net._unpatchify(net._patchify(z)), z)
    first_patch = net._patchify(z)[0, 1].reshape(2, 2, 3)  # the second patch of the first row: columns 2 and 3
    assert torch.equal(first_patch, z[0, :, :2, 2:].permute(1, 2, 0))


def test_positions_match_mae():
    """Half for columns, half for rows, each sines then cosines of position / 10000^(k / (D / 4))."""
    positions = sine_cosine_positions(8, 3)
    row, column = 2, 1
    across = torch.tensor([column, column / 100.0])
    down = torch.tensor([row, row / 100.0])
    expected = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()])
    torch.testing.assert_close(positions[row * 3 + column], expected)


def test_u_depends_on_label_and_both_times():
    net = small_dit()
    z, r, t, y = (
        torch.randn(1, 3, 4, 4).double(),
        torch.tensor([0.2]).double(),
        torch.tensor([0.7]).double(),
        torch.tensor([1]),
    )
    base = net(z, r, t, y)
    for other in (net(z, r + 0.1, t, y), net(z, r, t + 0.1, y), net(z, r, t, y + 1), net(z, r, t, y + 2)):
        assert (base - other).abs().max() > 1e-3


@pytest.mark.gpu
def test_gelu_inside_a_product_is_gelu_after_it():
    """On a GPU in bf16, without a backward: cuBLAS applies the GELU before rounding. 2 units of the last place."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    g = torch.Generator().manual_seed(0)
    layer, x = LinearGelu(96, 384), torch.randn(4, 32, 96, generator=g)
    exact = gelu(F.linear(x.bfloat16().double(), layer.weight.bfloat16().double(), layer.bias.bfloat16().double()))[0]
    with torch.no_grad():
        fused, _ = layer.to("cuda", torch.bfloat16)(x.to("cuda", torch.bfloat16))
    assert (fused.double().cpu() - exact).abs().max() <= 2**-7 * exact.abs().max()

"""FD-DINOv2: the network against DINOv2's own code, the preprocessing against Pillow's, and which weights are taken."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_measure import ALONE, as_npz, measured, pixels  # noqa: F401  a fixture

from mf_dist.evaluation import dinov2
from mf_dist.evaluation.dinov2 import DINOv2, load_dinov2, normalised, open_dinov2, vision_transformer
from mf_dist.evaluation.features import open_features
from mf_dist.evaluation.metrics import metric_name
from mf_dist.runtime.errors import UserError

SMALL = {"width": 32, "depth": 2, "heads": 2}
CLASS_TOKENS = [
    [0.287487, 0.739335, -1.970381, 1.841396, -1.262927, 0.836230, -0.843177, 1.094882],
    [-0.099924, 0.986428, -1.910854, 1.405986, -1.505445, 1.005895, -1.014706, 0.878115],
]
"""Every fourth of 32 numbers by DinoVisionTransformer of facebookresearch/dinov2 (main, b8931f7), built as its hub
builds ViT-L/14 (518 pixels, init_values 1, no registers, interpolate_offset 0.1) but for the sizes SMALL, with
`random_weights` of its state_dict, for the images of `random_images`."""


def random_weights(shapes):
    """Name -> tensor, drawn in order of the names: near 1 for what multiplies, else near 0."""
    tensors = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        around = 1 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")) else 0
        drawn = np.random.Generator(np.random.Philox(number)).standard_normal(shape) * 0.2 + around
        tensors[name] = torch.from_numpy(drawn.astype(np.float32))
    return tensors


def random_images():
    drawn = np.random.Generator(np.random.Philox(99)).standard_normal((2, 3, 224, 224))
    return torch.from_numpy(drawn.astype(np.float32))


def small_weights():
    """As DINOv2 stores them: positions of 37 x 37 patches, and the token for masked ones."""
    shapes = {name: tuple(tensor.shape) for name, tensor in vision_transformer(**SMALL).state_dict().items()}
    return random_weights({**shapes, "pos_embed": (1, 1 + 37 * 37, 32), "mask_token": (1, 32)})


@pytest.fixture(scope="module")
def small():
    network = vision_transformer(**SMALL).eval()
    load_dinov2(network, small_weights(), "test")
    return network


def test_features_are_those_of_dinov2s_own_code(small):
    with torch.no_grad():
        found = small(random_images())
    assert found.shape == (2, 32)
    np.testing.assert_allclose(found[:, ::4], CLASS_TOKENS, rtol=1e-4, atol=1e-5)


def test_positions_interpolated_as_timm_does_would_be_others(small, monkeypatch):
    """The test above would notice."""
    from timm.layers import resample_abs_pos_embed

    theirs = resample_abs_pos_embed(small_weights()["pos_embed"], [16, 16], num_prefix_tokens=1)
    monkeypatch.setattr(dinov2, "positions_at_224", lambda _: theirs)
    other = vision_transformer(**SMALL).eval()
    load_dinov2(other, small_weights(), "test")
    with torch.no_grad():
        assert np.abs(other(random_images())[:, ::4].numpy() - CLASS_TOKENS).max() > 1e-2


def test_the_full_network_is_vit_large():
    """On the meta device, where it takes no memory: 304,368,640 parameters (the published ones, with 1 + 37 37
    positions and the mask's token) less what is left out."""
    with torch.device("meta"):
        network = vision_transformer(width=1024, depth=24, heads=16)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 304_368_640 - 1024 - (37 * 37 - 16 * 16) * 1024


@pytest.mark.parametrize("side", [64, 256])
def test_preprocessing_is_pillows_to_a_level(side):
    """EDM2's reference way is Pillow's bicubic, rounded to uint8 after each of its two passes; its fast way, ours, is
    torch's without rounding."""
    noise = np.random.default_rng(0).integers(80, 176, (2, side, side, 3)).astype(np.uint8)  # no overshoot is clipped
    pil = np.stack([np.asarray(Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC)) for one in noise])
    stacked = torch.from_numpy(noise).permute(0, 3, 1, 2)
    mean, std = (np.array(values) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    difference = np.abs((normalised(stacked).permute(0, 2, 3, 1).numpy() * std + mean) * 255 - pil)
    assert difference.max() <= 1.5 and difference.mean() < 0.4
    other = F.interpolate(stacked.float(), (224, 224), mode="bicubic").permute(0, 2, 3, 1).numpy()
    assert np.abs(other - pil).mean() > 1  # without antialiasing torch has another kernel


def test_a_measurement_has_its_name_and_no_inception_score(small, images, tmp_path, pixels, monkeypatch):  # noqa: F811
    monkeypatch.setattr(DINOv2, "dimension", 32)
    network = DINOv2(small, "1a2b3c4d" * 8, torch.device("cpu"))
    few = as_npz(tmp_path / "few.npz", pixels[:60])
    entry = measured(few, as_npz(tmp_path / "real.npz", pixels[60:]), network, tmp_path)[0].entry
    assert set(entry["metrics"]) >= {"fd_dinov2_1a2b3c4d_60", "precision_dinov2_1a2b3c4d_60"}
    assert not [name for name in entry["metrics"] if name.startswith("is_")]
    assert entry["resize"] == "bicubic, antialiased, to 224 (torch)"
    published = DINOv2(small, dinov2.SHA256, torch.device("cpu"))
    assert metric_name("fid", published, 50_000) == "fd_dinov2_50k" and published.is_published
    with pytest.raises(UserError, match="have no classes"):
        measured(few, few, network, tmp_path, kinds=("is",))


def test_weights_are_identified_by_hash_before_they_are_read(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no weights")
    for weights in (None, str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match=r"weights of DINOv2 are missing.*curl -L -o FILE https://.*d5383ea8f4877b"):
            open_features("dinov2-l", weights, ALONE.device)
    with pytest.raises(UserError, match="is not the published DINOv2 .* it was not loaded"):
        open_features("dinov2-l", str(tmp_path / "x.pth"), ALONE.device)


def test_other_weights_are_taken_and_misshapen_ones_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2, "vision_transformer", lambda **_: vision_transformer(**SMALL))
    torch.save(small_weights(), tmp_path / "x.pth")
    network = open_dinov2("dinov2-l-other", str(tmp_path / "x.pth"), ALONE.device)
    assert network.name == f"dinov2_{network.sha256[:8]}" and not network.is_published
    with torch.no_grad():
        assert torch.equal(network.network(random_images()), small(random_images()))
    torch.save({**small_weights(), "pos_embed": torch.zeros(1, 5, 32)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"pos_embed has shape \(1, 5, 32\), this network needs \(1, 257, 32\)"):
        open_dinov2("dinov2-l-other", str(tmp_path / "x.pth"), ALONE.device)


def test_timm_is_imported_only_where_it_is_used():
    """By one function; that no other file imports it is tested for all libraries."""
    tree = ast.parse(Path(dinov2.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "timm" in str(node.module)]
    assert len(imports) == 1 and imports[0].col_offset > 0

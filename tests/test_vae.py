"""The VAE: ranges, scale, errors; with the shipped one and one of SD-VAE's full shape."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import VAE
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from mf_dist.data.normalisation import scale_of
from mf_dist.runtime.errors import UserError
from mf_dist.vae import WEIGHTS, Vae, to_pixels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    return Vae(str(VAE), CPU)


def test_round_trip_of_real_images(vae, images):
    from mf_dist.data.image_folder import list_images
    from mf_dist.data.images import load_image

    folder = list_images(images)
    pixels = torch.from_numpy(np.stack([load_image(folder.root / path, 32) for path in folder.paths]))
    mean = vae.encode(pixels).chunk(2, dim=1)[0]
    error = (vae.decode(mean).double() - pixels.double()).square().mean()
    assert 10 * np.log10(255**2 / error) > 35  # dB
    x = scale_of(vae.identity, CPU).sample_posterior(vae.encode(pixels), torch.randn(mean.shape))
    assert 0.8 < x.std() < 1.2  # the scale makes latents of unit variance


def test_posterior_sample_is_mean_plus_std_times_noise_scaled():
    moments = torch.tensor([3.0, 0.5]).half().reshape(1, 2, 1, 1)
    x = scale_of({"scaling_factor": 0.18215}, CPU).sample_posterior(moments, torch.full((1, 1, 1, 1), 2.0))
    assert x.dtype == torch.float32 and x.item() == pytest.approx((3 + 0.5 * 2) * 0.18215)


def test_moments_are_diffusers_own(vae):
    pixels = torch.from_numpy(np.round(load_digits().images[:2] * 15.9375).astype(np.uint8))
    pixels = pixels[:, None].repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    posterior = vae.model.encode(pixels.float() / 255 * 2 - 1).latent_dist
    torch.testing.assert_close(vae.encode(pixels), torch.cat([posterior.mean, posterior.std], 1), atol=1e-5, rtol=1e-4)


def test_pixels_are_rounded_never_truncated():
    levels = torch.arange(256, dtype=torch.float64)
    assert torch.equal(to_pixels(levels / 255 * 2 - 1), levels.to(torch.uint8))
    assert torch.equal(to_pixels((levels + 0.49) / 255 * 2 - 1), levels.to(torch.uint8))
    assert to_pixels(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_sd_vaes_shape_and_old_config(tmp_path):
    """A random AutoencoderKL of SD-VAE's layout at quarter width, saved without a scaling factor like the published
    file: the class's default 0.18215 applies."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    vae = Vae(str(tmp_path), CPU)
    assert vae.identity["scaling_factor"] == 0.18215
    assert vae.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 8, 8, 8)


def test_errors_name_what_is_missing_or_wrong(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no VAE folder at"):
        Vae(str(tmp_path / "nothing"), CPU)
    with pytest.raises(UserError, match="no VAE folder at 'mf_dist/digitsvae'; working directory"):
        Vae("mf_dist/digitsvae", CPU)
    with pytest.raises(UserError, match=r"has no config\.json"):
        Vae(str(tmp_path), CPU)
    copy = tmp_path / "copy"
    shutil.copytree(VAE, copy)
    identity = Vae(str(copy), CPU).identity
    with pytest.raises(UserError, match="were made with abc"):
        Vae(str(copy), CPU, {**identity, "sha256": "abc"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "scaling_factor": 5.0}))
    with pytest.raises(UserError, match=r"has scaling_factor 5\.0, the latents were made with 0\.9"):
        Vae(str(copy), CPU, identity)
    (copy / "config.json").write_text(json.dumps({**config, "shift_factor": 0.25}))
    with pytest.raises(UserError, match=r"has shift_factor 0\.25, the latents were made with none"):
        Vae(str(copy), CPU, {"scaling_factor": config["scaling_factor"]})  # as an imported model knows of its VAE
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "diffusion_pytorch_model.safetensors")
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, copy / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"not those of a complete AutoencoderKL: encoder\.conv_in\.weight"):
        Vae(str(copy), CPU)
    shutil.copy(VAE / "diffusion_pytorch_model.safetensors", copy)
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the VAE") as error:
        Vae(str(copy), CPU)
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        Vae(str(copy), CPU)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        (
            "scaling_factor",
            (None, [0.2], "0.2", True, 0, -1, 1e-9, 1e9, 10**400, float("nan"), float("inf"), {}),
            r"scaling_factor is .*, expected a number from 1e-6 to 1e6",
        ),
        ("shift_factor", ([0.1], "x", True, float("nan"), 10**400), "shift_factor is .*, expected a number"),
        ("latents_mean", ([0.0] * 3, 0.1, [], [None] * 4, {}), "latents_mean is .*, expected a list of 4 numbers"),
        ("latents_mean", ([0.0] * 4,), "has latents_mean; expected shift_factor, or latents_mean and latents_std"),
        ("latents_std", ([1.0, 1.0, 1.0, 0.0], [-1.0] * 4), "latents_std is .*, expected a list of 4 positive numbers"),
        ("latents_std", ([1.0] * 4,), "has latents_std; expected shift_factor, or latents_mean and latents_std"),
        ("latent_channels", (0, -4, 4.5, None, "4", True), "latent_channels is .*, expected a whole number >= 1"),
        ("layers_per_block", (0, None, [1]), "layers_per_block is .*, expected a whole number >= 1"),
        ("norm_num_groups", (0, None), "norm_num_groups is .*, expected a whole number >= 1"),
        ("norm_num_groups", (7,), "cannot load the VAE in .*"),
        (
            "block_out_channels",
            ([], None, 16, [0], [16, "32", 32]),
            "block_out_channels is .*, expected a list of whole",
        ),
        ("block_out_channels", ([16, 32, 32, 32], [16]), "block_out_channels, down_block_types, .* differ in length"),
        ("in_channels", (1, 4, None), "in_channels is .*, expected 3"),
        ("out_channels", (1, "3"), "out_channels is .*, expected 3"),
        ("down_block_types", (["Unknown"] * 3, [None] * 3), "cannot load the VAE in .*"),
        ("act_fn", (7, None, "unknown"), "cannot load the VAE in .*"),
        ("sample_size", ("x", {}), "cannot load the VAE in .*"),
        ("_class_name", (None, "UNet2DModel"), "is of class .*, expected AutoencoderKL"),
    ],
)
def test_numbers_of_a_config_that_would_break_later_are_refused(tmp_path, key, values, message):
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).symlink_to(VAE / name)
    config = json.loads((VAE / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    for value in values:
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=message) as caught:
            Vae(str(tmp_path), CPU)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "expected JSON"),
        (b"\xff{}", "expected JSON"),
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, raw, message):
    (tmp_path / WEIGHTS).symlink_to(VAE / WEIGHTS)
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        Vae(str(tmp_path), CPU)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a / 0, "encoder.conv_in.weight is not finite"),
        (lambda a: (100 * a).int(), "encoder.conv_in.weight has type I32, which holds no weights"),
        (lambda a: a.to(torch.float8_e4m3fn), "encoder.conv_in.weight has type F8_E4M3, which holds no weights"),
    ],
    ids=["not finite", "int32", "float8"],
)
def test_weights_that_are_none_are_refused(tmp_path, change, message):
    shutil.copytree(VAE, tmp_path, dirs_exist_ok=True)
    tensors = load_file(VAE / WEIGHTS)
    tensors["encoder.conv_in.weight"] = change(tensors["encoder.conv_in.weight"])
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=message):
        Vae(str(tmp_path), CPU)


def test_large_images_are_decoded_in_equal_parts(vae, monkeypatch):
    """To the same pixels but for rounding; the parts depend on the images' size alone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, 8, 8, generator=g)
    whole, sizes = vae.decode(x), []
    monkeypatch.setattr("mf_dist.vae.DECODED_PIXELS", 4 * 32 * 32)
    decode = vae.model.decode
    monkeypatch.setattr(vae.model, "decode", lambda part: sizes.append(len(part)) or decode(part))
    assert (vae.decode(x).int() - whole.int()).abs().max() <= 1
    assert sizes == [4, 4, 2]

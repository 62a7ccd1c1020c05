"""What a network is trained on: latents shifted and scaled by the VAE's config or by the dataset's channels."""

import json

import numpy as np
import pytest
import torch
from conftest import FEATURES, TINY, encode, run_python
from PIL import Image

from mf_dist.checkpoint.reader import find_checkpoint
from mf_dist.config.loader import to_tree
from mf_dist.config.schema import load_config, resolve
from mf_dist.data.normalisation import channel_summary, normalisation
from mf_dist.data.shards import LatentShards, read_manifest
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.generator import ImageGenerator, load_trained_model
from mf_dist.training.resume import check_config_changes
from mf_dist.vae import Vae

CPU = torch.device("cpu")
SHIFTED = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
"""The numbers of FLUX.1; SD3's are 1.5305 and 0.0609."""
BY_CHANNEL = {
    "latent_channels": 32,
    "scaling_factor": 0.5,
    "latents_mean": [0.05 * c - 0.8 for c in range(32)],
    "latents_std": [0.5 + 0.05 * c for c in range(32)],
}
MEAN, STD = [0.86488, -0.27787343, 0.21616915, 0.3738409], [4.85503674, 5.31922414, 3.93725398, 3.9870003]
"""Of Stable Diffusion's latents, as iMF (arXiv 2512.02012) normalises them."""


@pytest.fixture(scope="module")
def random_vaes(tmp_path_factory):
    """Folders of VAEs of random weights, without the 1x1 convolutions around the latent, as SD3's and FLUX's."""
    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    from diffusers import AutoencoderKL

    folders = {}
    for name, numbers in {"shifted": SHIFTED, "by_channel": BY_CHANNEL}.items():
        folders[name] = tmp_path_factory.mktemp(name) / "vae"
        torch.manual_seed(3)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **numbers,
        ).save_pretrained(folders[name])
    return folders


class Teacher(torch.nn.Module):
    """u(z, r, t) = z - x: one step from z at t = 1 gives x, whatever the noise."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, z, r, t, y):
        return z - self.x


@pytest.mark.parametrize("name", ["shifted", "by_channel"])
@pytest.mark.parametrize("overrides", [[], ["data.normalisation=channel"]])
def test_samples_decode_to_what_the_vae_itself_decodes(tmp_path, random_vaes, images, name, overrides):
    """From image files through shards, normalisation, sampler and decoder, against diffusers alone."""
    encode(images, tmp_path / "latents", vae=random_vaes[name])
    config_file = tmp_path / "config.yaml"
    config_file.write_text(TINY.format(run=tmp_path / "run", latents=tmp_path / "latents", features="x", images="y"))
    shards = LatentShards(tmp_path / "latents")
    config = resolve(load_config(str(config_file), overrides), shards.manifest, 1)
    scale = normalisation(config.data, shards.manifest["vae"], CPU)
    moments = torch.from_numpy(np.stack([shards[i][0] for i in range(20)]))
    x = scale.sample_posterior(moments, torch.zeros(20, config.model.latent_channels, 8, 8))
    vae = Vae(str(random_vaes[name]), CPU, shards.manifest["vae"])
    generator = ImageGenerator(Teacher(x), vae, config, CPU)
    sampled = generator(torch.randn(1, *x.shape), torch.zeros(20, dtype=torch.int64), [1.0, 0.0])
    files = sorted(images.rglob("*.png"))[:20]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])).permute(0, 3, 1, 2)
    with torch.no_grad():
        own = vae.model.decode(vae.model.encode(pixels.float() / 127.5 - 1).latent_dist.mode()).sample
    own = ((own + 1) * 127.5).round().clamp(0, 255)
    assert own.std() > 1 and np.abs(sampled.astype(int) - own.numpy().astype(int)).max() <= 1
    if not overrides:  # as diffusers' pipelines write it
        numbers = SHIFTED if name == "shifted" else BY_CHANNEL
        mean = torch.tensor(numbers.get("latents_mean", [numbers.get("shift_factor")])).reshape(-1, 1, 1)
        std = torch.tensor(numbers.get("latents_std", [1.0])).reshape(-1, 1, 1)
        latents = moments[:, : x.shape[1]].float()
        torch.testing.assert_close(x * std / numbers["scaling_factor"] + mean, latents, atol=1e-5, rtol=1e-5)


def test_a_run_on_16_shifted_channels_trains_samples_and_is_measured(tmp_path, random_vaes, images):
    """As a user runs it; the checkpoint alone says how to undo the normalisation, and a change needs consent."""
    run, latents, config = tmp_path / "run", tmp_path / "latents", tmp_path / "config.yaml"
    encode(images, latents, vae=random_vaes["shifted"])
    config.write_text(TINY.format(run=run, latents=latents, features=FEATURES, images=images))
    channel = ["data.normalisation=channel", "train.total_images=48", "log.sample_every_images=0"]
    run_python("-m", "mf_dist.train", config, *channel)
    manifest = read_manifest(latents)
    state = find_checkpoint(run).state
    assert (
        state["config"]["data"]["normalisation_mean"] == manifest["channel_mean"]
        and len(manifest["channel_mean"]) == 16
    )
    now = {**state, "config": to_tree(resolve(load_config(str(config), []), manifest, 1))}
    with pytest.raises(UserError, match="data.normalisation=channel, now it is scale"):
        check_config_changes(find_checkpoint(run), now, allowed=False)
    run_python("tools/fid_eval.py", "--checkpoint", run, "--nfe", 1, "--num-samples", 60, "--metrics", "fid")
    assert json.loads((run / "eval/metrics.json").read_text())[0]["num_samples"] == 60
    generator = load_trained_model(find_checkpoint(run), None, None, CPU).generator
    assert generator.normalisation.mean.flatten().tolist() == pytest.approx(manifest["channel_mean"])


def test_channel_normalisation_makes_means_0_and_stds_1(tmp_path, latents):
    """Of posterior samples of all images."""
    shards = LatentShards(latents)
    config = tmp_path / "config.yaml"
    config.write_text(TINY.format(run=tmp_path / "run", latents=latents, features="x", images="y"))
    data = resolve(load_config(str(config), ["data.normalisation=channel"]), shards.manifest, 1).data
    moments = torch.from_numpy(np.stack([shards[i][0] for i in range(shards.count)]))
    noise = torch.randn(20, shards.count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = normalisation(data, shards.manifest["vae"], CPU)
    x = torch.cat([scale.sample_posterior(moments, e) for e in noise])
    assert x.mean((0, 2, 3)).abs().max() < 5e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 5e-3
    torch.testing.assert_close(scale.apply(scale.undo(x)), x)


def test_the_summary_advises_where_channels_are_far_from_normal():
    for mean, std, advised in ((MEAN, STD, False), ([9.0, 0, 0, 0], STD, True), (MEAN, [1.0, 5, 5, 5], True)):
        vae = {"scaling_factor": 0.18215}
        words = channel_summary({"vae": vae, "channel_mean": mean, "channel_std": std})
        assert ("data.normalisation=channel" in words) == advised
    assert "means 0.158, -0.051, 0.039, 0.068 and stds 0.884, 0.969, 0.717, 0.726" in channel_summary(
        {"vae": vae, "channel_mean": MEAN, "channel_std": STD}
    )


def test_given_numbers_are_used_and_bad_ones_refused_in_one_line(tmp_path, latents):
    config = tmp_path / "config.yaml"
    config.write_text(TINY.format(run=tmp_path / "run", latents=latents, features="x", images="y"))
    manifest = read_manifest(latents)
    channel, mean, std = (
        "data.normalisation=channel",
        f"data.normalisation_mean={MEAN}",
        f"data.normalisation_std={STD}",
    )
    given = resolve(load_config(str(config), [channel, mean, std]), manifest, 1).data
    z = torch.full((1, 4, 1, 1), 3.0)
    assert normalisation(given, manifest["vae"], CPU).apply(z).flatten().tolist() == pytest.approx(
        [(3 - m) / s for m, s in zip(MEAN, STD, strict=True)]
    )
    for overrides, message in (
        ([mean, std], "data.normalisation_mean needs data.normalisation=channel"),
        ([channel, mean], "require each other"),
        (
            [channel, "data.normalisation_mean=[0,1]", "data.normalisation_std=[1,1]"],
            "has 2 numbers, but latents have 4 channels",
        ),
        ([channel, mean, "data.normalisation_std=[1,1,1,0]"], "data.normalisation_std: expected numbers > 0"),
        ([channel, mean, "data.normalisation_std=[]"], "data.normalisation_std: expected numbers > 0"),
        ([channel, "data.normalisation_mean=[a]", std], "data.normalisation_mean: expected numbers"),
        (["data.normalisation=no"], "data.normalisation: expected scale or channel"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            resolve(load_config(str(config), overrides), manifest, 1)
        assert "\n" not in str(caught.value)
    constant = {**manifest, "channel_std": [1.0, 0.0, 1.0, 1.0]}
    with pytest.raises(UserError, match="channel 1 of the latents at .* is constant"):
        resolve(load_config(str(config), [channel]), constant, 1)

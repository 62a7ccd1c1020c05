"""Trains a small AutoencoderKL (4 latent channels, side / 4) on a folder of images.

    python tools/train_vae.py --images data/digits --resolution 32 --out mf_dist/assets/digits-vae

writes OUT/config.json and OUT/diffusion_pytorch_model.safetensors, as tools/encode_latents.py --vae takes them.
The loss is the pixels' squared error plus a small KL term; the scaling factor makes latents of unit variance.
"""

import argparse
import sys
from pathlib import Path

from mf_dist.runtime.atomic_files import write_atomic
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=expanded, required=True, help="image folder")
    parser.add_argument("--out", type=expanded, required=True, help="the new VAE's folder")
    parser.add_argument("--resolution", type=int, default=32, help="side of the square images (default 32)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default 2000)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term per latent number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 1 or args.resolution < 4 or args.resolution % 4:
        raise UserError("--steps and --batch must be at least 1, --resolution a multiple of 4")
    import numpy as np
    import torch

    from mf_dist.data.image_folder import list_images
    from mf_dist.data.images import load_image

    folder = list_images(args.images, [Path(args.out)], labelled=False)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    print(f"{len(folder.paths)} images{folder.ignored}", flush=True)
    pixels = np.stack([load_image(folder.root / path, args.resolution) for path in folder.paths])
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    g = torch.Generator().manual_seed(args.seed)
    vae = _new_vae(args.resolution, args.seed)
    _fit(vae, images, args, g)
    _finish(vae.eval(), images, g, args.out)


def _fit(vae, images, args, g):
    import torch

    from mf_dist.runtime.progress import progress

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    with progress(args.steps, "step", "train VAE") as bar:
        for _ in range(args.steps):
            x = images[torch.randint(len(images), (args.batch,), generator=g)]
            posterior = vae.encode(x).latent_dist
            error = (vae.decode(posterior.sample(generator=g)).sample - x).square().mean()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            optimizer.zero_grad()
            (error + args.kl * kl).backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(mse=f"{error.item():.5f}", kl=f"{kl.item():.2f}", refresh=False)
            bar.update()


def _new_vae(resolution, seed):
    import torch

    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():  # diffusers initialises from the global generator
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=resolution,
        )


def _finish(vae, images, g, out):
    """Sets the scaling factor to the inverse standard deviation of the latents of all images, and saves."""
    import torch

    from mf_dist.data.normalisation import channel_summary
    from mf_dist.vae import WEIGHTS

    with torch.no_grad():
        posteriors = [vae.encode(part).latent_dist for part in images.split(256)]
        latents = torch.cat([posterior.sample(generator=g) for posterior in posteriors])
        errors = [
            (vae.decode(p.mode()).sample - x).square().mean()
            for p, x in zip(posteriors, images.split(256), strict=True)
        ]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(out, safe_serialization=True)
    weights = (Path(out) / WEIGHTS).read_bytes()  # safetensors makes its file readable by its owner alone
    write_atomic(Path(out) / WEIGHTS, lambda file: file.write(weights))
    psnr = 10 * torch.log10(4 / torch.stack(errors).mean()).item()
    num_parameters = sum(p.numel() for p in vae.parameters())
    print(f"{out}: {num_parameters} parameters, PSNR {psnr:.1f} dB, scaling factor {vae.config.scaling_factor}")
    mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
    scale = {"scaling_factor": vae.config.scaling_factor}
    print(channel_summary({"vae": scale, "channel_mean": mean, "channel_std": std}))


if __name__ == "__main__":
    sys.exit(main())

"""Inputs for benches where no data and no weights can be fetched: noise images, and a VAE of Stable Diffusion's shape.

    python tools/bench/random_inputs.py images data/noise --count 2000 --side 256
    python tools/bench/random_inputs.py vae data/random-vae

Images are PNGs in ten class folders; the VAE is a diffusers AutoencoderKL with random weights, smaller with --width.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

CLASSES = 10


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("images", help="PNGs of noise")
    images.add_argument("out", type=expanded_path)
    images.add_argument("--count", type=int, default=2000)
    images.add_argument("--side", type=int, default=256, help="in pixels (default 256)")
    vae = commands.add_parser("vae", help="a VAE with random weights")
    vae.add_argument("out", type=expanded_path)
    vae.add_argument("--width", type=int, default=128, help="channels of the outer blocks (default 128: SD's)")
    args = parser.parse_args()
    if args.command == "images" and min(args.count, args.side) < 1:
        raise UserError("--count and --side must be at least 1")
    if args.command == "vae" and (args.width < 32 or args.width % 32):
        raise UserError(f"--width must be a multiple of 32, got {args.width}")
    return args


def write_images(out: Path, count: int, side: int) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        folder = out / str(number % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png", compress_level=0)


def write_vae(out: Path, width: int) -> None:
    import torch

    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):  # diffusers takes no generator
        torch.manual_seed(0)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    vae.save_pretrained(out)


@command_line
def main() -> None:
    args = parse()
    if args.command == "images":
        write_images(args.out, args.count, args.side)
    else:
        write_vae(args.out, args.width)


if __name__ == "__main__":
    sys.exit(main())

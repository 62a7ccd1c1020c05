"""Turns a folder of images into latent shards for training.

    python tools/encode_latents.py --images data/digits --out data/digits-latents \\
        --vae mf_dist/assets/digits-vae --resolution 32
    python tools/encode_latents.py --images /data/imagenet/train --out data/imagenet256 \\
        --vae stabilityai/sd-vae-ft-mse --resolution 256

Classes are sub-folders, in order of name; a folder without sub-folders has no classes. Images are cut to the
square ADM centre crop. Each shard holds a fixed block of the sorted images, and is complete or absent: the same
command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from mf_dist.errors import UserError, command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", required=True, help="image folder; sub-folders are classes")
    parser.add_argument("--out", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--vae", required=True, help="folder or hub id of a diffusers AutoencoderKL")
    parser.add_argument("--resolution", type=int, required=True, help="side of the square crop in pixels")
    parser.add_argument("--shard-size", type=int, default=10_000, help="images a shard (default 10000)")
    parser.add_argument("--batch", type=int, default=32, help="images encoded together (default 32)")
    args = parser.parse_args()
    for name in ("resolution", "shard_size", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    from mf_dist.encode import encode_folder

    encode_folder(args.images, args.out, args.vae, args.resolution, args.shard_size, args.batch)


if __name__ == "__main__":
    sys.exit(main())

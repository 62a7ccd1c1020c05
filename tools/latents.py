"""Checks and shows a dataset of latents.

python tools/latents.py verify data/imagenet256           # every byte, count and value; exit 1 if anything is wrong
python tools/latents.py stats data/imagenet256            # classes by number, channels, what was left out
python tools/latents.py show data/digits-latents --images data/digits --count 8 --out grid.png
                                                          # sources above, decoded latents below, PSNR
"""

import argparse
import sys
from pathlib import Path

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.paths import expanded, expanded_path


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("verify", "check everything"), ("stats", "print a summary")):
        commands.add_parser(name, help=text).add_argument("data", type=expanded_path, help="dataset folder")
    show = commands.add_parser("show", help="decode some samples beside their sources")
    show.add_argument("data", type=expanded_path, help="dataset folder")
    show.add_argument("--images", type=expanded, required=True, help="what was encoded: folder, .tar or folder of tars")
    show.add_argument("--count", type=int, default=8, help="samples, evenly spread (default 8)")
    show.add_argument("--vae", type=expanded, help="folder or hub id (default: the recorded one)")
    show.add_argument("--out", type=expanded_path, default=Path("latents.png"))
    return parser.parse_args()


def verify(args):
    from mf_dist.data.audit import problems
    from mf_dist.runtime.progress import progress

    with progress(None, "sample", "verify") as bar:
        lines = list(problems(args.data, bar.update))
    for line in lines:
        print(line)
    print(f"{args.data}: {len(lines)} problems" if lines else f"{args.data}: valid")
    return 1 if lines else 0


def stats(args):
    from mf_dist.data.normalisation import channel_summary
    from mf_dist.data.shards import LatentShards

    manifest = LatentShards(args.data).manifest
    vae = manifest["vae"]
    print(
        f"{manifest['count']:,} samples of {manifest['num_classes']} classes in {len(manifest['shards'])} shards, "
        f"{three_digits(sum(shard['bytes'] for shard in manifest['shards']) / 2**30)} GiB"
    )
    print(
        f"latents ({manifest['latent_channels']}, {manifest['latent_size']}, {manifest['latent_size']}) of "
        f"{manifest['resolution']} px images, {manifest['crop']}; mirrored too: {manifest['flip']}"
    )
    print(
        f"VAE {vae['source']}, sha256 {vae['sha256'][:16]}..., scale {vae['scaling_factor']:g}, encoded in "
        f"{manifest['encode_precision']}"
    )
    for number, name in enumerate(manifest["classes"]):
        print(f"class {number}: {name}")
    for c, (mean, std) in enumerate(zip(manifest["channel_mean"], manifest["channel_std"], strict=True)):
        print(f"channel {c}: mean {mean:.4f}, std {std:.4f}")
    print(channel_summary(manifest))
    for line in manifest["skipped"]:
        print(f"left out: {line}")
    return 0


def show(args):
    import numpy as np
    import torch

    from mf_dist.data.image_tars import open_images
    from mf_dist.data.images import decode_image, image_grid
    from mf_dist.data.shards import LatentShards
    from mf_dist.vae import Vae

    if args.count < 1 or args.out.suffix != ".png":
        raise UserError("--count must be at least 1 and --out end in .png")
    shards, source = LatentShards(args.data), open_images(args.images, [args.out], labelled=False)
    recorded = shards.manifest["vae"]
    vae = Vae(args.vae or recorded["source"], torch.device("cpu"), recorded)
    chosen = np.linspace(0, shards.count - 1, min(args.count, shards.count)).astype(int)
    pixels = [decode_image(source_of(shards, source, i), f"sample {i}", shards.manifest["resolution"]) for i in chosen]
    means = np.stack([shards[i][0][: shards.manifest["latent_channels"]] for i in chosen]).astype(np.float32)
    decoded = vae.decode(torch.from_numpy(means)).numpy()
    error = np.mean((np.stack(pixels).astype(np.float64) - decoded) ** 2, axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-12))
    image_grid(np.concatenate([pixels, decoded]), ["source", "decoded"]).save(args.out)
    print(f"{args.out}: PSNR {psnr.mean():.1f} dB on average, {psnr.min():.1f} at worst, over {len(chosen)} samples")
    return 0


def source_of(shards, source, i):
    """The bytes of the image file behind sample i; raises UserError if --images holds another."""
    import hashlib
    import json
    import tarfile

    tar, number = shards.locate(i)
    with tarfile.open(tar, "r:") as archive:
        recorded = json.loads(archive.extractfile(f"{number:09d}.json").read())
    raw = source.read(number) if number < len(source.paths) else b""
    if hashlib.sha256(raw).hexdigest() != recorded["sha256"]:
        raise UserError(
            f"--images does not hold what was encoded: image {number} was {recorded['source']!r}, with another sha256"
        )
    return raw


@command_line
def main() -> int:
    args = parse()
    return {"verify": verify, "stats": stats, "show": show}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())

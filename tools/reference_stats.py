"""Computes statistics of real images with the code that measures samples, for tools/fid_eval.py --reference.

    python tools/reference_stats.py --images IMAGENET/train --resolution 256 --out imagenet256_inception.npz \\
        --inception-weights weights-inception-2015-12-05-6726825d.pth
    torchrun --nproc_per_node=8 tools/reference_stats.py ...       # the same file, with any number of processes
    python tools/reference_stats.py --images photos.tar --resolution 256 --features efflite0 --out photos_efflite0.npz

Writes mu, sigma (for a network with spatial features also mu_s, sigma_s), features of up to 10,000 of the images for
precision, recall, KID and nearest neighbours, and their provenance. After a kill, the same command continues where it
stopped.
"""

import argparse
import contextlib
import sys

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=expanded, required=True, help="folder, .tar, or .npz with arr_0")
    parser.add_argument("--out", type=expanded_path, required=True, help="the .npz to write")
    parser.add_argument("--resolution", type=int, help="ADM centre crop to this side (default: images as they are)")
    parser.add_argument(
        "--features", type=expanded, default="inception", help="as in tools/fid_eval.py (default inception)"
    )
    parser.add_argument(
        *("--inception-weights", "--feature-weights"),
        type=expanded,
        help="file of the weights of Inception, or of DINOv2 with --features dinov2-l",
    )
    parser.add_argument("--block", type=int, default=50, help="images computed together (default 50)")
    args = parser.parse_args()
    if args.out.suffix != ".npz" or args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} must be a file name ending in .npz")
    if (args.resolution is not None and args.resolution < 8) or args.block < 1:
        raise UserError("--resolution must be at least 8, --block at least 1")
    from mf_dist.evaluation.features import open_features
    from mf_dist.evaluation.measure import Settings, open_reference
    from mf_dist.runtime.distributed import process_group, raise_on_all_ranks
    from mf_dist.runtime.environment import versions

    with process_group() as ranks:
        with raise_on_all_ranks(ranks):
            network = open_features(args.features, args.inception_weights, ranks.device)
        work = args.out.with_suffix(".work")
        settings = Settings(block=args.block)
        reference = open_reference(
            args.images, network, args.resolution, settings, ranks, work, are_images=True, outputs=[args.out]
        )
        with raise_on_all_ranks(ranks):
            if reference is not None:
                write(args, reference, network, versions())
                reference.blocks.remove()
                with contextlib.suppress(OSError):  # another run may have unfinished blocks there
                    work.rmdir()


def write(args, reference, network, versions):
    from mf_dist.evaluation.reference import write_reference

    provenance = {
        "features": network.name,
        "features_sha256": network.sha256,
        "resize": network.resize,
        "images": args.images,
        "images_sha256": reference.provenance["reference_sha256"],
        "count": reference.provenance["reference_images"],
        "resolution": reference.provenance["reference_resolution"],
        "block": args.block,
        "versions": versions,
    }
    write_reference(args.out, reference.pooled, reference.spatial, reference.rows, reference.picks, provenance)
    print(f"{args.out}: {provenance['count']} images of side {provenance['resolution']}, features {network.name}")


if __name__ == "__main__":
    sys.exit(main())

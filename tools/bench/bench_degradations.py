"""Measures a feature network's distance on degraded photographs: it should grow with every degradation.

    python tools/bench/bench_degradations.py --images photos.tar --resolution 256 --other fashion.npz
    python tools/bench/bench_degradations.py --images DIR --resolution 256 --features inception --inception-weights FILE

Every second image is the reference; the others are measured unchanged, then as JPEG, blurred and with noise; the last
row is as many images from --other. Small sets are biased upwards, equally in all rows: the first row shows by how
much.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded

SERIES = {
    "JPEG, quality": (90, 50, 20, 5),
    "blur, sigma in pixels": (0.5, 1, 2, 4),
    "noise, std in levels": (4, 8, 16, 32),
}


def jpeg(pixels, quality, number):
    import numpy as np
    from PIL import Image

    raw = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(raw, "JPEG", quality=quality)
    return np.asarray(Image.open(raw)).transpose(2, 0, 1)


def blur(pixels, sigma, number):
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(pixels.astype(float), (0, sigma, sigma)).round().clip(0, 255).astype(pixels.dtype)


def noise(pixels, std, number):
    import numpy as np

    noisy = pixels + std * np.random.default_rng(number).standard_normal(pixels.shape)
    return noisy.round().clip(0, 255).astype(pixels.dtype)


# with few images the mildest steps may not be distinguishable from none
DEGRADATIONS = dict(zip(SERIES, (jpeg, blur, noise), strict=True))


class Part:
    """`count` images first, first + step, ... of a source, each changed by `degrade`(pixels, strength, number)."""

    def __init__(self, source, first, step, count, degrade=None, strength=0):
        self.source, self.numbers = source, range(first, source.count, step)[:count]
        self.count, self.seconds, self.degrade, self.strength = len(self.numbers), {}, degrade, strength
        self.identity = {**source.identity, "numbers": str(self.numbers), "degrade": str(degrade), "strength": strength}

    def read(self, first, last):
        import numpy as np

        pixels = [self.source.read(n, n + 1)[0][0] for n in self.numbers[first:last]]
        if self.degrade:
            pixels = [self.degrade(p, self.strength, n) for p, n in zip(pixels, self.numbers[first:last], strict=True)]
        return np.ascontiguousarray(pixels), np.zeros(len(pixels), int)


def distances(args, network, ranks, work):
    """(series, strength, distance) of every row."""
    from mf_dist.evaluation.blocks import RepeatableParts, compute_blocks
    from mf_dist.evaluation.sources import open_source
    from mf_dist.evaluation.statistics import exact_gaussian, frechet_distance

    def gaussian(part):
        blocks = compute_blocks(part, network, ranks, work, "part")
        return exact_gaussian(RepeatableParts(blocks, "pooled"), network.dimension)

    source = open_source(args.images, network.resolution or args.resolution)
    reference = gaussian(Part(source, 0, 2, args.count))
    yield "real", 0, frechet_distance(gaussian(Part(source, 1, 2, args.count)), reference)
    for name, strengths in SERIES.items():
        for strength in strengths[:: -(len(strengths) // args.strengths)][::-1]:
            part = Part(source, 1, 2, args.count, DEGRADATIONS[name], strength)
            yield name, strength, frechet_distance(gaussian(part), reference)
    if args.other:
        other = open_source(args.other, None if args.other.endswith(".npz") else network.resolution or args.resolution)
        part = Part(other, 0, 1, len(Part(source, 1, 2, args.count).numbers))
        yield "other images", part.count, frechet_distance(gaussian(part), reference)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=expanded, required=True, help="photographs: folder, .tar, or .npz with arr_0")
    parser.add_argument("--other", type=expanded, help="images of another kind, for the last row")
    parser.add_argument("--resolution", type=int, help="centre crop (default: images as they are)")
    parser.add_argument("--count", type=int, default=500, help="images per row (default 500)")
    parser.add_argument(
        "--strengths",
        type=int,
        choices=(1, 2, 4),
        default=4,
        help="strengths of each degradation, including the strongest (default 4)",
    )
    parser.add_argument(
        "--features", type=expanded, default="efflite0", help="as in tools/fid_eval.py (default efflite0)"
    )
    parser.add_argument("--inception-weights", type=expanded, help="file of the Inception weights")
    args = parser.parse_args()
    if args.count < 2:
        raise UserError(f"--count must be at least 2, got {args.count}")
    from mf_dist.evaluation.features import open_features
    from mf_dist.runtime.distributed import process_group

    with process_group() as ranks, tempfile.TemporaryDirectory() as work:
        if ranks.world_size > 1:
            raise UserError("this bench runs in one process")
        network = open_features(args.features, args.inception_weights, ranks.device)
        distances_of = {}
        for name, strength, distance in distances(args, network, ranks, Path(work)):
            distances_of.setdefault(name, []).append(distance)
            print(f"{name:24}{strength or '':>8}{distance:14.3f}", flush=True)
    for name in SERIES:
        is_rising = (
            distances_of[name] == sorted(distances_of[name]) and distances_of[name][-1] > distances_of["real"][0]
        )
        print(f"{name.split(',')[0]}: {'every step is farther' if is_rising else 'NOT IN ORDER'}")


if __name__ == "__main__":
    sys.exit(main())

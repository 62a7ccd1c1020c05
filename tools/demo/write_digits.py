"""Writes scikit-learn's 1797 real handwritten digits as an image folder.

    python tools/demo/write_digits.py --out data/digits --split data/digits-split

gives OUT/<class>/<number>.png, 32x32 RGB, upsampled from 8x8 by bicubic interpolation. --split also writes the
same images in two parts, SPLIT/b of 1000 images and SPLIT/a of the other 797: the distance between two sets of real
images is the baseline for generated ones.
"""

import argparse
import sys

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.outputs import is_inside
from mf_dist.runtime.paths import expanded_path


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=expanded_path, required=True, help="the new folder")
    parser.add_argument("--split", type=expanded_path, help="a folder for the two parts")
    args = parser.parse_args()
    if args.split and is_inside(args.split, args.out):
        raise UserError(f"--split {str(args.split)!r} lies in --out, where it would be a class; choose a place outside")
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    in_b = set(np.random.default_rng(0).permutation(len(digits.target))[:1000].tolist())
    try:
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
            large = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
            roots = [args.out] + ([args.split / ("b" if number in in_b else "a")] if args.split else [])
            for folder in (root / str(label) for root in roots):
                folder.mkdir(parents=True, exist_ok=True)
                large.save(folder / f"{number:04d}.png")
    except OSError as error:
        raise UserError(f"cannot write to {str(args.out)!r}: {error.strerror}") from None
    print(f"{len(digits.target)} images of 10 classes in {args.out}")


if __name__ == "__main__":
    sys.exit(main())

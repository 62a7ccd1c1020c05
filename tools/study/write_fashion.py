"""Writes Fashion-MNIST as image folders, from the four files of https://github.com/zalandoresearch/fashion-mnist.

    python tools/study/write_fashion.py --idx fashion-mnist --out data/fashion

gives OUT/train/<class>/<number>.png (60,000) and OUT/test/... (10,000), RGB, 28x28 padded with two black pixels on
each side to 32x32.
"""

import argparse
import gzip
import sys

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--idx", type=expanded_path, required=True, help="folder of the four .gz files")
    parser.add_argument("--out", type=expanded_path, required=True, help="the new folder")
    args = parser.parse_args()
    from PIL import Image

    from mf_dist.runtime.progress import progress

    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(args.idx / f"{prefix}-images-idx3-ubyte.gz", (28, 28))
        labels = read_idx(args.idx / f"{prefix}-labels-idx1-ubyte.gz", ())
        folders = [args.out / part / f"{number}-{name}" for number, name in enumerate(CLASSES)]
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            with progress(len(images), "image", part) as bar:
                for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                    canvas = Image.new("RGB", (32, 32))
                    canvas.paste(Image.fromarray(image), (2, 2))
                    canvas.save(folders[label] / f"{number:05d}.png")
                    bar.update()
        except OSError as error:
            raise UserError(f"cannot write to {str(args.out)!r}: {error.strerror}") from None
        print(f"{len(images)} images of {len(CLASSES)} classes in {args.out / part}")


def read_idx(path, shape):
    """The array (N, *shape) of bytes in a gzipped IDX file: a magic number, the sizes (big-endian), the bytes."""
    import numpy as np

    try:
        content = gzip.decompress(path.read_bytes())
        header = np.frombuffer(content, ">u4", count=2 + len(shape))
        if header[0] != 0x801 + len(shape) or tuple(header[2:]) != shape:
            raise ValueError(f"its header is {header.tolist()}")
        return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(header[1], *shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a Fashion-MNIST file ({error}); download it again") from None


if __name__ == "__main__":
    sys.exit(main())

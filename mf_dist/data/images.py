"""Decodes images, crops them to square pixels, and draws grids of them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageDraw, UnidentifiedImageError

from mf_dist.runtime.errors import UserError

MAX_PIXELS = 89_478_485
"""Limit of the resized image before the crop; the same as Pillow's limit of an opened image."""
Pixels = npt.NDArray[np.uint8]


class Unreadable(UserError):
    """An image whose bytes were read but cannot be decoded."""


def load_image(path: str | Path, resolution: int) -> Pixels:
    """decode_image of a file."""
    try:
        return decode_image(Path(path).read_bytes(), str(path), resolution)
    except OSError as error:
        raise UserError(f"cannot read image {str(path)!r}: {error.strerror}") from None


def decode_image(raw: bytes, name: str, resolution: int, must_fit: bool = False) -> Pixels:
    """RGB pixels (3, resolution, resolution) uint8, ADM centre crop. As in ADM and torchvision, and hence in published
    reference numbers, transparency is dropped and EXIF orientation ignored. 16-bit images keep their upper 8 bits.
    Raises Unreadable, with `name`, if the image cannot be decoded completely or, with must_fit, has another size."""
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if must_fit and image.size != (resolution, resolution):
                raise ValueError(
                    f"it is {image.width}x{image.height}, the first is {resolution}x{resolution}; to crop "
                    "all to one size give --resolution"
                )
            if max(image.size) * resolution > MAX_PIXELS * min(image.size) / resolution:
                raise ValueError(f"its sides, {image.width} x {image.height}, differ too much")
            rgb = _jpeg(raw) if image.format == "JPEG" and image.mode == "RGB" else None
            rgb = rgb or _eight_bits(image).convert("RGB")
        square = centre_crop(rgb, resolution)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise Unreadable(f"cannot read image {name!r}: {reason}; repair or remove it") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _jpeg(raw: bytes) -> Image.Image | None:
    """The same pixels as Pillow's, in half the time; None on an error, which Pillow then reports."""
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(raw))
    except ValueError:
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to its upper 8 bits; Pillow's own conversion would clip values at 255."""
    if image.mode in ("F", "I"):
        raise ValueError("32-bit pixels have no fixed white level")
    if image.mode[0] != "I":
        return image
    values = np.asarray(image)
    return Image.fromarray((values >> 8).astype(np.uint8))


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The crop behind all published ImageNet FIDs (ADM's center_crop_arr): halve by box filter while twice too
    large, resize the short side to `resolution` by bicubic filter, cut the middle."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def image_grid(images: Pixels, row_labels: list[str], heads: Sequence[str] = (), gap: int = 2) -> Image.Image:
    """(N, 3, H, W) uint8 -> one picture with len(row_labels) rows: each label to the left of its row, each of `heads`
    above an equal share of the columns. Images below 64 pixels are enlarged by whole factors."""
    zoom = max(1, 64 // images.shape[2])
    images = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    rows, (_, _, height, width) = len(row_labels), images.shape
    columns, top = len(images) // rows, 16 if heads else 0
    in_group, margin = columns // max(1, len(heads)), 10 + 7 * max(map(len, row_labels))
    left = [margin + c * (width + gap) + c // in_group * 4 * gap for c in range(columns)]
    canvas = Image.new("RGB", (left[-1] + width + gap, top + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        canvas.paste(Image.fromarray(image.transpose(1, 2, 0)), (left[column], top + row * (height + gap)))
    for row, label in enumerate(row_labels):
        draw.text((4, top + row * (height + gap) + height // 2 - 6), label, fill="black")
    for number, head in enumerate(heads):
        draw.text((left[number * in_group], 2), head, fill="black")
    return canvas

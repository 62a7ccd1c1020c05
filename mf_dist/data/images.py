"""Decodes images, crops them to square pixels, and draws grids of them."""

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from mf_dist.runtime.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may open, by content: the formats of SUFFIXES. It knows more, and runs Ghostscript for PostScript."""
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
"""In the coded data of a JPEG; 00 and D0 to D7 are part of it."""
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
    with _as_unreadable(name):
        with _open(raw) as image:
            if must_fit and image.size != (resolution, resolution):
                raise ValueError(
                    f"it is {image.width}x{image.height}, the first is {resolution}x{resolution}; to crop "
                    "all to one size give --resolution"
                )
            if not is_whole(raw, image.format):
                raise ValueError("its end is missing or damaged")
            if max(image.size) * resolution > MAX_PIXELS * min(image.size) / resolution:
                raise ValueError(f"its sides, {image.width} x {image.height}, differ too much")
            rgb = _jpeg(raw) if image.format == "JPEG" and image.mode == "RGB" else None
            rgb = rgb or _eight_bits(image).convert("RGB")
        square = centre_crop(rgb, resolution)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def image_size(raw: bytes, name: str) -> tuple[int, int]:
    """Width and height; raises Unreadable, with `name`."""
    with _as_unreadable(name), _open(raw) as image:
        return image.size


def _open(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw), formats=FORMATS)


@contextmanager
def _as_unreadable(name: str) -> Iterator[None]:
    """Whatever a decoder raises on damaged bytes becomes Unreadable; a lack of memory is no fault of the image."""
    try:
        yield
    except MemoryError:
        raise UserError(f"not enough memory to decode image {name!r}") from None
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(FORMATS)}" if is_unknown else " ".join(str(error).split()) or repr(error)
        raise Unreadable(f"cannot read image {name!r}: {reason}; repair or remove it") from None


def is_whole(raw: bytes, image_format: str | None) -> bool:
    """False if a PNG or JPEG lacks its end, or a PNG's pixels differ from their checksum: cut, or with a tail of zeros,
    either may be decoded without an error. Always True for other formats."""
    if image_format == "PNG":
        return _png_is_whole(raw)
    return image_format not in ("JPEG", "MPO") or raw.endswith(b"\xff\xd9") or _jpeg_is_whole(raw)


def _png_is_whole(raw: bytes) -> bool:
    view, at = memoryview(raw), 8
    while at + 12 <= len(raw):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        kind = raw[at + 4 : at + 8]
        if kind == b"IEND":
            return True
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return False
        at = end + 4
    return False


def _jpeg_is_whole(raw: bytes) -> bool:
    """Whether the image ends with its marker. Other data may follow it, and a thumbnail's end may come before."""
    at = 2
    while 0 <= (at := raw.find(b"\xff", at)) < len(raw) - 1:
        kind = raw[at + 1]
        if kind == 0xD9:
            return True
        if kind in (0x00, 0xFF):  # padding
            at += 1
            continue
        at += 2 + int.from_bytes(raw[at + 2 : at + 4])
        if kind == 0xDA:  # after its header come the coded data, up to the next marker
            marker = JPEG_MARKER.search(raw, at)
            at = marker.start(1) - 1 if marker else len(raw)
    return False


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


def can_draw(text: str) -> bool:
    """Whether the font of image_grid has every letter of a text: for others it draws an empty square."""
    font = ImageFont.load_default()
    squares = bytes(font.getmask("\uffff"))
    return text.isprintable() and all(bytes(font.getmask(letter)) != squares for letter in text)


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

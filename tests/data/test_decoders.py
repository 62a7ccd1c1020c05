"""Only the formats of the listed suffixes are opened; any failure of a decoder is an unreadable image."""

import io
import json
import struct

import numpy as np
import pytest
from conftest import encode
from image_files import png
from PIL import EpsImagePlugin, Image

from mf_dist.data.image_list import SUFFIXES
from mf_dist.data.images import FORMATS, Unreadable, decode_image, image_size
from mf_dist.evaluation.sources import ImageFiles
from mf_dist.report.pictures import picture


def noise(side=36):
    """A picture whose lossless files have many bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def saved(kind, mode="RGB", **options):
    file = io.BytesIO()
    noise().convert(mode).save(file, kind, **options)
    return file.getvalue()


def with_thumbnail():
    """A JPEG whose EXIF data contain a whole JPEG."""
    thumbnail = saved("JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(4) + thumbnail
    jpeg = saved("JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

FILES = {
    "png": saved("PNG"),
    "png of a palette": saved("PNG", "P", transparency=3),
    "jpeg": saved("JPEG"),
    "progressive jpeg": saved("JPEG", progressive=True),
    "grey jpeg": saved("JPEG", "L"),
    "jpeg with a thumbnail": with_thumbnail(),
    "mpo": saved("MPO", save_all=True, append_images=[noise()]),
    "webp": saved("WEBP"),
    "lossless webp": saved("WEBP", "RGBA", lossless=True),
    "bmp": saved("BMP"),
    "gif": saved("GIF"),
    "tiff": saved("TIFF"),
    "lzw tiff": saved("TIFF", compression="tiff_lzw"),
    "jpeg tiff": saved("TIFF", compression="jpeg"),
    "ppm": saved("PPM"),
    "pgm": saved("PPM", "L"),
}
ENDS = ("png", "png of a palette", "jpeg", "progressive jpeg", "grey jpeg", "jpeg with a thumbnail", "gif", "lzw tiff")
"""Formats that can tell where they end."""
FOREIGN = {
    "avif": saved("AVIF"),
    "dds": saved("DDS"),
    "blp": saved("BLP", "P"),
    "postscript": saved("EPS"),
    "ico": saved("ICO"),
    "tga": saved("TGA"),
    "jpeg 2000": saved("JPEG2000"),
    "pcx": saved("PCX"),
    "xbm": saved("XBM", "1"),
    "qoi": saved("QOI"),
    "pdf": saved("PDF"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}


def mutant(raw, g):
    """A copy with one to three changes: bits, bytes, sizes of 2^32 - 1, bytes removed or added, or its end cut off."""
    changed = bytearray(raw)
    for _ in range(int(g.integers(1, 4))):
        at = int(g.integers(min(len(changed), 80) if g.random() < 0.5 else len(changed)))
        match int(g.integers(5)):
            case 0:
                changed[at] ^= 1 << int(g.integers(8))
            case 1:
                changed[at : at + 4] = b"\xff" * 4
            case 2:
                del changed[at : at + int(g.integers(1, 30))]
            case 3:
                changed[at:at] = g.bytes(int(g.integers(1, 30)))
            case 4:
                del changed[max(1, at) :]
        changed = changed or bytearray(b"?")
    return bytes(changed)


def is_readable(raw):
    try:
        assert decode_image(raw, "a.jpg", 16).shape == (3, 16, 16)
    except Unreadable as error:
        assert "\n" not in str(error) and str(error).startswith("cannot read image 'a.jpg': ")
        return False
    return True


def test_the_formats_are_those_of_the_suffixes():
    assert {Image.registered_extensions()[suffix] for suffix in SUFFIXES} == {*FORMATS}


@pytest.mark.parametrize("name", FILES)
def test_mutants_are_images_or_unreadable(name):
    g, raw = np.random.default_rng(len(name)), FILES[name]
    assert is_readable(raw)
    readable = [is_readable(mutant(raw, g)) for _ in range(400)]
    assert not all(readable)
    for _ in range(50):
        try:
            width, height = image_size(mutant(raw, g), "a.jpg")
            assert width > 0 and height > 0
        except Unreadable:
            pass


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_zeroed_end(name):
    """A cut file is never an image; a tail of zeros is not where the format has an end or a checksum."""
    raw = FILES[name] if name != "mpo" else FILES["jpeg"]  # without its other pictures an MPO is an image
    for share in range(2, 100, 3):
        kept = len(raw) * share // 100
        assert not is_readable(raw[:kept]), f"cut to {share} %"
        if name in ENDS:
            assert not is_readable(raw[:kept] + bytes(len(raw) - kept)), f"zeros after {share} %"


def test_data_after_the_end_are_no_damage():
    """Padding, or what a telephone appends: with bytes that look like markers."""
    for name in ("png", "jpeg", "progressive jpeg", "grey jpeg", "jpeg with a thumbnail"):
        for tail in (b"\0" * 9, b"\n", b"\xff\xda\0\x0cmoving picture", FILES["jpeg"][:300]):
            assert is_readable(FILES[name] + tail), (name, tail)
    jpeg = FILES["jpeg"]
    assert is_readable(jpeg[:2] + b"\xff\xff\xff" + jpeg[3:] + b"\0")  # padding before a marker
    assert not is_readable(jpeg[:-2] + b"\0" * 9)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_never_opened(name):
    g = np.random.default_rng(0)
    with pytest.raises(Unreadable, match="it is none of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM; repair or remove it"):
        decode_image(FOREIGN[name], "a.jpg", 16)
    assert not any(is_readable(mutant(FOREIGN[name], g)) for _ in range(50))


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program gs that leaves a trace; Pillow runs it for PostScript."""
    trace, program = tmp_path / "trace", tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $@ >> {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError), Image.open(io.BytesIO(FOREIGN["postscript"])) as image:
        image.load()
    assert trace.is_file(), "the bait works"
    trace.unlink()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


def test_no_program_is_started(ghostscript, tmp_path):
    """By any reader of images: they are left out of a dataset, refused in a measurement, missing in a report."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("postscript", "avif", "dds")):
        (folder / f"{number}.jpg").write_bytes(FOREIGN[name])
    (folder / "3.png").write_bytes(png())
    encode(folder, tmp_path / "out", max_bad_share=0.8)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["count"] == 1 and len(manifest["skipped"]) == 3
    for resolution in (None, 32):
        with pytest.raises(Unreadable, match=r"cannot read image '0.jpg': it is none of"):
            ImageFiles(folder, resolution).read(0, 1)
    for name in FOREIGN:
        (tmp_path / "step00000001.png").write_bytes(FOREIGN[name])
        assert picture(tmp_path / "step00000001.png", "") is None
    (tmp_path / "step00000001.png").write_bytes(png())
    assert picture(tmp_path / "step00000001.png", "")["w"] == 32
    assert not ghostscript.exists()


def test_a_lack_of_memory_is_no_fault_of_the_image(monkeypatch):
    """It stops the work; the image is not left out, as another machine would read it."""
    from mf_dist.data import images
    from mf_dist.runtime.errors import UserError

    def decode(*_):
        raise MemoryError

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", decode)
    with pytest.raises(UserError, match="not enough memory to decode image 'a.jpg'") as caught:
        decode_image(FILES["jpeg"], "a.jpg", 16)
    assert not isinstance(caught.value, Unreadable)

"""Listing, decoding and cropping images."""

import io

import numpy as np
import pytest
from PIL import Image

from mf_dist.data.image_folder import list_images
from mf_dist.data.images import can_draw, centre_crop, decode_image, image_grid, load_image
from mf_dist.runtime.errors import UserError


def adm_crop(image, size):
    """ADM's center_crop_arr, from its published steps, in its own order (numpy slice instead of crop)."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(n // 2 for n in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    array = np.array(image.resize(tuple(round(n * scale) for n in image.size), resample=Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(32, 32), (100, 70), (33, 300), (20, 25), (257, 131)])
def test_crop_is_adms(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(centre_crop(image, 32)), adm_crop(image, 32))


def test_image_of_the_right_size_is_untouched(images):
    folder = list_images(images)
    path = folder.root / folder.paths[0]
    assert np.array_equal(load_image(path, 32), np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_classes_are_sub_folders_in_order(images):
    folder = list_images(images)
    assert folder.classes == [str(i) for i in range(10)] and len(folder.paths) == 150
    assert folder.paths == sorted(folder.paths)
    assert all(path.startswith(f"{label}/") for path, label in zip(folder.paths, folder.labels, strict=True))


def test_no_sub_folders_no_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    folder = list_images(tmp_path)
    assert folder.classes == [] and folder.labels == [0]


def test_errors_name_the_cause(tmp_path):
    with pytest.raises(UserError, match="no image folder"):
        list_images(tmp_path / "missing")
    with pytest.raises(UserError, match="no images"):
        list_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        load_image(tmp_path / "broken.png", 8)
    (tmp_path / "class").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "class" / "b.png")
    with pytest.raises(UserError, match="loose image"):
        list_images(tmp_path)
    assert load_image(tmp_path / "class" / "b.png", 8).shape == (3, 8, 8)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff.*no fixed white"):
        load_image(tmp_path / "float.tiff", 8)


def test_every_mode_becomes_rgb(tmp_path):
    """As converted by Pillow, like in ADM and torchvision; 16-bit grey keeps its upper 8 bits; EXIF is ignored."""
    g = np.random.default_rng(0)
    colour = Image.fromarray(g.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for mode, suffix in {
        "L": "png",
        "1": "png",
        "P": "png",
        "LA": "png",
        "RGBA": "png",
        "CMYK": "jpg",
        "YCbCr": "jpg",
    }.items():
        path = tmp_path / f"{mode}.{suffix}"
        colour.convert(mode).save(path)
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(load_image(path, 16), expected), mode
    palette = colour.convert("P")
    palette.save(tmp_path / "transparent.png", transparency=3)
    assert load_image(tmp_path / "transparent.png", 16).shape == (3, 16, 16)
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(load_image(tmp_path / "deep.png", 16), np.stack([deep >> 8] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    colour.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png", 16), np.asarray(colour).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5000, 40), (2400, 1800)])
def test_tiny_and_huge(tmp_path, size):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 32) == np.array([9, 8, 7])[:, None, None]).all()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"keep_rgb": True}, {"mode": "L"}])
def test_jpegs_are_decoded_as_pillow_does(options, subsampling):
    options, g, pixels = dict(options), np.random.default_rng(0), []
    mode = options.pop("mode", "RGB")
    for size in ((64, 64), (61, 67), (16, 200), (1, 1)):
        file = io.BytesIO()
        image = Image.fromarray(g.integers(0, 256, (*size, 3), dtype=np.uint8)).resize(size[::-1], Image.Resampling.BOX)
        image.convert(mode).save(file, "JPEG", subsampling=0 if "keep_rgb" in options else subsampling, **options)
        expected = centre_crop(Image.open(file).convert("RGB"), 16)
        pixels.append(
            np.array_equal(decode_image(file.getvalue(), "a.jpg", 16), np.asarray(expected).transpose(2, 0, 1))
        )
    assert all(pixels)


def test_an_extreme_aspect_ratio_is_refused(tmp_path):
    Image.new("RGB", (1, 65_500)).save(tmp_path / "strip.jpg")
    with pytest.raises(UserError, match=r"strip\.jpg.*its sides, 1 x 65500, differ too much"):
        load_image(tmp_path / "strip.jpg", 256)


def test_hidden_folders_and_recursive_links(tmp_path):
    for name in ("a", ".thumbs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    assert list_images(tmp_path / "images").paths == ["a/1.png"]
    (tmp_path / "images/a/up").symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match=r"images/a/up' links back"):
        list_images(tmp_path / "images")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png.*exceeds limit"):
        load_image(tmp_path / "bomb.png", 32)


def test_every_class_folder_counts(tmp_path):
    for name in ("a", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.tif")
    (tmp_path / "images" / "b").symlink_to(tmp_path / "images" / "a")
    assert list_images(tmp_path / "images").classes == ["a", "b", "c"]
    (tmp_path / "images" / "empty").mkdir()
    with pytest.raises(UserError, match="class folder 'empty'"):
        list_images(tmp_path / "images")


def test_truncated_image_is_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        load_image(path, 32)


def test_letters_that_the_font_lacks_are_known():
    """By the font's own table of letters: the default one has no more than ASCII."""
    for text in ("n01440764", "golden retriever", "~3_a-b'c"):
        assert can_draw(text)
    for text in ("数字", "Größe", "caf\u00e9", "\U0001f469", "a\nb", "a\x1bb", "a\u00a0b"):
        assert not can_draw(text)


def test_grid_has_every_image_in_its_row():
    images = np.stack([np.full((3, 4, 4), 10 * i, np.uint8) for i in range(6)])
    grid = np.asarray(image_grid(images, ["a", "b"]))
    left, cell = grid.shape[1] - 3 * 66, 66  # 4 pixels shown as 64, and a gap of 2
    assert grid.shape[0] == 2 * cell
    for row in range(2):
        assert [grid[row * cell + 60, left + cell * c + 60, 0] for c in range(3)] == [
            30 * row + 10 * c for c in range(3)
        ]

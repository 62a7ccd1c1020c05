"""Where labels come from, and which are refused."""

import pytest
from conftest import VAE, encode, run_python
from image_files import png, write_tar

from mf_dist.data.image_tars import open_images
from mf_dist.runtime.errors import UserError


def with_numbers(path, numbers):
    """A tar with an image of each class number."""
    members = {}
    for key, number in enumerate(numbers):
        members |= {f"{key}.png": png(key), f"{key}.cls": str(number)}
    return write_tar(path, members)


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        ([range(1, 11)], "go up to 10, but there is no image of 0: .* number the classes from 0 to 9"),
        ([[0, 1], [3, 5]], "go up to 5, but there is no image of 2, 4: .* number the classes from 0 to 3"),
        ([[7, 7]], "there is no image of 0, 1, 2, 3, 4, 5, 6: "),
        ([[0, 999_999]], "there is no image of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 999,988 more"),
    ],
)
def test_class_numbers_with_holes_are_refused_before_anything_is_written(tmp_path, tars, message):
    for number, classes in enumerate(tars):
        with_numbers(tmp_path / f"in/{number}.tar", classes)
    with pytest.raises(UserError, match=message):
        encode(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_last_line_says_how_many_classes_there_are(tmp_path):
    with_numbers(tmp_path / "labelled.tar", [1, 0, 1, 2])
    write_tar(tmp_path / "plain.tar", {"0.png": png(), "1.png": png()})
    tool = ["tools/encode_latents.py", "--vae", VAE, "--resolution", 32]
    for name, text in {
        "labelled": "4 images of 3 classes in 1 shards",
        "plain": "2 images without classes in 1",
    }.items():
        done = run_python(*tool, "--images", tmp_path / f"{name}.tar", "--out", tmp_path / name)
        assert text in done.stdout.splitlines()[-1]


def test_the_class_of_no_image_is_no_class(tmp_path):
    """A .cls without an image, here of class 9, does not count."""
    images = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": "0", "1.png": png(), "1.cls": "1", "2.cls": "9"})
    assert open_images(str(images)).classes == ["0", "1"]

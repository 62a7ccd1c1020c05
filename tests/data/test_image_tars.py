"""Images inside tars: reading them, and refusing invalid tars."""

import io
import os
import tarfile

import numpy as np
import pytest
from conftest import encode
from PIL import Image

from mf_dist.data.image_folder import list_images
from mf_dist.data.image_tars import open_images
from mf_dist.data.images import Unreadable, decode_image
from mf_dist.data.shards import LatentShards
from mf_dist.runtime.errors import UserError


def add(archive, name, raw, kind=tarfile.REGTYPE, declared=None):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(raw) if declared is None else declared, kind
    if declared is None:
        archive.addfile(member, io.BytesIO(raw))
    else:
        archive.fileobj.write(member.tobuf())


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "png")
    return file.getvalue()


def test_tars_give_the_same_latents_as_the_folder(images, latents, tmp_path):
    """The digits, packed into three tars in the folder's order: the same latents, byte for byte of each sample."""
    folder, source = list_images(images), tmp_path / "in"
    source.mkdir()
    for part in range(3):
        with tarfile.open(source / f"part{part}.tar", "w") as archive:
            for i in range(50 * part, 50 * part + 50):
                add(archive, f"{i:06d}.png", folder.read(i))
                add(archive, f"{i:06d}.cls", str(folder.labels[i]).encode())
    tars = open_images(str(source))
    assert tars.labels == folder.labels and tars.paths[51] == "part1.tar/000051.png"
    assert np.array_equal(decode_image(tars.read(77), "", 32), decode_image(folder.read(77), "", 32))
    encode(source, tmp_path / "out")
    ours, theirs = LatentShards(tmp_path / "out"), LatentShards(latents)
    for i in range(150):
        assert np.array_equal(ours[i][0], theirs[i][0]) and ours[i][1] == theirs[i][1]


def test_a_single_tar_without_classes(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            add(archive, f"{i}.jpg.png", png(i))
    tars = open_images(str(tmp_path / "a.tar"))
    assert tars.classes == [] and tars.labels == [0, 0, 0]


INVALID = {
    "link": (lambda a: add(a, "x.png", b"", tarfile.SYMTYPE), "not a regular file"),
    "device": (lambda a: add(a, "x.png", b"", tarfile.CHRTYPE), "not a regular file"),
    "twice": (lambda a: [add(a, "x.png", png(1)) for _ in range(2)], "occurs twice"),
    "two images": (lambda a: [add(a, name, png(1)) for name in ("x.png", "x.bmp")], "has two images"),
    "no class": (lambda a: [add(a, "x.png", png(1)), add(a, "x.cls", b"1"), add(a, "y.png", png(2))], "no .cls"),
    "bad class": (lambda a: [add(a, "x.png", png(1)), add(a, "x.cls", b"cat")], "expected the number of a class"),
    "huge class": (lambda a: [add(a, "x.png", png(1)), add(a, "x.cls", b"99999999999")], "expected the number"),
    "huge size": (lambda a: add(a, "x.png", b"", declared=10**12), "truncated|cannot read"),
    "nothing": (lambda a: add(a, "x.txt", b"text"), "no images"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_tars_are_refused(tmp_path, name):
    fill, message = INVALID[name]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        fill(archive)
    with pytest.raises(UserError, match=message):
        open_images(str(tmp_path))


def test_member_names_are_never_used_as_paths(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    with tarfile.open(inside / "a.tar", "w") as archive:
        for name in ("../../escape.png", "/abs/evil.png"):
            add(archive, name, png(5))
    encode(inside, tmp_path / "out", max_bad_share=0.5)
    assert LatentShards(tmp_path / "out").count == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"] and not (tmp_path.parent / "escape.png").exists()


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "https://host/x.tar", "s3://bucket/x.tar", "file:x.tar"])
def test_urls_and_pipes_are_refused(source):
    with pytest.raises(UserError, match="only local folders and tars"):
        open_images(source)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_tar_is_named(tmp_path, damage):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            add(archive, f"{i}.png", png(i) * 50)
    raw = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes({"cut": raw[: len(raw) // 2], "garbage": b"?" * 5000, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"a\.tar|no images"):
        open_images(str(tmp_path))


def test_tars_beside_other_images_are_refused(images, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "0").mkdir()
    with pytest.raises(UserError, match="has tars and also folders or images"):
        open_images(str(tmp_path))


def test_a_tar_that_changes_after_listing_stops_the_work(tmp_path):
    """As a tar that is still being copied, or a disk that fails: no image is left out for it."""
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        for i in range(3):
            add(archive, f"{i}.png", png(i))
    tars = open_images(str(tar))
    os.truncate(tar, tars.places[1].offset + 10)
    assert tars.read(0) == png(0)
    for cut in (1, 2):
        with pytest.raises(UserError, match=r"a.tar ends before byte \d+; it was longer when it was listed") as caught:
            tars.read(cut)
        assert not isinstance(caught.value, Unreadable)
    tar.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.tar: No such file or directory"):
        tars.read(0)

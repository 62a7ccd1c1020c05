"""Files beside the images: hidden ones, those of systems, other suffixes, and what cannot be listed."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, VAE, encode, run_python
from image_files import png, write_tar

from mf_dist.data.image_folder import list_images
from mf_dist.data.image_tars import open_images
from mf_dist.data.shards import LatentShards
from mf_dist.runtime.errors import UserError

SKIPPED = (
    *("._1.png", ".DS_Store", ".hidden.jpg", "Thumbs.db", "desktop.ini", "DESKTOP.INI"),
    *("__MACOSX/0/._1.png", "@eaDir/1.png/x.jpg", ".ipynb_checkpoints/1-checkpoint.png", "lost+found/1.png"),
    *(
        "$RECYCLE.BIN/1.png",
        "System Volume Information/1.png",
        ".Trash-1000/files/1.png",
        ".git/x.png",
        "#recycle/1.png",
    ),
)


def fill(folder, paths, content=None):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png() if content is None else content)
    return folder


def test_hidden_files_and_those_of_systems_are_skipped(tmp_path):
    """In the root and in a class; in folders, in tars, and beside tars."""
    paths = [f"{part}{name}" for part in ("", "a/", "b/") for name in SKIPPED]
    images = fill(fill(tmp_path / "in", ["a/1.png", "b/2.png"]), paths, b"?")
    found = open_images(str(images))
    assert (found.paths, found.classes, found.ignored) == (["a/1.png", "b/2.png"], ["a", "b"], "")
    tar = write_tar(tmp_path / "tars/x.tar", dict.fromkeys(paths, b"?") | {"./a/1.png": png(), "b/2.png": png()})
    fill(tmp_path / "tars", SKIPPED, b"?")
    for source in (tar, tmp_path / "tars"):
        found = open_images(str(source))
        assert (found.paths, found.classes, found.ignored) == (["x.tar/./a/1.png", "x.tar/b/2.png"], ["a", "b"], "")
    (tmp_path / "tars/._x.tar").write_bytes(b"?")  # as macOS writes beside x.tar
    (tmp_path / "tars/x.tar").rename(tmp_path / "tars/x.TAR")
    assert open_images(str(tmp_path / "tars")).paths == ["x.TAR/./a/1.png", "x.TAR/b/2.png"]


def test_files_of_other_suffixes_are_counted(tmp_path):
    """All but those that gave the labels."""
    others = ["a/1.HEIC", "a/2.heic", "a/3.avif", "README", "a/x.txt", "a/x.json", "b/x.svg", "b/x.psd"]
    images = fill(fill(tmp_path / "in", ["a/1.png", "b/2.png"]), others, b"?")
    counted = "; ignored: 2 .heic, 1 without a suffix, 1 .avif, 1 .json, 1 .psd, 2 of other suffixes"
    assert open_images(str(images)).ignored == counted
    assert open_images(str(write_tar(tmp_path / "x.tar", dict.fromkeys(others, b"?") | {"1.png": png()}))).ignored
    shutil.rmtree(images / "b")
    fill(images, ["b/1.heic"], b"?")
    with pytest.raises(UserError, match="class folder 'b' in .* has no images; fill or remove it; ignored: 3 .heic"):
        list_images(images)
    shutil.rmtree(images / "a")
    with pytest.raises(UserError, match=r"no images .*; ignored: 1 without a suffix, 1 .heic"):
        list_images(images)
    labelled = write_tar(tmp_path / "y.tar", {"1.png": png(), "1.cls": "0", "1.json": "{}", "1": "x"})
    assert open_images(str(labelled)).ignored == "; ignored: 1 without a suffix, 1 .json"


def test_the_first_and_the_last_line_of_encode_count_them(tmp_path):
    images = fill(fill(tmp_path / "in", ["a/1.png"]), ["a/2.heic"], b"?")
    tool = ["tools/encode_latents.py", "--images", images, "--out", tmp_path / "out", "--vae", VAE, "--resolution", 32]
    first, last = run_python(*tool).stdout.splitlines()
    assert first == "1 images of 1 classes (class folders): a; ignored: 1 .heic"
    assert last.startswith("1 images of 1 classes in 1 shards at ") and "; ignored: 1 .heic; " in last


def test_what_cannot_be_listed_is_an_error(tmp_path):
    """A folder without permission, as another user or root without its capabilities sees it."""
    images = fill(tmp_path / "in", ["a/1.png", "b/c/2.png"])
    command = [sys.executable, "-c", f"from mf_dist.data.image_tars import open_images; open_images({str(images)!r})"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or a user other than root")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    for locked in (images / "b/c", images):
        locked.chmod(0)
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        locked.chmod(0o755)
        assert done.returncode and f"UserError: cannot list '{locked}': Permission denied" in done.stderr


def test_links_to_nothing_and_devices(tmp_path):
    images = fill(tmp_path / "in", ["a/1.png"])
    for name in ("b", "a/2.png"):  # a class on a disk that is not mounted, an image
        (images / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=f"in/{name}' is a link to nothing"):
            list_images(images)
        (images / name).unlink()
    (images / "a/.#1.png").symlink_to("user@host")  # as editors lock files
    os.mkfifo(images / "a/pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(images / "a/socket.s"))
        assert list_images(images).paths == ["a/1.png"]
    os.mkfifo(images / "a/3.png")  # reading it would wait for ever
    with pytest.raises(UserError, match=r"a/3.png' is not a regular file"):
        list_images(images)


def test_links_in_a_circle(tmp_path):
    images = fill(tmp_path / "in", ["a/1.png", "b/1.png"])
    (images / "a/l").symlink_to(images / "b")
    assert list_images(images).paths == ["a/1.png", "a/l/1.png", "b/1.png"]
    (images / "b/l").symlink_to(images / "a")
    with pytest.raises(UserError, match="a/l/l' links back to a folder that contains it"):
        list_images(images)


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    """At once where one task has all its images, else by the task that finds all shards complete."""
    images = fill(tmp_path / "in", ["a/1.png", "c/1.png", "c/2.png"])
    fill(images, ["b/1.png", "b/2.png"], b"?")
    message = "none of the 2 images of class 'b' can be read, such as 'b/1.png'; repair them, or remove the class"
    with pytest.raises(UserError, match=message):
        encode(images, tmp_path / "out", max_bad_share=0.5)
    assert not list((tmp_path / "out").glob("shard-*"))
    encode(images, tmp_path / "parts", max_bad_share=0.5, shard_size=2, task=(0, 2))
    for task in ((1, 2), (0, 1)):
        with pytest.raises(UserError, match=message):
            encode(images, tmp_path / "parts", max_bad_share=0.5, shard_size=2, task=task)
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.tar")) == [f"shard-0000{i}.tar" for i in range(3)]
    assert not (tmp_path / "parts/manifest.json").exists()
    shutil.rmtree(images / "b")
    encode(images, tmp_path / "without")
    assert LatentShards(tmp_path / "without").manifest["classes"] == ["a", "c"]

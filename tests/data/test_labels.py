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


def classes_of(source):
    """Path -> name of its class."""
    images = open_images(str(source))
    return {path: images.classes[label] for path, label in zip(images.paths, images.labels, strict=True)}


def test_class_folders_in_tars(tmp_path):
    """Over all tars, below the folders that all images share."""
    source = tmp_path / "in"
    write_tar(source / "0.tar", {"./d/train/b/1.png": png(), "./d/train/a/1.png": png()})
    write_tar(source / "1.tar", {"d/train/c/2.png": png(), "d/readme.txt": ""})
    named = {"0.tar/./d/train/b/1.png": "b", "0.tar/./d/train/a/1.png": "a", "1.tar/d/train/c/2.png": "c"}
    assert classes_of(source) == named and open_images(str(source)).classes == ["a", "b", "c"]
    write_tar(source / "1.tar", {"d/train/c/x/2.png": png()})
    images = open_images(str(source))
    assert images.classes == [] and images.labels == [0, 0, 0] and "not one for each class" in images.doubt


def test_one_tar_a_class(tmp_path):
    for wnid in ("n02", "n01"):
        write_tar(tmp_path / f"in/{wnid}.tar", {f"{wnid}_{i}.JPEG": png() for i in range(2)})
    assert list(classes_of(tmp_path / "in").values()) == ["n01", "n01", "n02", "n02"]
    write_tar(tmp_path / "in/n03.tar", {"n03_1.JPEG": png(), "n031.JPEG": png()})
    assert open_images(str(tmp_path / "in")).classes == []
    assert open_images(str(tmp_path / "in/n01.tar")).classes == []
    write_tar(tmp_path / "in/whole.tar", {"n01.tar": (tmp_path / "in/n01.tar").read_bytes()})
    with pytest.raises(UserError, match=r"unpack it once, since it holds tars such as 'n01.tar'"):
        open_images(str(tmp_path / "in/whole.tar"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1", "0", "2.0"], ["1", "0", "2"]),
        (['"1"', '" 0 "', "2"], ["1", "0", "2"]),
        (['"cat"', '"dog"', '"猫"'], ["cat", "dog", "猫"]),
        (["null", "[1]", '""'], None),
        (["true", "-1", "1e30"], None),
        (["NaN", "1.5", "{}"], None),
        (["1", "0", "null"], "'x.tar/2' .* has no .json with a .label"),
        (["1", "0", '"cat"'], "of 'x.tar/0' is a number, that of 'x.tar/2' a name"),
    ],
)
def test_labels_in_json(tmp_path, labels, classes):
    members = {}
    for key, label in enumerate(labels):
        members |= {f"{key}.JPG": png(key), f"{key}.JSON": f'{{"label": {label}, "caption": "x"}}'}
    source = write_tar(tmp_path / "x.tar", members)
    if isinstance(classes, str):
        with pytest.raises(UserError, match=classes):
            open_images(str(source))
    else:
        images = open_images(str(source))
        assert [images.classes[label] for label in images.labels] == classes if classes else not images.classes


def test_damaged_or_huge_json_has_no_label(tmp_path):
    for content in ("[" * 5000, "{", b"\xff", "3", '{"label": 3, "x": "' + "x" * (1 << 20) + '"}'):
        assert open_images(str(write_tar(tmp_path / "x.tar", {"0.png": png(), "0.json": content}))).classes == []


def test_an_unpacked_webdataset_keeps_its_labels(tmp_path):
    """A folder without sub-folders; with them, the folders are the classes, and a line says what is not read."""
    for key, label in enumerate("2011"):
        (tmp_path / f"{key}.png").write_bytes(png(key))
        (tmp_path / f"{key}.cls").write_text(label)
    assert list(classes_of(tmp_path).values()) == ["2", "0", "1", "1"]
    (tmp_path / "3.cls").unlink()
    with pytest.raises(UserError, match="'3' in .* has an image but no .cls"):
        open_images(str(tmp_path))
    for folder in ("00000", "00001"):
        (tmp_path / f"in/{folder}").mkdir(parents=True)
        (tmp_path / f"in/{folder}/0.png").write_bytes(png())
        (tmp_path / f"in/{folder}/0.cls").write_text("0")
    assert open_images(str(tmp_path / "in")).doubt.endswith("its 2 .cls files are not read")


def test_classes_one_level_deeper_are_doubted(tmp_path):
    for path in ("train/a/1.png", "train/b/1.png", "val/a/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(png())
    images = open_images(str(tmp_path))
    assert images.classes == ["train", "val"]
    assert f"such as 'train/a'; if those are the classes, give --images {tmp_path}/train" in images.doubt
    assert open_images(str(tmp_path / "train")).doubt == ""
    (tmp_path / "val/1.png").write_bytes(png())  # images of its own: a class
    assert open_images(str(tmp_path)).doubt == ""


def test_what_is_found_is_said_before_the_work_begins(tmp_path, capfd):
    """Also what is not: by task 0 of a dataset that two tasks make."""
    source = write_tar(tmp_path / "plain.tar", {f"{i}.png": png(i) for i in range(4)})
    with pytest.raises(UserError, match="is not a multiple"):
        encode(source, tmp_path / "out", resolution=30)
    for task in (1, 0):
        encode(source, tmp_path / "out", task=(task, 2), shard_size=2)
        told = capfd.readouterr()
        warning = f"warning: no labels found in '{source}': this becomes an unconditional dataset; "
        assert told.err.startswith(warning) == (task == 0)
    with_numbers(tmp_path / "cls.tar", range(12))
    encode(tmp_path / "cls.tar", tmp_path / "cls")
    first, last = capfd.readouterr().out.splitlines()
    assert first == "12 images of 12 classes (.cls): 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert last.startswith("12 images of 12 classes in 1 shards")


def test_the_class_of_no_image_is_no_class(tmp_path):
    """A .cls without an image, here of class 9, does not count."""
    images = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": "0", "1.png": png(), "1.cls": "1", "2.cls": "9"})
    assert open_images(str(images)).classes == ["0", "1"]


def test_where_labels_do_not_matter_none_is_refused(tmp_path):
    """As in a reference: a loose image beside folders, an empty folder, a .cls of only some images."""
    for path in ("a/1.png", "2.png"):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(png())
    (tmp_path / "in/empty").mkdir()
    images = open_images(str(tmp_path / "in"), labelled=False)
    assert (images.paths, images.labels, images.classes) == (["2.png", "a/1.png"], [0, 0], [])
    tar = write_tar(tmp_path / "x.tar", {"0.png": png(), "0.cls": "cat", "1.png": png()})
    assert open_images(str(tar), labelled=False).classes == []

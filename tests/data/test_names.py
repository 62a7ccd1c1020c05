"""Names of images, classes and folders: any Unicode text on one line."""

import json
import os
import tarfile

import pytest
from conftest import FEATURES, VAE, encode, run_python
from image_files import png, write_tar

from mf_dist.data.audit import problems
from mf_dist.data.image_tars import open_images
from mf_dist.data.shards import LatentShards
from mf_dist.report.collect import newest_run
from mf_dist.report.page import write_report
from mf_dist.runtime.errors import UserError

KEPT = (
    *(
        "Screenshot 2025\u202fPM.png",
        "a\u00a0b.png",
        "a\u3000b.png",
        "\U0001f469\u200d\U0001f467.png",
        "Gro\u0308ße.png",
    ),
    *(
        "a\u2028b.png",
        "a\u202eb.png",
        "\ufeffa.png",
        "a\uffff.png",
        "a\tb.png",
        "a\rb.png",
        "a\x1b[31mb.png",
        "a\x85.png",
    ),
)
REFUSED = {
    "a\nb.png": "has a line break or a NUL",
    os.fsdecode(b"a\xff.png"): "is not UTF-8",
    os.fsdecode("Größe.png".encode("latin-1")): "is not UTF-8",
}


def write(folder, names):
    """A folder and two tars with images of these names."""
    (folder / "images").mkdir()
    for name in names:
        (folder / "images" / name).write_bytes(png())
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(folder / f"{kind}.tar", "w", format=kind) as archive:
            archive.add(folder / "images", "images")
    return [str(folder / name) for name in ("images", f"{tarfile.GNU_FORMAT}.tar", f"{tarfile.PAX_FORMAT}.tar")]


def test_folders_and_tars_keep_every_unicode_name(tmp_path):
    for source in write(tmp_path, KEPT):
        assert sorted(path.rpartition("/")[2] for path in open_images(source).paths) == sorted(KEPT)


@pytest.mark.parametrize("name", REFUSED)
def test_folders_and_tars_refuse_the_same_names(tmp_path, name):
    for source in write(tmp_path, ["a.png", name]):
        with pytest.raises(UserError, match=REFUSED[name]) as caught:
            open_images(source)
        assert source in str(caught.value) and str(caught.value).isprintable()


def test_a_nul_in_a_member_and_odd_labels_are_refused(tmp_path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("short.png")
        member.pax_headers = {"path": "a\0b.png"}
        archive.addfile(member)
    with pytest.raises(UserError, match="has a line break or a NUL"):
        open_images(str(tar))
    for label in ("a\nb", "\udcff"):
        write_tar(tar, {"1.png": png(), "1.json": json.dumps({"label": label})})
        with pytest.raises(UserError, match="the \"label\" of 'a.tar/1': .*rename it"):
            open_images(str(tar))


def test_a_dataset_of_odd_names_is_whole(tmp_path):
    """Classes, images, the dataset's own folder, and an unreadable image."""
    classes = ["a\x1b[31mb", "数字", "\U0001f469\u200d\U0001f467"]
    for name in classes:
        (tmp_path / "in\u202f" / name).mkdir(parents=True)
        (tmp_path / "in\u202f" / name / "1\u3000\r.png").write_bytes(png())
    (tmp_path / "in\u202f" / classes[0] / "\x07.png").write_bytes(b"?")
    out = tmp_path / "out\r\x1b"
    encode(tmp_path / "in\u202f", out, max_bad_share=0.5)
    assert list(problems(out, lambda n: None)) == []
    manifest = LatentShards(out).manifest
    assert manifest["classes"] == classes and manifest["skipped"][0].startswith("cannot read image 'a\\x1b[31mb/\\x07")


@pytest.mark.dist
def test_commands_take_odd_names_and_an_ascii_terminal(tmp_path, tiny_config, latents, images):
    """A run on two ranks, its report, samples and measurement: in a folder whose name no terminal shows as it is."""
    run, env = tmp_path / "größe\u202f\r\x1b[31m", {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    on_two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    images.with_name("números\x1b").exists() or images.with_name("números\x1b").symlink_to(images)
    commands = [
        (*on_two, "-m", "mf_dist.train", tiny_config, f"run_dir={run}"),
        ("tools/report.py", run),
        ("tools/sample.py", "--checkpoint", run, "--out", run / "数字.png"),
        ("tools/checkpoint.py", "export", run, "--out", run / "数字.safetensors"),
        (*on_two, "tools/fid_eval.py", "--checkpoint", run, "--reference", images.with_name("números\x1b")),
    ]
    for command in commands:
        done = run_python(*command, env=env)
        assert "gr\\xf6\\xdfe\\u202f\\x0d\\x1b[31m" in done.stdout and not {*done.stdout} & {"\r", "\x1b"}
    assert (run / "report.html").read_text(encoding="utf-8").count("größe\u202f") > 1
    assert (run / "数字.png").is_file() and (run / "eval/metrics.json").is_file()
    tools = [
        ("-m", "mf_dist.train", tiny_config, "run_dir=runs/\udcff"),
        ("tools/report.py", "runs/\udcff"),
        ("tools/encode_latents.py", "--images", "\udcff", "--out", "x", "--vae", VAE, "--resolution", 32),
        ("tools/fid_eval.py", "--checkpoint", run, "--features", f"{FEATURES}\udcff"),
    ]
    for command in tools:
        error = run_python(*command, env=env, expect=2).stderr
        assert error.startswith("error: ") and "UTF-8" in error and error.count("\n") == 1


def test_a_run_whose_name_is_not_utf_8_has_a_report(tmp_path):
    """It is found below runs/, where no one typed its name."""
    run = tmp_path / "runs" / os.fsdecode(b"r\xff")
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples_seen": 16, "seconds_per_step": 1.0}) + "\n")
    write_report([newest_run(tmp_path)], run / "report.html")
    assert "r\\udcff" in (run / "report.html").read_text(encoding="utf-8")

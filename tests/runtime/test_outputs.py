"""An output is refused in the folder that a command reads, before anything is written."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import FEATURES, ROOT, encode

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.image_folder import list_images
from mf_dist.data.image_tars import open_images
from mf_dist.data.shards import read_manifest
from mf_dist.evaluation.sources import open_source
from mf_dist.runtime.distributed import Ranks
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.outputs import is_inside


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("tree", True),
        ("tree/new/file.npz", True),
        ("tree/../tree/x", True),
        ("link/x", True),
        ("tree/out/x", False),  # a link to a folder outside
        ("tree2/x", False),
        (".", False),
        ("new", False),
    ],
)
def test_links_are_followed(tmp_path, monkeypatch, path, inside):
    for name in ("tree", "tree2"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("tree")
    (tmp_path / "tree/out").symlink_to(tmp_path / "tree2")
    assert is_inside(tmp_path / path, tmp_path / "tree") == inside
    assert is_inside(tmp_path / path, tmp_path / "link") == inside
    monkeypatch.chdir(tmp_path)
    assert is_inside(path, "tree") == inside
    assert not is_inside("loop/x", "tree") and not is_inside("tree/x", "missing")


def test_another_name_of_the_same_folder(tmp_path):
    for name in ("tree", "bind"):
        (tmp_path / name).mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "tree", tmp_path / "bind"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        assert is_inside(tmp_path / "bind/x", tmp_path / "tree") and is_inside(tmp_path / "tree/x", tmp_path / "bind")
    finally:
        subprocess.run(["umount", tmp_path / "bind"], check=True)


def run_tool(name, *arguments):
    """The exit code of a tool's main in this process."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return module.main()


def files_in(folder):
    return sorted(path for path in folder.rglob("*"))


def test_tools_that_read_images(images, latents, capsys):
    before = files_in(images)
    with pytest.raises(UserError, match="the output .* lies in .*, which this command reads; choose a place outside"):
        encode(images, images / "latents")
    for name, *arguments in (
        ("train_vae", "--out", images / "vae"),
        ("train_features", "--name", "x", "--out", images / "3/features"),
        ("latents", "show", latents, "--out", images / "grid.png"),
    ):
        assert run_tool(name, *arguments, "--images", images) == 2
        assert "which this command reads" in capsys.readouterr().err
    assert files_in(images) == before


def test_links_in_the_images_and_files_that_are_read(images, tmp_path):
    """Outputs below a folder that the images' folder links to; the tar or .npz that is read."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").symlink_to(images / "1")
    assert list_images(tmp_path / "in", [tmp_path / "out"]).classes == ["a"]
    with pytest.raises(UserError, match="which this command reads"):
        list_images(tmp_path / "in", [images / "1/new"])
    for name in ("x.tar", "x.npz"):
        (tmp_path / name).write_bytes(b"")
        os.link(tmp_path / name, tmp_path / f"same-{name}")
        with pytest.raises(UserError, match="which this command reads"):
            open_source(str(tmp_path / name), None, [tmp_path / f"same-{name}"])
    with pytest.raises(UserError, match="which this command reads"):
        open_images(str(images), [images / "5" / ".." / "new"])


def test_measuring(images, tmp_path):
    from mf_dist.evaluation.features import FolderNetwork
    from mf_dist.evaluation.measure import Settings, images_for, open_reference

    alone = Ranks(0, 1, torch.device("cpu"))
    network = FolderNetwork(str(FEATURES), alone.device)
    before, work = files_in(images), tmp_path / "eval/work"
    with pytest.raises(UserError, match="which this command reads"):
        images_for(network, str(images), None, alone, [images / "eval/work"])
    for outputs in ([images / "statistics.npz"], [images]):
        with pytest.raises(UserError, match="which this command reads"):
            open_reference(str(images), network, None, Settings(), alone, work, outputs=outputs)
    with pytest.raises(UserError, match="which this command reads"):
        open_reference(str(images), network, None, Settings(), alone, images / "work")
    assert files_in(images) == before and not work.exists()


def test_a_run_and_its_staged_shards(tiny_config, latents, tmp_path):
    """Training reads the dataset; run_dir is refused before status.json is written there."""
    before = files_in(latents)
    with pytest.raises(UserError, match="which this command reads"):
        load_config(str(tiny_config), [f"run_dir={latents}/run"])
    for place in (latents, latents / "staged"):
        config = load_config(str(tiny_config), ["data.stage=dir", f"data.stage_dir={place}"])
        with pytest.raises(UserError, match="which this command reads"):
            resolve(config, read_manifest(latents), 1)
    assert files_in(latents) == before
    load_config(str(tiny_config), [f"run_dir={latents.parent}"])  # a dataset in the run's folder is no harm


def test_digits_in_digits(tmp_path, capsys):
    assert run_tool("demo/write_digits", "--out", tmp_path / "d", "--split", tmp_path / "d/split") == 2
    assert "where it would be a class" in capsys.readouterr().err and not (tmp_path / "d").exists()

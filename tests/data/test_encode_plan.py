"""A folder holds shards of one plan: refused changes, restored shards, and the division into tasks."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, VAE, encode, write_digits
from safetensors.torch import load_file, save_file

from mf_dist.data.audit import problems
from mf_dist.data.shards import index_path
from mf_dist.runtime.errors import UserError
from mf_dist.vae import WEIGHTS, Vae


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "copy")


@pytest.fixture
def other_vae(tmp_path):
    folder = shutil.copytree(VAE, tmp_path / "other-vae")
    save_file({name: 1.01 * w for name, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("column", ["labels", "offsets", "crc32", "numbers", "sha256", "tar", "other VAE", "missing"])
def test_encoding_again_restores_what_the_loader_refuses(images, latents, copy, other_vae, tmp_path, column):
    tar = copy / "shard-00001.tar"
    if column == "other VAE":
        encode(images, tmp_path / "other", vae=other_vae)
        for path in (tar, index_path(tar)):
            shutil.copy(tmp_path / "other" / path.name, path)
    elif column == "missing":
        index_path(tar).unlink()
    elif column == "tar":
        tar.write_bytes(tar.read_bytes()[:-1])
    else:
        with np.load(index_path(tar)) as index:
            entries = dict(index)
        entries[column] = np.array("0" * 64) if column == "sha256" else entries[column][::-1]
        np.savez(index_path(tar), **entries)
    assert list(problems(copy, lambda n: None))
    encode(images, copy)
    assert hashes(copy) == hashes(latents)


def test_another_vae_is_another_plan_and_a_moved_one_is_not(images, copy, latents, other_vae, tmp_path):
    with pytest.raises(UserError, match="another plan: vae was"):
        encode(images, copy, vae=other_vae)
    shutil.copytree(VAE, tmp_path / "moved")
    (copy / "shard-00001.tar").unlink()
    encode(images, copy, vae=tmp_path / "moved")
    assert (copy / "shard-00001.tar").read_bytes() == (latents / "shard-00001.tar").read_bytes()
    config = json.loads((VAE / "config.json").read_text())
    assert config["act_fn"] == "silu"
    (tmp_path / "moved/config.json").write_text(json.dumps({**config, "act_fn": "relu"}))
    with pytest.raises(UserError, match="has config_sha256"):
        Vae(str(tmp_path / "moved"), torch.device("cpu"), json.loads((copy / "manifest.json").read_text())["vae"])


def test_a_lost_or_damaged_plan_is_not_replaced(images, copy):
    (copy / "plan.json").unlink()
    with pytest.raises(UserError, match=r"its plan.json is missing: choose another --out"):
        encode(images, copy)
    (copy / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan.json is damaged .*choose another --out"):
        encode(images, copy)


def test_other_classes_are_another_plan(tmp_path):
    """In tars with equal names and sizes."""
    images, tar = write_digits(tmp_path / "images", 20, classes=False), tmp_path / "images.tar"
    for first in (0, 1):
        with tarfile.open(tar, "w") as archive:
            for number, path in enumerate(sorted(images.iterdir())):
                archive.add(path, path.name)
                (tmp_path / "cls").write_text(str((first + number) % 2))
                archive.add(tmp_path / "cls", path.stem + ".cls")
        if first == 0:
            encode(tar, tmp_path / "out", shard_size=10)
    with pytest.raises(UserError, match="another plan: image_list_sha256"):
        encode(tar, tmp_path / "out", shard_size=10)


def test_a_full_disk_is_a_user_error_and_the_same_command_continues(images, latents, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(UserError, match=r"small.*No space left on device; finished shards are kept"):
            encode(images, out)
        assert not list(out.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", out], check=True)
        encode(images, out)
        assert hashes(out) == hashes(latents)
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (1, 2)),
        ({"TASK_ID": "3", "TASK_MIN": "0", "TASK_MAX": "9", "TASK_COUNT": "10"}, (3, 10)),
        ({"TASK_ID": "30", "TASK_MIN": "10", "TASK_MAX": "40", "TASK_COUNT": "4"}, (2, 4)),
        ({"TASK_ID": "6", "TASK_MIN": "0", "TASK_MAX": "6", "TASK_COUNT": "4"}, (3, 4)),
        ({"TASK_ID": "5", "TASK_MIN": "5", "TASK_MAX": "5", "TASK_COUNT": "1"}, (0, 1)),
        (
            {
                "TASK_ID": "1",
                "TASK_MIN": "0",
                "TASK_MAX": "1",
                "TASK_COUNT": "2",
                "RANK": "1",
                "WORLD_SIZE": "4",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1",
            },
            (5, 8),
        ),
        ({"TASK_ID": "3", "TASK_MIN": "3", "TASK_MAX": "9", "TASK_COUNT": "3", "RANK": "0"}, (0, 3)),
        ({"TASK_ID": "4", "TASK_MIN": "3", "TASK_MAX": "9", "TASK_COUNT": "3"}, None),
        ({"TASK_ID": "x"}, None),
        ({"TASK_ID": "1"}, None),
    ],
)
def test_task_from_the_environment(monkeypatch, env, expected):
    spec = importlib.util.spec_from_file_location("encode_latents", ROOT / "tools/encode_latents.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, value in env.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}" if name.startswith("TASK") else name, value)
    if expected is None:
        with pytest.raises(UserError, match="--task I/N"):
            tool.task_of(SimpleNamespace(task=None))
    else:
        assert tool.task_of(SimpleNamespace(task=None)) == expected

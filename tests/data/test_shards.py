"""Encoded datasets: reproducible bytes, resumption, readable by webdataset, damage named."""

import hashlib
import json
import shutil
import time

import numpy as np
import pytest
import torch
import webdataset
from conftest import VAE, encode, run_python, write_digits

from mf_dist.data.image_folder import list_images
from mf_dist.data.images import load_image
from mf_dist.data.shards import LatentShards, read_manifest
from mf_dist.runtime.errors import UserError
from mf_dist.vae import Vae


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "copy")


def test_records_are_the_vaes_moments_of_each_image(images, latents):
    folder, shards, vae = list_images(images), LatentShards(latents), Vae(str(VAE), torch.device("cpu"))
    assert shards.count == 150 and len(shards.manifest["shards"]) == 3
    for i in (0, 59, 60, 149):
        moments, label = shards[i]
        assert label == folder.labels[i]
        exact = vae.encode(torch.from_numpy(load_image(folder.root / folder.paths[i], 32))[None])[0]
        np.testing.assert_allclose(moments, exact, rtol=2e-3, atol=1e-4)


def test_webdataset_reads_the_same(latents):
    shards = LatentShards(latents)
    urls = [str(latents / shard["name"]) for shard in shards.manifest["shards"]]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("moments.npy", "cls", "json"))
    assert len(rows) == 150
    for i in (0, 77, 149):
        assert np.array_equal(rows[i][0], shards[i][0]) and rows[i][1] == shards[i][1]
        assert rows[i][2]["source"].startswith(f"{rows[i][1]}/")


def test_manifest_has_exact_statistics_and_hashes(latents):
    manifest = read_manifest(latents)
    shards = LatentShards(latents)
    moments = np.stack([shards[i][0] for i in range(150)]).astype(np.float64)
    mean, std = moments[:, :4], moments[:, 4:]
    np.testing.assert_allclose(manifest["channel_mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    variance = (mean**2 + std**2).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2
    np.testing.assert_allclose(manifest["channel_std"], np.sqrt(variance), rtol=1e-12)
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256((latents / shard["name"]).read_bytes()).hexdigest()
    assert manifest["num_classes"] == 10 and manifest["value_range"] == [-1, 1]
    assert manifest["vae"]["sha256"] == Vae(str(VAE), torch.device("cpu")).sha256


def test_encoding_twice_gives_the_same_bytes_and_restores_a_missing_shard(images, latents, copy):
    before = hashes(latents)
    (copy / "shard-00001.tar").unlink()
    (copy / "manifest.json").unlink()
    stamp = (copy / "shard-00000.tar").stat().st_mtime_ns
    encode(images, copy)
    assert hashes(copy) == before
    assert (copy / "shard-00000.tar").stat().st_mtime_ns == stamp  # finished shards are not rewritten


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.index.npz"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_encoding_again_restores_a_damaged_shard(images, latents, copy, name, damage):
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes({"flip": raw, "cut": raw[:-100], "empty": b""}[damage])
    encode(images, copy)
    assert hashes(copy) == hashes(latents)


def test_changed_images_are_another_plan(tmp_path):
    images = write_digits(tmp_path / "images", 20)
    encode(images, tmp_path / "out")
    moved = next((images / "3").iterdir())
    moved.rename(images / "4" / moved.name)
    with pytest.raises(UserError, match="image_list_sha256"):
        encode(images, tmp_path / "out")
    with pytest.raises(UserError, match="--resolution 30 is not a multiple of 4"):
        encode(images, tmp_path / "other", resolution=30)


def test_another_plan_is_refused(images, copy):
    with pytest.raises(UserError, match="encode_batch was 16, now 8"):
        encode(images, copy, batch=8)


def test_damage_is_named(copy):
    with open(copy / "shard-00001.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"shard-00001\.tar"):
        LatentShards(copy)
    (copy / "shard-00001.tar").unlink()
    with pytest.raises(UserError, match="is missing"):
        LatentShards(copy)
    shutil.copy(copy / "shard-00000.index.npz", copy / "shard-00001.index.npz")
    (copy / "shard-00001.tar").write_bytes(b"")
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(copy)
    (copy / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_manifest(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished dataset"):
        LatentShards(copy)


def test_the_tool_survives_a_kill_and_refuses_mistakes(tmp_path):
    import signal
    import subprocess
    import sys

    images, out = write_digits(tmp_path / "images", 300), tmp_path / "out"
    command = [
        "tools/encode_latents.py",
        "--images",
        images,
        "--out",
        out,
        "--vae",
        VAE,
        "--resolution",
        "32",
        "--shard-size",
        "20",
        "--batch",
        "5",
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "shard-00002.tar").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_manifest(out) is None
    run_python(*command)
    whole = tmp_path / "whole"
    run_python(*command[:4], whole, *command[5:])
    assert {k: v for k, v in hashes(out).items() if "tmp" not in k} == hashes(whole)
    wrong = run_python(*command[:1], "--images", tmp_path / "no", *command[3:], expect=2)
    assert wrong.stderr.splitlines() == [f"error: no image folder at '{tmp_path / 'no'}'"]


def test_unconditional_folder(tmp_path):
    images = write_digits(tmp_path / "flat", 20, classes=False)
    encode(images, tmp_path / "out", shard_size=100)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["num_classes"] == 0 and manifest["classes"] == []

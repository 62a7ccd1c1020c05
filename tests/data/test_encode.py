"""Encoding with many tasks, mirrored images, unreadable images."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import VAE, encode, run_python, write_digits
from processes import FULL

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.data.encode import Encoding, Task, encode_images, precision_error
from mf_dist.data.image_folder import list_images
from mf_dist.data.images import load_image
from mf_dist.data.loader import LatentStream
from mf_dist.data.shards import LatentShards, read_manifest
from mf_dist.runtime.errors import UserError
from mf_dist.vae import Vae


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_any_number_of_tasks_makes_the_same_bytes(images, latents, tmp_path):
    for number in (2, 0, 1):
        assert read_manifest(tmp_path / "out") is None if number != 2 else True
        encode(images, tmp_path / "out", task=(number, 3))
    assert hashes(tmp_path / "out") == hashes(latents)
    (tmp_path / "out/shard-00002.tar").unlink()
    (tmp_path / "out/manifest.json").unlink()
    encode(images, tmp_path / "out", task=(0, 2))  # shard 2 is now task 0's
    assert hashes(tmp_path / "out") == hashes(latents)


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    images = write_digits(tmp_path / "images", 60)
    folder = list_images(images)
    for i in (7, 40):
        (images / folder.paths[i]).write_bytes(b"no image" * (i + 1))
    with pytest.raises(UserError, match=r"1 of 60 images cannot be read, more than --max-bad-share 0.001 allows"):
        encode(images, tmp_path / "out", shard_size=30)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="2 of 60 images"):  # counted over all shards, not in each
        encode(images, tmp_path / "out", shard_size=10, max_bad_share=0.02)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4  # it stopped at the second
    shutil.rmtree(tmp_path / "out")
    encode(images, tmp_path / "out", shard_size=30, max_bad_share=0.05)
    show = [
        "tools/latents.py",
        "show",
        tmp_path / "out",
        "--images",
        images,
        "--count",
        60,
        "--out",
        tmp_path / "a.png",
    ]
    assert float(run_python(*show).stdout.split("PSNR ")[1].split()[0]) > 25
    (images / folder.paths[3]).write_bytes((images / folder.paths[4]).read_bytes())
    assert "does not hold what was encoded: image 3 was" in run_python(*show, expect=2).stderr
    write_digits(tmp_path / "images", 60)
    shards = LatentShards(tmp_path / "out")
    assert shards.count == 58 and shards.manifest["source_count"] == 60
    assert [folder.paths[i] in line for i, line in zip((7, 40), shards.manifest["skipped"], strict=True)] == [True] * 2
    vae, readable = Vae(str(VAE), torch.device("cpu")), [i for i in range(60) if i not in (7, 40)]
    for row in (0, 7, 38, 57):  # no other image takes the place of a missing one
        exact = vae.encode(torch.from_numpy(load_image(images / folder.paths[readable[row]], 32))[None])[0]
        np.testing.assert_allclose(shards[row][0], exact, rtol=2e-3, atol=1e-4)
        assert shards[row][1] == folder.labels[readable[row]]


def test_a_shard_without_readable_images_is_refused(tmp_path):
    images = write_digits(tmp_path / "images", 20)
    for path in list_images(images).paths[10:]:
        (images / path).write_bytes(b"?")
    with pytest.raises(UserError, match=r"no image of shard-00001.tar can be read"):
        encode(images, tmp_path / "out", shard_size=10, max_bad_share=0.9)


def test_mirrored_images_are_encoded_not_mirrored_latents(images, tmp_path):
    encode(images, tmp_path / "out", flip=True)
    shards, folder = LatentShards(tmp_path / "out"), list_images(images)
    vae = Vae(str(VAE), torch.device("cpu"))
    for i in (0, 61, 149):
        image = load_image(folder.root / folder.paths[i], 32)
        exact = vae.encode(torch.from_numpy(image[:, :, ::-1].copy())[None])[0]
        flipped, label = (column[0] for column in shards.batch([i], [True]))
        np.testing.assert_allclose(flipped, exact, rtol=2e-3, atol=1e-4)
        assert label == folder.labels[i] and not np.array_equal(flipped, shards[i][0])
    plain, mirrored = (LatentStream(shards, 0, 64, MeanFlowConfig(), flip) for flip in (False, True))
    same = [np.array_equal(a, b) for a, b in zip(plain[0].moments, mirrored[0].moments, strict=True)]
    assert 15 < sum(same) < 49, "half of them"
    assert torch.equal(plain[0].draws["e"], mirrored[0].draws["e"]) and torch.equal(plain[0].labels, mirrored[0].labels)


def test_unsupported_precision_and_size_are_refused(images):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="tf32 needs a GPU"):
        Vae(str(VAE), cpu, precision="tf32")
    with pytest.raises(UserError, match="30 is not a multiple of 4"):
        precision_error(str(images), Vae(str(VAE), cpu), Vae(str(VAE), cpu), 30)


def test_plain_latents_cannot_be_mirrored(tiny_config):
    from mf_dist.config.schema import load_config, resolve

    config = load_config(str(tiny_config), ["data.flip=true"])
    with pytest.raises(UserError, match="encode it with --flip"):
        resolve(config, read_manifest(config.data.path), 1)


def test_bf16_is_close_and_its_error_is_printed(images, tmp_path):
    tool = ["tools/encode_latents.py", "--images", images, "--vae", VAE, "--resolution", 32, "--precision", "bf16"]
    text = run_python(*tool, "--verify").stdout
    error = float(text.split("relative error of mean ")[1].split(",")[0])
    assert 1e-5 < error < 3e-2 and not (tmp_path / "out").exists()
    run_python(*tool, "--out", tmp_path / "out", "--task", "0/1")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["encode_precision"] == "bf16"
    wrong = run_python(*tool, "--out", tmp_path / "out", "--task", "2/2", expect=2)
    assert wrong.stderr.splitlines() == ["error: --task '2/2': expected I/N with 0 <= I < N"]


@pytest.mark.dist
def test_compiled_is_the_same_function(images, tmp_path):
    plain, compiled = (Vae(str(VAE), torch.device("cpu"), compiled=c) for c in (False, True))
    pixels = torch.from_numpy(np.stack([load_image(p, 32) for p in sorted(images.rglob("*.png"))[:16]]))
    expected, result = plain.encode(pixels), compiled.encode(pixels)
    assert 0 < (result - expected).norm() / expected.norm() < 1e-5  # rounding; 0 would mean that nothing was compiled
    with pytest.raises(UserError, match="encode_compiled was False, now True"):
        encode(images, tmp_path / "out")
        encode_images(str(images), tmp_path / "out", compiled, Encoding(32, 60, 16), Task())


@pytest.mark.dist
def test_two_processes_and_kills_make_the_same_bytes(tmp_path):
    """Two processes, killed by SIGKILL repeatedly at seeded times, then torchrun, against one undisturbed process."""
    import signal
    import subprocess
    import sys
    import time

    images = write_digits(tmp_path / "images", 600 if FULL else 120)
    command = [
        "tools/encode_latents.py",
        "--images",
        images,
        "--vae",
        VAE,
        "--resolution",
        32,
        "--shard-size",
        10,
        "--batch",
        4,
    ]
    run_python(*command, "--out", tmp_path / "alone")
    out, g, kills = tmp_path / "out", np.random.default_rng(0), 0
    while not (out / "manifest.json").is_file():
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, command), "--out", str(out), "--task", task],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for task in ("0/1", "1/2")  # as after a change of n: both make every second shard
        ]
        wanted = len(list(out.glob("*.tar"))) + int(g.integers(1, 5))
        while any(rank.poll() is None for rank in ranks) and len(list(out.glob("*.tar"))) < wanted:
            time.sleep(0.001)
        time.sleep(float(g.uniform(0, 0.03)))
        kills += sum(rank.poll() is None for rank in ranks)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    (out / "manifest.json").unlink()
    (out / "shard-00003.tar").unlink()
    run_python(*launcher, *command, "--out", out)
    assert hashes(out) == hashes(tmp_path / "alone")
    print(f"{kills} kills")
    assert kills >= (20 if FULL else 5)

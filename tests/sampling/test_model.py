"""mf_dist.load in a program, and the files of tools/sample.py --count: the same images, wherever they are made."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import FEATURES, ROOT, TINY, VAE, run_here, run_python
from PIL import Image

import mf_dist
from mf_dist.runtime.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory, latents, images):
    root = tmp_path_factory.mktemp("model")
    (root / "config.yaml").write_text(TINY.format(run=root / "run", latents=latents, features=FEATURES, images=images))
    run_python("-m", "mf_dist.train", root / "config.yaml", "train.total_images=48", "log.sample_every_images=0")
    return root / "run"


@pytest.fixture(scope="module")
def model(run):
    return mf_dist.load(run)


def test_images_are_those_of_fid_eval(run, model, tmp_path):
    options = ("--num-samples", 60, "--labels", "balanced", "--save-npz", "--metrics", "fid", "--out", tmp_path)
    run_here("tools/fid_eval.py", "--checkpoint", run, "--nfe", 2, *options)
    expected = np.load(tmp_path / "samples_nfe2.npz")["arr_0"]
    images = model.sample(60, nfe=2)
    assert images.dtype == np.uint8 and images.shape == (60, 32, 32, 3) and np.array_equal(images, expected)
    assert np.array_equal(model.sample(7, nfe=2), expected[:7]) and model.sample(0).shape == (0, 32, 32, 3)
    assert not np.array_equal(model.sample(7, nfe=2, seed=1), expected[:7])
    assert np.array_equal(model.sample(2, classes="3"), model.sample(2, classes=3))
    latents = model.latents(50, nfe=2)
    assert latents.shape == (50, 4, 8, 8) and np.array_equal(model.decode(latents), expected[:50])


def test_files_have_the_same_images_continue_and_belong_to_one_setting(run, model, tmp_path):
    out = tmp_path / "files"
    command = ("tools/sample.py", "--checkpoint", run, "--classes", "3,7", "--seed", 5, "--out", out)
    run_here(*command, "--count", 3)
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert sorted(first) == ["0003_5_000000.png", "0003_5_000002.png", "0007_5_000001.png"]
    (out / "0007_5_000001.png").unlink()
    cut = out / "0003_5_000002.png"
    cut.write_bytes(cut.read_bytes()[:-1])
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, "--count", 53)
    assert "53 images" in done.stdout
    expected = model.sample(53, classes=[3, "7"], seed=5)
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(out / f"{(3, 7)[i % 2]:04d}_5_{i:06d}.png")), image)
    assert len(list(out.iterdir())) == 54
    for change, message in ((("--nfe", 2), "differ in nfe"), (("--seed", 6), "differ in seed")):
        assert message in run_here(*command, "--count", 3, *change, expect=2)[1]
    assert "holds files of another origin" in run_here(*command[:-1], tmp_path, "--count", 3, expect=2)[1]


def test_mistakes_are_one_line(run, model, tmp_path):
    for call, message in (
        (lambda: model.sample(1, classes=[10]), "class 10 is not in 0..9"),
        (lambda: model.sample(1, classes=["dog"]), "there is no class 'dog'; there are 0, 1, 2, 3, 4, ..."),
        (lambda: model.sample(1, classes=[]), "at least one class"),
        (lambda: model.sample(1, nfe=0), "nfe >= 1"),
        (lambda: model.sample(1, guidance=2.0), "without guidance as an input"),
        (lambda: model.sample(1, guidance=0.0), "without guidance as an input"),
        (lambda: model.sample(-1), "must be at least 0"),
        (lambda: mf_dist.load(run, precision="fp16"), "there is no precision 'fp16'"),
        (lambda: mf_dist.load(tmp_path), "no checkpoint in"),
        (lambda: mf_dist.load(tmp_path, device="abacus"), "there is no device 'abacus'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_program_needs_neither_deepspeed_nor_a_process_group_and_decodes_late(run):
    """import mf_dist brings no torch; the VAE's library comes with the first image."""
    program = f"""
import json, sys, time
import mf_dist
before = [name for name in ("torch", "diffusers", "deepspeed") if name in sys.modules]
import torch
start = time.perf_counter()
model = mf_dist.load({str(run)!r})
model.latents(1)
late = "diffusers" not in sys.modules
model.sample(1, classes=[3])
seconds = time.perf_counter() - start
print(json.dumps([before, late, "deepspeed" in sys.modules, torch.distributed.is_initialized(), seconds]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, late, deepspeed, group, seconds = json.loads(done.stdout.splitlines()[-1])
    assert (before, late, deepspeed, group) == ([], True, False, False)
    print(f"{seconds:.1f} s to the first image")
    with pytest.raises(AttributeError):
        mf_dist.nothing  # noqa: B018


def test_an_export_is_loaded_with_its_own_vae(run, model, tmp_path):
    run_here("tools/checkpoint.py", "export", run, "--out", tmp_path / "model", "--with-vae")
    assert np.array_equal(mf_dist.load(tmp_path / "model").sample(5), model.sample(5))
    assert np.array_equal(mf_dist.load(tmp_path / "model", vae=VAE).sample(5), model.sample(5))


def test_the_export_of_a_model_folder_keeps_its_picture_and_measurements(run, tmp_path):
    entries = [{"step": 3, "ema": "0.99", "metrics": {"fd_x_5k": 2.0}, "plus_minus_95": {"fd_x_5k": 0.125}}]
    entries.append({"step": 2, "ema": "0.99", "metrics": {}})
    run_here("tools/checkpoint.py", "export", run, "--out", tmp_path / "model")
    (tmp_path / "model/metrics.json").write_text(json.dumps(entries))
    (tmp_path / "model/samples.png").write_bytes(b"picture")
    run_here("tools/checkpoint.py", "export", tmp_path / "model", "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == entries[:1]
    assert (tmp_path / "again/samples.png").read_bytes() == b"picture"
    assert "| fd_x_5k | 2.00 ± 0.12 |" in (tmp_path / "again/README.md").read_text()

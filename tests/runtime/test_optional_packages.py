"""Packages that are installed and cannot be imported: those that are not needed do not end a program."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, VAE, run_python


def install(folder, name, text):
    """An installed package of one file."""
    (folder / f"{name}.py").write_text(text)
    metadata = folder / f"{name}-99.0.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")


@pytest.mark.dist
def test_packages_that_cannot_be_imported(images, tmp_path):
    """torchvision for another torch; then one of those that diffusers imports wherever they are installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    encode = [
        "tools/encode_latents.py",
        "--images",
        images,
        "--vae",
        VAE,
        "--resolution",
        32,
        "--out",
        tmp_path / "out",
    ]
    install(tmp_path, "torchvision", "raise OSError('libcudart.so.11.0: cannot open shared object file')")
    done = run_python(*encode, env=env)
    assert "warning: torchvision cannot be imported (OSError: libcudart.so.11.0: cannot open" in done.stderr
    measure = ["tools/fid_eval.py", "--images", images, "--reference", images, "--features", "inception-random"]
    refused = run_python(*measure, "--out", tmp_path / "eval", env=env, expect=2)
    assert "error: cannot import torch_fidelity, which " in refused.stderr and "Traceback" not in refused.stderr
    install(tmp_path, "peft", "raise AttributeError('no such thing in transformers')")
    refused = run_python(*encode, env=env, expect=2)
    line = "error: cannot import diffusers, which loads VAEs (AttributeError: no such thing in transformers): "
    assert line in refused.stderr and "Traceback" not in refused.stderr


def test_an_exit_hook_that_waits_does_not_keep_a_program():
    """As W&B's, for its server."""
    code = (
        "import atexit, time; from mf_dist.runtime import launch; launch.EXIT_SECONDS = 0.1; print('done');"
        "atexit.register(time.sleep, 1e6); launch.exit_without_finalization(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "done\n")

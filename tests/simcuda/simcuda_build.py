"""Builds device.cpp once per machine, torch version and source; about a minute."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("simcuda") / "device.cpp"
CACHE = Path.home() / ".cache" / "mf_dist" / "simcuda"


def why_not() -> str | None:
    """Why the simulated device cannot be had here; None if it can."""
    import torch

    if torch.version.cuda is not None:
        return "it needs a CPU build of torch"
    return None if shutil.which("g++") else "it needs g++"


def build() -> None:
    """In another process, since loading the device changes torch for good."""
    subprocess.run([sys.executable, __file__], check=True)


def load():
    """The extension module, built if this machine does not have it. Several processes may ask at once."""
    import torch
    from torch.utils.cpp_extension import load as compile_extension

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = CACHE / key
    library = folder / "simcuda_device.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            flags, path = ["-O1", "-w"], os.environ["PATH"]
            os.environ["PATH"] = f"{Path(sys.executable).parent}:{path}"  # ninja is installed beside python
            compile_extension("simcuda_device", [str(SOURCE)], build_directory=str(folder), extra_cflags=flags)
            os.environ["PATH"] = path
            (folder / "complete").touch()
    spec = importlib.util.spec_from_file_location("simcuda_device", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    load()

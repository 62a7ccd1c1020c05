"""Versions, code and machine of a run, as recorded with its results."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "deepspeed", "diffusers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of everything that affects a run's numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def environment(world_size: int) -> dict[str, str]:
    """Versions, commit of the code, device and number of ranks, recorded with a checkpoint."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    return {**versions(), "code": _git_commit(), "device": device, "ranks": str(world_size)}


def _git_commit() -> str:
    """The commit of the code's working tree, read without git; 'unknown' for an installed package."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0] for line in packed if line.endswith(" " + name))
    except (OSError, StopIteration):
        return "unknown"

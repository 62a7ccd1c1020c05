"""Whether torch.compile works on this machine, tried on a small function before anything slow."""

import os
import shutil
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from mf_dist.runtime.errors import UserError

HEADERS = "install the python headers (python3-dev)"
FOLDERS = "set TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders where programs can be written and run"


def require_compiler(device: torch.device, instead: str = "") -> None:
    """Compiles and runs a small function on `device`. Raises UserError that says what to install or to set, or
    `instead`: how to do without torch.compile, if one can, such as "set engine.compile=false"."""
    if problem := _missing(device) or _failure(device):
        raise UserError(f"torch.compile {problem}" + (f", or {instead}" if instead else ""))


def _missing(device: torch.device) -> str:
    """What torch.compile needs and this machine lacks: on a CPU inductor compiles C++; on a GPU Triton builds its
    driver from C."""
    language, variable, known = _compiler(device)
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, [chosen] if chosen else known)):
        return f"needs a {language} compiler: {_advice(device)}"
    folders = [sysconfig.get_paths()["include"], *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return f"needs {folders[0]}/Python.h: {HEADERS}"
    return ""


def _compiler(device: torch.device) -> tuple[str, str, list[str]]:
    """Language, the variable that names a compiler, and those that are found without it."""
    return ("C", "CC", ["gcc", "clang"]) if device.type == "cuda" else ("C++", "CXX", ["g++"])


def _advice(device: torch.device) -> str:
    _, variable, known = _compiler(device)
    chosen = os.environ.get(variable)
    return f"install {known[0]}" + (f", or correct {variable}, which is {chosen!r}" if chosen else "")


def _failure(device: torch.device) -> str:
    """Why a small function does not compile and run; "" if it does."""
    number = time.time_ns() % 1_000_000_007 / 1_000_000_007  # another one each time, so that no cache has the result

    def add(x: Tensor) -> Tensor:
        return x + number

    try:
        with warnings.catch_warnings(action="ignore"):
            torch.compile(add, fullgraph=True, dynamic=False)(torch.ones(64, device=device)).cpu()
    except Exception as error:  # whatever compilers, caches and dynamic libraries raise
        cause = getattr(error, "inner_exception", error)
        lines = [" ".join(line.split()) for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).split(". ")[0]
        if "Python.h" in reason:
            return f"fails ({reason}): {HEADERS}"
        if isinstance(cause, OSError):
            return f"fails ({reason}): {FOLDERS}"
        return f"fails ({reason}): {_advice(device)}"
    torch._dynamo.utils.counters.clear()  # the counts of graphs are those of the work
    return ""

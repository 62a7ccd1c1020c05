"""Makes torchvision importable, or hides it: diffusers imports it if it is installed, and fails if that fails."""

import importlib
import os
import sys

import torch

_libraries: list[torch.library.Library] = []


def repair_torchvision() -> None:
    """PyPI's torchvision is built for CUDA. With a CPU torch its extension does not load, and its import fails because
    two operator schemas are missing. Defining the schemas is sufficient: this package never calls the operators. One
    that fails otherwise, such as one for another torch, is hidden with a warning: only evaluation needs it."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # of a disk
            raise
        is_for_cuda = "torchvision::nms" in str(error) and torch.version.cuda is None and not _libraries
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        if is_for_cuda:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
            repair_torchvision()
            return
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # as if it were not installed
        if os.environ.get("RANK", "0") == "0":
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"warning: torchvision cannot be imported ({reason}); going on without it", file=sys.stderr, flush=True
            )

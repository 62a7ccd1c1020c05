"""Makes PyPI's torchvision importable with a CPU build of torch, so that diffusers can be imported."""

import importlib
import sys

import torch

_libraries: list[torch.library.Library] = []


def repair_torchvision() -> None:
    """PyPI's torchvision is built for CUDA. With a CPU torch its extension does not load, and its import fails because
    two operator schemas are missing; diffusers, which imports torchvision if it is installed, then fails too.
    Defining the schemas is sufficient: this package never calls the operators. Does nothing in other cases."""
    if torch.version.cuda is not None or _libraries or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")

"""Base class of the feature networks, and safe loading of weights from files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mf_dist.data.images import Pixels
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import compute_precision
from mf_dist.runtime.tensor_file import load_tensors
from mf_dist.runtime.torch_file import load_torch_file

Floats = npt.NDArray[np.float32]


class Features(NamedTuple):
    """A network's outputs for B images, fp32: pooled (B, D), spatial (B, S) (S = 0 if it has none), logits (B, K)."""

    pooled: Floats
    spatial: Floats
    logits: Floats


class FeatureNetwork(ABC):
    name: str
    """Part of every metric's name."""
    sha256: str
    """Hash of the weights file."""
    dimension: int
    """D of the pooled features."""
    resolution: int | None = None
    """Side that images must have; None: any, the network resizes them."""
    resize: str = "none"
    """Describes how images are resized to the network's input size."""
    spatial_dimension = 0
    """S of the spatial features; 0: it has none."""
    has_logits = True
    """Whether it has classes, which the inception score needs."""
    is_inception = False
    """Whether its Frechet distance may be called FID."""
    is_published = False
    """Whether papers report this distance, so that a number of another protocol needs a warning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> Features:
        """Features of (B, 3, R, R) uint8. Raises UserError if the side is wrong or the features are not finite."""
        if self.resolution is not None and pixels.shape[2:] != (self.resolution, self.resolution):
            raise UserError(
                f"features {self.name!r} take images of side {self.resolution}, got {pixels.shape[2]}x{pixels.shape[3]}"
            )
        with compute_precision("fp32", self.device):
            tensors = self.compute(torch.from_numpy(pixels).to(self.device))
        features = Features(*(tensor.float().cpu().numpy() for tensor in tensors))
        if not all(np.isfinite(part).all() for part in features):
            raise UserError(f"features {self.name!r} are not finite")
        return features

    @abstractmethod
    def compute(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled, spatial and logits of (B, 3, R, R) uint8 on the network's device."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from torch's format. Raises UserError for damaged files, pickled objects and
    TorchScript; none of their code runs."""
    state = load_tensors(path) if path.suffix == ".safetensors" else load_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights {str(path)!r} hold {type(state).__name__}, expected tensors by name")
    return state

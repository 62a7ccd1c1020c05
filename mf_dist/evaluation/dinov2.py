"""DINOv2's ViT-L/14 (arXiv 2304.07193) for FD-DINOv2, as EDM2 measures it (NVlabs/edm2: calculate_metrics.py): bicubic
with antialiasing to 224, ImageNet's mean and std, the class token after the last normalisation.

The network is timm's. Positions are learnt for 37 x 37 patches; their interpolation to 16 x 16 is DINOv2's own
(dinov2/models/vision_transformer.py), done once at loading: timm's, which antialiases, gives other features.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_dist.evaluation.feature_network import FeatureNetwork, read_state_dict
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError, import_error
from mf_dist.runtime.torchvision_repair import repair_torchvision
from mf_dist.runtime.weights import load_weights

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
"""Of the file at URL, as several public projects that use it state it; DINOv2's own pages state none."""
SIDE, PATCH, TRAINED_PATCHES = 224, 14, 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dinov2(spec: str, weights: str | None, device: torch.device) -> "DINOv2":
    """ViT-L/14 with the published weights ('dinov2-l': the file's sha256 is checked before it is read) or others
    ('dinov2-l-other': the hash is part of the metrics' names). Raises UserError if the file is missing or another."""
    if not weights or not Path(weights).is_file():
        where = f"no file at {weights!r}" if weights else "no --feature-weights given"
        raise UserError(
            f"the weights of DINOv2 are missing: {where}. On a machine with network run `curl -L -o FILE {URL}` "
            f"(1,217,586,395 bytes, sha256 {SHA256}), then give --feature-weights FILE"
        )
    sha256 = sha256_of(weights)
    if spec == "dinov2-l" and sha256 != SHA256:
        raise UserError(
            f"{weights} is not the published DINOv2 ViT-L/14: its sha256 is {sha256}, expected {SHA256}; it was not "
            "loaded. --features dinov2-l-other accepts it and puts its hash into the metrics' names"
        )
    network = vision_transformer(width=1024, depth=24, heads=16)
    load_dinov2(network, read_state_dict(Path(weights)), f"weights {weights}")
    return DINOv2(network, sha256, device)


def vision_transformer(width: int, depth: int, heads: int) -> nn.Module:
    """timm's network of DINOv2 at 224 pixels: normalised pixels (B, 3, 224, 224) -> class token (B, width)."""
    repair_torchvision()
    try:
        from timm.models.vision_transformer import VisionTransformer
    except Exception as error:
        raise import_error("timm", "has the network of --features dinov2-l", error) from None
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": width, "depth": depth, "num_heads": heads}
    network: Any = VisionTransformer(**sizes, num_classes=0, init_values=1.0)
    return network


def load_dinov2(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Loads weights of DINOv2's names. The token for masked patches is for training."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    positions = tensors.get("pos_embed")
    if positions is not None and positions.ndim == 3 and positions.shape[1] == 1 + TRAINED_PATCHES**2:
        tensors["pos_embed"] = positions_at_224(positions.float())
    load_weights(network, tensors, source)


def positions_at_224(positions: Tensor) -> Tensor:
    """(1, 1 + 37 37, D) -> (1, 1 + 16 16, D), fp32. DINOv2 adds 0.1 to the number of patches in the scale."""
    patches, width = SIDE // PATCH, positions.shape[2]
    grid = positions[:, 1:].reshape(1, TRAINED_PATCHES, TRAINED_PATCHES, width).permute(0, 3, 1, 2)
    scale = (patches + 0.1) / TRAINED_PATCHES
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, patches * patches, width)], dim=1)


class DINOv2(FeatureNetwork):
    """pooled (B, 1024): the class token; no spatial features, no classes."""

    dimension, has_logits = 1024, False
    resize = "bicubic, antialiased, to 224 (torch)"

    def __init__(self, network: nn.Module, sha256: str, device: torch.device) -> None:
        super().__init__(device)
        self.sha256 = sha256
        self.is_published = sha256 == SHA256
        self.name = "dinov2" if self.is_published else f"dinov2_{sha256[:8]}"
        self.network = network.to(device).eval()

    def compute(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token = self.network(normalised(pixels))
        return token, token.new_empty(len(token), 0), token.new_empty(len(token), 0)


def normalised(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 224, 224) fp32."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    resized = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return (resized / 255 - mean) / std

"""The Inception network of published FIDs: torch-fidelity's port of the 2015-12-05 graph (uint8 in, TF1's bilinear
resize to 299, (x - 128) / 128), with the spatial features of sFID (ADM's evaluator: mixed_6/conv, 7 channels).
"""

import io
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from mf_dist.evaluation.feature_network import FeatureNetwork, read_state_dict
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError, import_error
from mf_dist.runtime.torchvision_repair import repair_torchvision
from mf_dist.runtime.weights import load_weights

repair_torchvision()
try:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
except Exception as error:
    raise import_error("torch_fidelity", "has the Inception network", error) from None

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Hash of torch-fidelity's weights file, which is also pytorch-fid's."""
SPATIAL_CHANNELS = 7


class _Graph(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """torch-fidelity's network without its weight loader, which would unpickle any file."""

    def __init__(self) -> None:
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # type: ignore[override]
        """Does nothing: `load_weights` loads the weights afterwards."""


def open_inception(spec: str, weights: str | None, device: torch.device) -> "Inception":
    """The network with the published weights (the file's sha256 is checked before it is read), other or random ones."""
    graph = _Graph()
    if spec == "inception-random":
        if weights:
            raise UserError("inception-random takes no weights file")
        _randomise(graph)
        return Inception(graph, "inception_random", "0" * 64, device)
    if spec not in ("inception", "inception-other"):
        raise UserError(f"unknown features {spec!r}; expected inception, inception-other or inception-random")
    if not weights or not Path(weights).is_file():
        where = f"no file at {weights!r}" if weights else "no --inception-weights given"
        raise UserError(
            f"the Inception weights are missing: {where}. On a machine with network run `curl -L -o FILE "
            f"{URL_INCEPTION_V3}` (95,628,359 bytes, sha256 {SHA256}), then give --inception-weights FILE; or use "
            "--features efflite0, which does not give an FID"
        )
    sha256 = sha256_of(weights)
    if spec == "inception" and sha256 != SHA256:
        raise UserError(
            f"{weights} is not the published Inception: its sha256 is {sha256}, expected {SHA256}; it was not "
            "loaded. --features inception-other accepts it and does not name the metric FID"
        )
    load_weights(graph, read_state_dict(Path(weights)), f"weights {weights}")
    return Inception(graph, "inception" if sha256 == SHA256 else f"inception_{sha256[:8]}", sha256, device)


def _randomise(graph: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852), which keeps the scale of activations; normalisations stay identities."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in graph.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


class Inception(FeatureNetwork):
    """pooled (B, 2048), logits (B, 1008) without bias as in the original inception score, spatial (B, 17 * 17 * 7) in
    TensorFlow's order: row, column, channel."""

    dimension, spatial_dimension = 2048, 17 * 17 * SPATIAL_CHANNELS
    resize = "TF1 bilinear to 299 (torch-fidelity)"

    def __init__(self, graph: nn.Module, name: str, sha256: str, device: torch.device) -> None:
        super().__init__(device)
        self.name, self.sha256 = name, sha256
        self.is_inception = self.is_published = sha256 == SHA256
        self.graph = graph.to(device).eval()
        self._spatial: Tensor | None = None
        graph.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._store_spatial)

    def _store_spatial(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def compute(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, logits = self.graph(pixels)
        assert self._spatial is not None
        return pooled, self._spatial, logits

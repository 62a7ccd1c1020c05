"""Writes sit_golden.safetensors: random weights and outputs of SiT's and REPA's own networks.

    git clone https://github.com/willisma/SiT && git clone https://github.com/sihyun-yu/REPA
    python tests/sampling/make_sit_golden.py SIT REPA        # needs timm, from which both take their layers

Per project: weights/NAME as in its checkpoints, inputs z (33, 4, 8, 8), t (33,) from 0 to 1 in the project's own time,
y (33,), and the output v (33, 4, 8, 8).
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mf_dist.runtime.torchvision_repair import repair_torchvision

SHAPE = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
CLASSES = 5


def network(path: Path, **options):
    spec = importlib.util.spec_from_file_location("project", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SiT(**SHAPE, num_classes=CLASSES, **options).eval()


@torch.no_grad()
def golden(net) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if name != "pos_embed":
            parameter.normal_(std=0.3, generator=generator)
    t = torch.linspace(0, 1, 33)
    z = torch.randn(33, 4, 8, 8, generator=generator)
    y = torch.arange(33) % (CLASSES + 1)
    v = net(z, t, y)
    weights = {f"weights/{name}": tensor.detach() for name, tensor in net.state_dict().items()}
    return {**weights, "z": z, "t": t, "y": y, "v": v[0] if isinstance(v, tuple) else v}


def main() -> None:
    sit, repa = map(Path, sys.argv[1:])
    repair_torchvision()  # timm imports it
    nets = {
        "sit": network(sit / "models.py", learn_sigma=True),
        "repa": network(
            repa / "models/sit.py", decoder_hidden_size=16, encoder_depth=1, z_dims=[6], projector_dim=8, qk_norm=False
        ),
    }
    tensors = {f"{project}/{name}": a for project, net in nets.items() for name, a in golden(net).items()}
    save_file({name: a.contiguous() for name, a in tensors.items()}, Path(__file__).with_name("sit_golden.safetensors"))


if __name__ == "__main__":
    main()

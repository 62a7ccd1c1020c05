"""What converters of other projects' weights share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mf_dist.config.schema import ModelConfig
from mf_dist.models.network import Network
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.weights import DTYPES

LEAST_CORRELATION = 0.5
"""Of a velocity with the noise at t = 1."""


@dataclass(frozen=True)
class ConvertedWeights:
    model: ModelConfig
    tensors: dict[str, Tensor]
    """By our names, fp32."""
    left_out: list[str]
    """What has no use here of the source's tensors."""


def checked(name: str, tensor: Tensor | None, dimensions: int | None = None) -> Tensor:
    """The tensor in fp32. Raises UserError, without the file's name, for what holds no weights."""
    if tensor is None or not tensor.dim() or dimensions not in (None, tensor.dim()):
        shape = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise UserError(f"{name} {shape}")
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise UserError(f"{name} has type {str(tensor.dtype).removeprefix('torch.')}, which holds no weights")
    if tensor.numel() == 0:
        raise UserError(f"{name} is empty")
    if not tensor.isfinite().all():
        raise UserError(f"{name} is not finite")
    return tensor.float().contiguous()


def check_velocity(net: Network, generator: torch.Generator, *conditions: Any) -> None:
    """At t = 1 the input is the noise e, which is independent of x: a velocity is e - E[x] there, and correlates with
    e, whatever the data. Raises UserError, without the file's name, for a network that predicts something else, such as
    DiT's, which has SiT's names and shapes, but predicts noise at 1000 discrete times. conditions: of two rows, for
    networks that take others than the label."""
    size = net.tokens_per_side * net.patch
    e = torch.randn(2, net.channels, size, size, generator=generator)
    one = torch.ones(2)
    with torch.no_grad():
        u = net(e, one, one, torch.full((2,), net.null_label), *conditions)
    correlation = torch.corrcoef(torch.stack([e.flatten(), u.flatten()]))[0, 1].item()
    if not correlation >= LEAST_CORRELATION:
        raise UserError(
            f"on pure noise its output has correlation {correlation:.2f} with the noise, a velocity's is near 1: is it "
            "of another project? facebook's DiT has the same names and shapes as SiT, but predicts noise: not supported"
        )

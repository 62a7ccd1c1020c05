"""Weights from files, whose content nobody vouches for."""

import torch
from torch import Tensor, nn

from mf_dist.runtime.errors import UserError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types in which weights may be stored."""


def load_weights(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Loads `tensors`; `source` names them in errors. Raises UserError naming the first that is missing, unexpected,
    misshapen, of a type that holds no weights, or not finite in the network's type."""
    expected = network.state_dict()
    for key in sorted({*expected, *tensors}):
        if key not in tensors or key not in expected:
            raise UserError(f"{source}: {key} is {'missing' if key in expected else 'unexpected'}")
        own, loaded = expected[key], tensors[key]
        if loaded.shape != own.shape:
            shapes = tuple(loaded.shape), tuple(own.shape)
            raise UserError(f"{source}: {key} has shape {shapes[0]}, this network needs {shapes[1]}")
        if loaded.dtype not in (DTYPES if own.is_floating_point() else (own.dtype,)):
            type_name = str(loaded.dtype).removeprefix("torch.")
            raise UserError(f"{source}: {key} has type {type_name}, which holds no weights")
        if not loaded.to(own.dtype).isfinite().all():
            raise UserError(f"{source}: {key} is not finite")
    nn.Module.load_state_dict(network, tensors)

"""What all networks of u(z, r, t | y) share: patches of a square latent, and what training must know of their blocks.

Shapes: B rows, C latent channels, S latent side, P patch side, N_p = (S/P)^2 patches.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mf_dist.models.layers import Dual, Linear

Tangent = tuple[Tensor, Tensor, Tensor]
"""Direction (dz, dr, dt): dz like z, dr and dt (B,)."""


class Branch(NamedTuple):
    """Blocks that run one after the other, and the layers after them; the last linear makes the output."""

    blocks: Sequence[nn.Module]
    last_layers: Sequence[nn.Module]
    last_linear: Linear


class Network(nn.Module, ABC):
    """Attributes and methods that do not depend on the architecture."""

    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of weights that sampling does not need."""

    def __init__(self, latent_size: int, latent_channels: int, num_classes: int, patch_size: int) -> None:
        super().__init__()
        self.channels, self.patch, self.tokens_per_side = latent_channels, patch_size, latent_size // patch_size
        self.null_label = num_classes
        self.checkpoint_blocks = False
        """Whether backward recomputes each block instead of saving its activations."""
        self.tangent_dtype: torch.dtype | None = None
        """Dtype of a pass with a tangent; None: that of the weights."""
        self.patch_in: Linear

    @abstractmethod
    def branches(self) -> list[Branch]:
        """In the order of a training forward. Each pass begins with the first block of the first one, and computes
        whole other branches or none of them."""

    @abstractmethod
    def output(self, *args: Any, **kwargs: Any) -> Dual:
        """The last layers of a branch: from its tokens to u (B, C, S, S), and its tangent."""

    def compute_dtype(self, dtype: torch.dtype | None, tangent: Tangent | None) -> torch.dtype:
        """In which the layers compute: `dtype`; None: with a tangent tangent_dtype, else that of the weights."""
        of_tangent = None if tangent is None else self.tangent_dtype
        return dtype or of_tangent or self.patch_in.weight.dtype

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """block(*inputs), which backward repeats if checkpoint_blocks is set."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _patchify(self, z: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, N_p, P P C)."""
        side, p = self.tokens_per_side, self.patch
        return z.reshape(-1, self.channels, side, p, side, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, N_p, P P C) -> (B, C, S, S)."""
        side, p = self.tokens_per_side, self.patch
        z = x.reshape(-1, side, side, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        return z.reshape(-1, self.channels, side * p, side * p)

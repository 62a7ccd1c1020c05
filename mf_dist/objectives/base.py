"""What all losses are: modules whose call is the loss of one micro-batch, target and regression."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mf_dist.config.objectives import Objective
from mf_dist.models.network import Network

Sums = dict[str, Tensor]
"""(sum over rows, number of rows) of each logged quantity, so that means over ranks and steps are exact."""


class Loss(nn.Module, ABC):
    """Rows are ordered: the first num_r_equals_t have r = t."""

    def __init__(self, net: Network, objective: Objective) -> None:
        super().__init__()
        self.net, self.null_label = net, net.null_label
        self.phase = objective.phases[0].name
        """Name of the current phase (config.objectives.Phase); each is a graph of its own."""
        self.in_bf16 = False
        """Whether the layers compute in bf16; set by the engine."""
        self._numerator, self._denominator = objective.share_r_equals_t.as_integer_ratio()

    def num_r_equals_t(self, rows: int) -> int:
        return rows * self._numerator // self._denominator

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, draws: dict[str, Tensor], schedule: Tensor) -> tuple[Tensor, Sums]:
        """x (B, C, S, S) latents as the network sees them, y (B,) labels before the label drop, draws by name as the
        objective specifies, each (B, ...), schedule () fp32: the schedule's value. Returns the loss, a scalar in fp32,
        and sums for the log."""


def log_sums(**quantities: tuple[Tensor, int]) -> Sums:
    """From (sum, number of rows) of each quantity."""
    return {
        name: torch.stack([total.float(), torch.full_like(total, count, dtype=torch.float)])
        for name, (total, count) in quantities.items()
    }

"""The (r, t) at which a row is trained (paper, section "Sampling (r, t)"; the authors' sample_tr)."""

import torch
from torch import Tensor


def sample_times(normals: Tensor, num_r_equals_t: int, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Logit-normal times: t is the larger and r the smaller of two draws sigmoid(mean + std n).

    normals (B, 2) from N(0, 1) -> r, t (B,) in (0, 1), r <= t. The first num_r_equals_t rows get r = t; as
    in the authors' code, their t is the larger of two draws as well."""
    draws = torch.sigmoid(mean + std * normals)
    t, r = draws.amax(dim=1), draws.amin(dim=1)
    is_equal = torch.arange(len(t), device=t.device) < num_r_equals_t
    return torch.where(is_equal, t, r), t

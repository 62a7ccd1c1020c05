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


GAP = 1e-4
"""Smallest t - r of r < t rows (SoFlow)."""


def sample_times_by_row(
    normals: Tensor,
    num_r_equals_t: int,
    of_equal: tuple[float, float],
    of_t: tuple[float, float],
    of_r: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """SoFlow's times: t of r = t rows, and t and r of r < t rows, are logit-normal with (mean, std) of their own; r is
    at most t - GAP, t at least GAP.

    normals (B, 2) from N(0, 1) -> r, t (B,) in [0, 1)."""

    def law(n: Tensor, mean_std: tuple[float, float]) -> Tensor:
        return torch.sigmoid(mean_std[0] + mean_std[1] * n)

    equal, rest = normals[:num_r_equals_t], normals[num_r_equals_t:]
    t_eq, t = law(equal[:, 0], of_equal), law(rest[:, 0], of_t).clamp(min=GAP)
    return torch.cat([t_eq, torch.minimum(law(rest[:, 1], of_r), t - GAP)]), torch.cat([t_eq, t])

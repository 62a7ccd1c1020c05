"""How rows are weighted."""

from torch import Tensor


def gap_weight(gap: Tensor, s: Tensor, mean_gap: float) -> Tensor:
    """1 - s + lambda s (1 - (t - r)), where lambda makes its mean 1 at s = 1 (arXiv 2511.19065, progressive weighting);
    s () falls from 1 to 0 over the run. gap = t - r (B,), of mean mean_gap."""
    return 1 - s + s * (1 - gap) / (1 - mean_gap)


def adaptive(s: Tensor, eps: float, p: float = 1.0) -> Tensor:
    """s / stopgrad((s + eps)^p) of each row (MeanFlow paper, "Loss metrics"); s (B,) is a squared error."""
    return s / (s.detach() + eps) ** p

"""How rows are weighted."""

from torch import Tensor


def adaptive(s: Tensor, eps: float, p: float = 1.0) -> Tensor:
    """s / stopgrad((s + eps)^p) of each row (MeanFlow paper, "Loss metrics"); s (B,) is a squared error."""
    return s / (s.detach() + eps) ** p

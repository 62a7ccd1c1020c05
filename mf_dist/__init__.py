"""One-step generative models at scale: MeanFlow (arXiv 2505.13447) and its successors on DeepSpeed.

model = mf_dist.load("runs/digits")
images = model.sample(8, classes=[3])        # uint8 (8, H, W, 3), see mf_dist/sampling/model.py
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mf_dist.sampling.model import load as load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` is imported when it is used: importing mf_dist alone brings no torch."""
    if name == "load":
        from mf_dist.sampling.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

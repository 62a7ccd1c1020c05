"""Named protocols: what a published number means, beyond the features and the distance, which all of them share.

    adm             openai/guided-diffusion: evaluations/evaluator.py, on samples as DiT's and SiT's scripts draw them
    imf-jax         Lyy-iiis/imeanflow: imf.py, utils/sample_util.py, utils/fid_util.py
    meanflow-jax    Gsunshine/meanflow: meanflow.py, train.py, utils/fid_util.py
    edm2            NVlabs/edm2: generate_images.py, training/encoders.py, calculate_metrics.py

docs/evaluation.md compares them step by step. No torch.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePath
from typing import Any

COUNT = 50_000
"""Images of all four."""


@dataclass(frozen=True)
class EvaluationProtocol:
    name: str
    labels: str
    """'random', or 'balanced': image i has class i mod classes."""
    truncates: bool
    """Whether pixels are floor(255 (x + 1) / 2), half a level darker on average than rounded ones."""
    reference: str
    """Pattern of the published file's name, by which it is recognised, or by its hash (reference.KNOWN)."""
    reference_owner: str
    seeds: int = 1
    """Of which the lowest value is published."""

    def __str__(self) -> str:
        pixels = "truncated" if self.truncates else "rounded"
        seeds = f", the lowest of {self.seeds} seeds" if self.seeds > 1 else ""
        return (
            f"{self.name}: {COUNT:,} images, {self.labels} labels, {pixels} pixels, against "
            f"{self.reference_owner} {self.reference}{seeds}"
        )

    def overridden(self, count: int, labels: str | None, reference: dict[str, Any]) -> list[str]:
        """What makes a number another one than the protocol's. labels: None for images from files, whose labels are not
        known; reference: its provenance."""
        warnings = []
        if count != COUNT:
            fewer = "fewer images give a higher value"
            warnings.append(f"protocol {self.name} takes {COUNT:,} images, this number {count:,}; {fewer}")
        if labels not in (self.labels, None):
            warnings.append(f"labels are {labels}; protocol {self.name} has them {self.labels}")
        name = PurePath(str(reference.get("reference"))).name
        known_as = str(reference.get("reference_known_as")).split()[-1]
        if not any(fnmatch(text, self.reference) for text in (name, known_as)):
            wanted = f"{self.reference_owner} {self.reference}"
            warnings.append(f"protocol {self.name} measures against {wanted}, this number against {name}")
        return warnings


ADM = EvaluationProtocol("adm", "random", False, "VIRTUAL_*.npz", "ADM's")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ADM,
        EvaluationProtocol("imf-jax", "balanced", False, "imagenet_*_fid_stats.npz", "iMF's"),
        EvaluationProtocol("meanflow-jax", "random", False, "imagenet_*_fid_stats.npz", "MeanFlow's"),
        EvaluationProtocol("edm2", "random", True, "img*.npz", "EDM2's (its .pkl, converted)", seeds=3),
    )
}
"""By name. What an entry without a protocol was measured by is ADM."""

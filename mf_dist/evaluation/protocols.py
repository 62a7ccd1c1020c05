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
    owner: str
    """Whose statistics of real images are its reference."""
    reference: str
    """Pattern of that file's name, by which it is recognised where its hash is not known (reference.KNOWN)."""
    has_dinov2: bool = False
    """Whether the reference has statistics of DINOv2's features too; all have Inception's."""
    seeds: int = 1
    """Of which the lowest value is published."""

    def __str__(self) -> str:
        seeds = f", the lowest of {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{self.name}: {COUNT:,} images, {self.images}, against {self.owner}'s {self.reference}{seeds}"

    @property
    def images(self) -> str:
        return f"{self.labels} labels, {'truncated' if self.truncates else 'rounded'} pixels"

    def overridden(self, count: int, labels: str | None) -> list[str]:
        """What makes a number another one than the protocol's. labels: None for images from files."""
        warnings = []
        if count != COUNT:
            fewer = "fewer images give a higher value"
            warnings.append(f"protocol {self.name} takes {COUNT:,} images, this number {count:,}; {fewer}")
        if labels not in (self.labels, None):
            warnings.append(f"labels are {labels}; protocol {self.name} has them {self.labels}")
        return warnings

    @property
    def unknown_of_files(self) -> str:
        return f"protocol {self.name} has {self.images}; how images from files were made is not known"

    def overridden_reference(self, reference: dict[str, Any]) -> list[str]:
        """The same of the reference, an entry's provenance: what is known by its hash is not judged by its name."""
        name = PurePath(str(reference.get("reference"))).name
        owner, known_name = str(reference.get("reference_known_as", f"{self.owner} {name}")).split(" ", 1)
        if owner == self.owner and fnmatch(known_name, self.reference):
            return []
        found = f"{name} ({owner}'s {known_name})" if "reference_known_as" in reference else name
        return [f"protocol {self.name} measures against {self.owner}'s {self.reference}, this number against {found}"]

    def overridden_seeds(self, count: int) -> list[str]:
        """The same of a number over `count` seeds. The mean of some is expected to be that of one."""
        if self.seeds in (1, count):
            return []
        return [f"protocol {self.name} publishes the lowest of {self.seeds} seeds, this number is of {count}"]


ADM = EvaluationProtocol("adm", "random", False, "ADM", "VIRTUAL_*.npz")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ADM,
        EvaluationProtocol("imf-jax", "balanced", False, "iMF", "imagenet_*_fid_stats.npz"),
        EvaluationProtocol("meanflow-jax", "random", False, "MeanFlow", "imagenet_*_fid_stats.npz"),
        EvaluationProtocol("edm2", "random", True, "EDM2", "img*.npz", has_dinov2=True, seeds=3),
    )
}
"""By name. What an entry without a protocol was measured by is ADM."""

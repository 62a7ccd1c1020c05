"""References, which images are measured against: statistics of real images, with their provenance.

Known layouts of .npz, none of which needs unpickling:
    ADM's                mu, sigma, mu_s, sigma_s, arr_0 (10,000 images, for precision and recall)
    MeanFlow's (JAX)     ref_mu, ref_sigma
    plain                mu, sigma
    ours                 mu, sigma, mu_s, sigma_s, rows (features of up to ROWS images), provenance (a JSON text)
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg

from mf_dist.data.images import Pixels
from mf_dist.evaluation.blocks import Blocks
from mf_dist.evaluation.feature_network import FeatureNetwork, Floats
from mf_dist.evaluation.sources import NpzImages, Source
from mf_dist.evaluation.statistics import Array, Gaussian, positive
from mf_dist.runtime.atomic_files import sha256_of, write_npz
from mf_dist.runtime.errors import UserError

ROWS = 10_000
"""Real images whose features are kept for precision, recall, KID and nearest neighbours, as in ADM's files."""
KNOWN = {
    "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758": "ADM VIRTUAL_imagenet256_labeled.npz",
    "925e8b5b4ced42137f9847f97a63250a2bd59b70f33f3f356e03453d0775f1ac": "nanogen-evals imagenet_256_fid_stats.npz",
}
"""sha256 -> name of a published reference file; any other is known by its path only. ADM's hash is that of the
Git LFS pointer to the file (2,037,122,530 bytes) in github.com/ruizegao/efficient-dit."""


@dataclass(frozen=True)
class Reference:
    pooled: Gaussian
    spatial: Gaussian | None
    rows: Floats | None
    """Features (K, D) of real images, if available."""
    provenance: dict[str, Any]
    """Copied into the entry: the source, its sha256, its number of images."""
    warnings: list[str] = field(default_factory=list)
    images: Source | None = None
    """The images that rows were computed from, if available."""
    picks: list[int] | None = None
    """rows[i] belongs to image picks[i] of `images`; None: to image i."""
    blocks: Blocks | None = None
    """Blocks of the real images, if they were computed for this reference."""

    def real_image(self, row: int) -> Pixels:
        """Image (3, R, R) of rows[row]; requires `images`."""
        assert self.images is not None
        number = row if self.picks is None else self.picks[row]
        return self.images.read(number, number + 1)[0][0]


def read_reference(path: str, network: FeatureNetwork) -> Reference:
    """Reads a statistics file of `network`'s features. Raises UserError for a wrong shape, values that are not finite,
    a sigma that is not symmetric or has negative eigenvalues, or features of another network."""
    arrays = _load(path)
    pooled, rank = _gaussian(path, arrays, ("mu", "sigma"), network.dimension)
    has_spatial = network.spatial_dimension > 0 and "mu_s" in arrays
    spatial = _gaussian(path, arrays, ("mu_s", "sigma_s"), network.spatial_dimension)[0] if has_spatial else None
    rows = arrays.get("rows")
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != network.dimension or not np.isfinite(rows).all()):
        raise UserError(
            f"reference {path!r}: rows have shape {rows.shape}, expected (K, {network.dimension}) and finite"
        )
    provenance, warnings = _provenance(path, arrays, network)
    if "reference_images" not in provenance and rank < network.dimension:
        warnings.append(f"sigma of {path} has rank {rank} of {network.dimension}: too few images")
    images = NpzImages(path) if arrays["has_images"] else None
    if images is not None:
        side = images.identity["resolution"]
        provenance |= {"reference_pictures": images.count, "reference_resolution": side}
    picks = arrays["picks"].astype(int).tolist() if "picks" in arrays else None
    return Reference(pooled, spatial, rows, provenance, warnings, images, picks)


def write_reference(
    path: Path, pooled: Gaussian, spatial: Gaussian | None, rows: Floats, picks: list[int], provenance: dict[str, Any]
) -> None:
    """Writes our layout, provenance included, atomically."""
    arrays: dict[str, Any] = {"mu": pooled.mean, "sigma": pooled.covariance, "rows": rows, "picks": np.array(picks)}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays["provenance"] = np.array(json.dumps(provenance))
    write_npz(path, arrays)


def _load(path: str) -> dict[str, Any]:
    """All arrays except the images, under the names without ref_."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name.removeprefix("ref_"): file[name] for name in file.files if name not in ("arr_0", "arr_1")}
            arrays["has_images"] = "arr_0" in file.files
    except Exception as error:  # zipfile alone raises eight exception types for damaged bytes
        raise UserError(
            f"cannot read reference statistics {path!r}: {error}; expected an .npz with mu and sigma (or ref_mu and "
            "ref_sigma), as written by tools/reference_stats.py"
        ) from None
    if "mu" not in arrays or "sigma" not in arrays:
        raise UserError(
            f"reference {path!r} has no mu and sigma (or ref_mu and ref_sigma); tools/reference_stats.py writes them"
        )
    return arrays


def _gaussian(path: str, arrays: dict[str, Any], names: tuple[str, str], d: int) -> tuple[Gaussian, int]:
    """The Gaussian, and the rank of its covariance."""
    try:
        mean, covariance = (np.asarray(arrays[name], np.float64) for name in names)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"reference {path!r}: {names} are not numeric ({error})") from None
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise UserError(
            f"reference {path!r}: {names[0]} and {names[1]} have shapes {mean.shape}, {covariance.shape}; these "
            f"features need ({d},), ({d}, {d})"
        )
    try:
        rank = _checked_rank(mean, covariance)
    except ValueError as error:
        raise UserError(f"reference {path!r}: {error}; recreate the file") from None
    return Gaussian(mean, (covariance + covariance.T) / 2), rank


def _checked_rank(mean: Array, covariance: Array) -> int:
    """Rank of the covariance. Raises ValueError if these are not a mean and a covariance."""
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("its values are not finite")
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ValueError("sigma is not symmetric")
    values = linalg.eigvalsh(covariance)
    if values[0] < -1e-6 * max(values[-1], 0.0):
        raise ValueError(f"sigma has the negative eigenvalue {values[0]:.3g}, its largest is {values[-1]:.3g}")
    return int((positive(values) > 0).sum())


def _provenance(path: str, arrays: dict[str, Any], network: FeatureNetwork) -> tuple[dict[str, Any], list[str]]:
    sha256 = sha256_of(path)
    provenance: dict[str, Any] = {"reference": path, "reference_sha256": sha256}
    if "provenance" in arrays:
        try:
            made = json.loads(str(arrays["provenance"]))
            features, features_sha256 = made["features"], made["features_sha256"]
            provenance["reference_images"] = made["count"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"reference {path!r}: its provenance cannot be read ({error}); recreate it") from None
        if features_sha256 != network.sha256:
            raise UserError(
                f"reference {path!r} has features {features!r} with weights {features_sha256[:12]}, expected "
                f"{network.name!r} with {network.sha256[:12]}; recreate it with tools/reference_stats.py"
            )
        return {**provenance, "reference_made": made}, []
    if sha256 in KNOWN:
        provenance["reference_known_as"] = KNOWN[sha256]
    if not network.is_inception:
        return provenance, [f"{path} does not record its features; they must be those of {network.name}"]
    return provenance, []

"""Measures a set of images, generated or on disk, against real ones, and records exactly how."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mf_dist.distributed import Ranks
from mf_dist.evaluation.blocks import BLOCK, Blocks, compute_blocks, device_name
from mf_dist.evaluation.features import FeatureNetwork
from mf_dist.evaluation.metrics import Values, choose, gaussians, measure_blocks
from mf_dist.evaluation.reference import ROWS, Reference, read_reference
from mf_dist.evaluation.sources import NpzImages, Source, open_source
from mf_dist.origin import surroundings
from mf_dist.precision import one_thread

PACKAGES = ("torch-fidelity", "torchvision", "scipy", "pillow")


@dataclass(frozen=True)
class Settings:
    """How to measure, for all sets of images of a command."""

    kinds: tuple[str, ...] | None = None
    """Of metrics.KINDS; None: all that can be measured."""
    exact: bool = True
    """The same bits for any number of processes; else each sums up its share, the same to 1e-9."""
    block: int = BLOCK
    resume: bool = True


@dataclass(frozen=True)
class Measured:
    """A metrics.json entry, on rank 0 (else empty), and the blocks behind it."""

    entry: dict[str, Any]
    blocks: Blocks


def open_reference(
    source: str, network: FeatureNetwork, resolution: int | None, settings: Settings, ranks: Ranks, work: Path,
    are_images: bool = False,
) -> Reference | None:  # fmt: skip
    """From a statistics file, or from real images: a folder, tar or .npz, whose features all ranks compute. On rank 0;
    None on the others. are_images: an .npz that holds both counts as images."""
    if not are_images and source.endswith(".npz") and has_statistics(source):
        return _from_statistics(source, network, settings, ranks, work)
    images = open_source(source, network.resolution or resolution)
    return _from_images(images, network, settings, ranks, work)


def has_statistics(path: str) -> bool:
    """Whether an .npz holds a mean; True too for what cannot be read, which read_reference then explains."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "mu" in file.files or "ref_mu" in file.files or "arr_0" not in file.files
    except Exception:
        return True


def _from_statistics(
    source: str, network: FeatureNetwork, settings: Settings, ranks: Ranks, work: Path
) -> Reference | None:
    """ADM's files hold images for precision and recall: their features are computed where they are asked for."""
    reference = read_reference(source, network)
    wants_rows = settings.kinds is None or {"pr", "kid"} & {*settings.kinds}
    with np.load(source, allow_pickle=False) as file:
        has_images = "arr_0" in file.files
    if not (has_images and wants_rows and reference.rows is None):
        return reference if ranks.is_first else None
    images = NpzImages(source)
    blocks = compute_blocks(images, network, ranks, work, "reference", settings.block, settings.resume)
    if not ranks.is_first:
        return None
    return replace(reference, rows=blocks.rows("pooled"), pictures=images, blocks=blocks)


def _from_images(
    images: Source, network: FeatureNetwork, settings: Settings, ranks: Ranks, work: Path
) -> Reference | None:
    blocks = compute_blocks(images, network, ranks, work, "reference", settings.block, settings.resume)
    if not ranks.is_first:
        return None
    with threadpool_limits(1):
        pooled, spatial = gaussians(blocks, network, ranks, exact=True)
    assert pooled is not None
    picks = pick(images.count)
    provenance = {
        "reference": images.identity["images"], "reference_sha256": blocks.pixels_sha256,
        "reference_images": images.count, "reference_resolution": images.identity["resolution"],
    }  # fmt: skip
    return Reference(pooled, spatial, blocks.picked("pooled", picks), provenance, [], images, picks, blocks)


def pick(count: int) -> list[int]:
    """At most ROWS of `count` images, evenly spaced."""
    return [i * count // min(count, ROWS) for i in range(min(count, ROWS))]


def measure(
    source: Source, name: str, network: FeatureNetwork, reference: Reference | None, settings: Settings,
    protocol: Mapping[str, Any], ranks: Ranks, work: Path, keep_pixels: bool = False,
) -> Measured:  # fmt: skip
    """All images of `source` against the reference; `protocol` says what they are. All ranks call it."""
    start = time.perf_counter()
    kinds = choose(settings.kinds, network, reference, source.count) if reference is not None else ()
    blocks = compute_blocks(source, network, ranks, work, name, settings.block, settings.resume, keep_pixels)
    middle = time.perf_counter()
    with threadpool_limits(1 if settings.exact else None), one_thread(ranks.device):
        found = gaussians(blocks, network, ranks, settings.exact)
        if reference is None or found[0] is None:
            return Measured({}, blocks)
        end = time.perf_counter()
        values = measure_blocks(blocks, kinds, network, reference, (found[0], found[1]), ranks.device)
    values.seconds = {**blocks.seconds, "statistics": end - middle, **values.seconds}
    values.seconds["all"] = time.perf_counter() - start
    return Measured(_entry(values, source, blocks, network, reference, settings, protocol, ranks), blocks)


def _entry(
    values: Values, source: Source, blocks: Blocks, network: FeatureNetwork, reference: Reference, settings: Settings,
    protocol: Mapping[str, Any], ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    return {
        "metrics": values.numbers,
        **protocol,
        "num_samples": blocks.count,
        "resolution": source.identity["resolution"],
        "features": network.name,
        "features_sha256": network.sha256,
        "resize": network.resize,
        **reference.provenance,
        "statistics": "exact" if settings.exact else "streaming",
        "block": settings.block,
        **values.settings,
        "pixels_sha256": blocks.pixels_sha256,
        "versions": {**surroundings(ranks.world_size), **{package: version(package) for package in PACKAGES}},
        "device": device_name(ranks.device),
        "ranks": ranks.world_size,
        "seconds": {stage: round(seconds, 3) for stage, seconds in values.seconds.items()},
        "warnings": [*reference.warnings, *warnings_of(source, blocks, network, reference, protocol)],
    }


def warnings_of(
    source: Source, blocks: Blocks, network: FeatureNetwork, reference: Reference, protocol: Mapping[str, Any]
) -> list[str]:
    """What makes the numbers no match for published ones, or for those of the reference's own protocol."""
    found, count, side = [], blocks.count, source.identity["resolution"]
    if count <= network.dimension:
        found.append(f"{count} images are too few for {network.dimension} features: the distance is biased upwards")
    if network.is_inception and count != 50_000:
        found.append(f"published FIDs are of 50,000 images, this is of {count}: the fewer, the higher")
    made = reference.provenance.get("reference_made", {})
    theirs = reference.provenance.get("reference_resolution", made.get("resolution", side))
    if theirs != side:
        found.append(f"the reference has images of side {theirs}, these have {side}")
    if made and made["resize"] != network.resize:
        found.append(f"the reference was resized by {made['resize']}, these by {network.resize}")
    if network.is_inception and protocol.get("labels") == "balanced":
        found.append("labels are balanced; most published FIDs draw them at random")
    return found

"""Measures a set of images, generated or on disk, against real ones, and records the protocol."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mf_dist.evaluation.blocks import BLOCK, Blocks, compute_blocks, device_name
from mf_dist.evaluation.feature_network import FeatureNetwork
from mf_dist.evaluation.metrics import Values, choose_kinds, gaussians, measure_blocks
from mf_dist.evaluation.protocols import ADM, EvaluationProtocol
from mf_dist.evaluation.reference import ROWS, Reference, read_reference
from mf_dist.evaluation.sources import ImageFiles, NpzImages, Source, open_source
from mf_dist.runtime.distributed import Ranks, raise_on_all_ranks
from mf_dist.runtime.environment import environment
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import single_cpu_thread

PACKAGES = ("torch-fidelity", "torchvision", "scipy", "pillow")


@dataclass(frozen=True)
class Settings:
    """Measurement settings, the same for all sets of images of a command."""

    kinds: tuple[str, ...] | None = None
    """Some of metrics.KINDS; None: all that can be measured."""
    exact: bool = True
    """True: the same bits for any number of processes. False: each process sums its share, the same result to 1e-9."""
    block: int = BLOCK
    resume: bool = True
    with_band: bool = True
    """Whether the Frechet distance gets its 95 % band, which takes 20 more distances."""
    protocol: EvaluationProtocol = ADM
    is_named: bool = False
    """Whether the protocol was asked for, so that numbers of any features are warned of."""


@dataclass(frozen=True)
class Measured:
    """A metrics.json entry, on rank 0 (else empty), and the blocks it was computed from."""

    entry: dict[str, Any]
    blocks: Blocks


def open_reference(
    source: str,
    network: FeatureNetwork,
    resolution: int | None,
    settings: Settings,
    ranks: Ranks,
    work: Path,
    are_images: bool = False,
    outputs: Sequence[Path] = (),
) -> Reference | None:
    """The reference from a statistics file, or from real images (folder, tar or .npz), whose features all ranks
    compute. None on ranks other than 0. are_images: an .npz that holds both is read as images. outputs: what the caller
    will write besides `work`; none may lie in the reference."""
    if not are_images and source.endswith(".npz") and has_statistics(source):
        return _from_statistics(source, network, settings, ranks, work)
    with raise_on_all_ranks(ranks):
        images = images_for(network, source, resolution, ranks, [work, *outputs])
    return _from_images(images, network, settings, ranks, work)


def images_for(
    network: FeatureNetwork, source: str, resolution: int | None, ranks: Ranks, outputs: Sequence[Path]
) -> Source:
    """A set of images cropped to the network's input side, else to `resolution`; rank 0 verifies the checksums of an
    .npz. Raises UserError if both sides are given and differ, or if one of `outputs` lies in the source."""
    if None not in (resolution, network.resolution) and resolution != network.resolution:
        raise UserError(f"features {network.name!r} take images of side {network.resolution}, not {resolution}")
    images = open_source(source, network.resolution or resolution, outputs)
    if isinstance(images, NpzImages) and ranks.is_rank_zero:
        images.check()
    if isinstance(images, ImageFiles) and images.files.ignored and ranks.is_rank_zero:
        print(f"{source}: {images.count} images{images.files.ignored}", flush=True)
    return images


def has_statistics(path: str) -> bool:
    """Whether an .npz holds a mean; also True for an unreadable file, which read_reference then reports."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "mu" in file.files or "ref_mu" in file.files or "arr_0" not in file.files
    except Exception:
        return True


def _from_statistics(
    source: str, network: FeatureNetwork, settings: Settings, ranks: Ranks, work: Path
) -> Reference | None:
    """ADM's files hold images for precision and recall; their features are computed if a metric needs them."""
    with raise_on_all_ranks(ranks):
        reference = read_reference(source, network)
        wants_rows = settings.kinds is None or {"pr", "kid"} & {*settings.kinds}
        images = reference.images if wants_rows and reference.rows is None else None
        if isinstance(images, NpzImages) and ranks.is_rank_zero:
            images.check()
    if images is None:
        return reference if ranks.is_rank_zero else None
    blocks = compute_blocks(images, network, ranks, work, "reference", settings.block, settings.resume)
    return replace(reference, rows=blocks.rows("pooled"), blocks=blocks) if ranks.is_rank_zero else None


def _from_images(
    images: Source, network: FeatureNetwork, settings: Settings, ranks: Ranks, work: Path
) -> Reference | None:
    blocks = compute_blocks(images, network, ranks, work, "reference", settings.block, settings.resume)
    with threadpool_limits(1):
        pooled, spatial = gaussians(blocks, network, ranks, exact=True)
    if pooled is None:
        return None
    picks = pick(images.count)
    provenance = {
        "reference": images.identity["images"],
        "reference_sha256": blocks.pixels_sha256,
        "reference_images": images.count,
        "reference_resolution": images.identity["resolution"],
    }
    return Reference(pooled, spatial, blocks.select("pooled", picks), provenance, [], images, picks, blocks)


def pick(count: int) -> list[int]:
    """At most ROWS of `count` images, evenly spaced."""
    return [i * count // min(count, ROWS) for i in range(min(count, ROWS))]


def measure(
    source: Source,
    name: str,
    network: FeatureNetwork,
    reference: Reference | None,
    settings: Settings,
    protocol: Mapping[str, Any],
    ranks: Ranks,
    work: Path,
    keep_pixels: bool = False,
) -> Measured:
    """Measures all images of `source` against the reference; every rank calls it. `protocol`: how the images were made,
    copied into the entry."""
    start, values = time.perf_counter(), Values()
    with raise_on_all_ranks(ranks):
        kinds = choose_kinds(settings.kinds, network, reference, source.count) if reference is not None else ()
    blocks = compute_blocks(source, network, ranks, work, name, settings.block, settings.resume, keep_pixels)
    features_end = time.perf_counter()
    with threadpool_limits(1 if settings.exact else None), single_cpu_thread(ranks.device):
        pooled, spatial = gaussians(blocks, network, ranks, settings.exact)
        values.seconds["statistics"] = time.perf_counter() - features_end
        with raise_on_all_ranks(ranks):
            if reference is None or pooled is None:
                return Measured({}, blocks)
            cycle = source.cycle if settings.with_band else None
            measure_blocks(values, blocks, kinds, network, reference, (pooled, spatial), ranks.device, cycle)
            values.seconds = {**blocks.seconds, **values.seconds, "this_try": time.perf_counter() - start}
            return Measured(_entry(values, source, blocks, network, reference, settings, protocol, ranks), blocks)


def protocol_of(
    source: Source, made: Mapping[str, Any], network: FeatureNetwork, reference: Reference, settings: Settings
) -> dict[str, Any]:
    """The part of an entry that is known before its images are. made: how they are made."""
    return {
        **made,
        "protocol": settings.protocol.name,
        "num_samples": source.count,
        "resolution": source.identity["resolution"],
        "features": network.name,
        "features_sha256": network.sha256,
        "resize": network.resize,
        **reference.provenance,
        "statistics": "exact" if settings.exact else "streaming",
        "block": settings.block,
    }


def _entry(
    values: Values,
    source: Source,
    blocks: Blocks,
    network: FeatureNetwork,
    reference: Reference,
    settings: Settings,
    protocol: Mapping[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    return {
        "metrics": values.numbers,
        "plus_minus_95": values.plus_minus,
        **protocol_of(source, protocol, network, reference, settings),
        **values.settings,
        "pixels_sha256": blocks.pixels_sha256,
        **computed_by(ranks),
        "seconds": {stage: round(seconds, 3) for stage, seconds in values.seconds.items()},
        "warnings": warnings_of(
            *(blocks.count, source.identity["resolution"], network, reference, protocol.get("labels")), settings
        ),
    }


def computed_by(ranks: Ranks) -> dict[str, Any]:
    """The part of an entry that says what computed it."""
    packages = {package: version(package) for package in PACKAGES}
    return {
        "versions": {**environment(ranks.world_size), **packages},
        "device": device_name(ranks.device),
        "ranks": ranks.world_size,
    }


def warnings_of(
    count: int,
    side: int,
    network: FeatureNetwork,
    reference: Reference,
    labels: str | None,
    settings: Settings,
) -> list[str]:
    """Reasons why metrics of `count` images of side `side` are not those of the protocol, or not comparable with the
    reference. labels: how the labels of a model's samples were drawn; None for images from files."""
    warnings = [*reference.warnings]
    real = reference.provenance.get("reference_images", network.dimension + 1)
    for images, owner in ((count, ""), (real, "the reference's ")):
        if images <= network.dimension:
            warnings.append(
                f"{owner}{images} images are too few for {network.dimension} features: the distance is biased upwards"
            )
    protocol = settings.protocol
    if settings.is_named or network.is_published:
        warnings += [*protocol.overridden(count, labels), *protocol.overridden_seeds(1)]
    if settings.is_named and labels is None:
        warnings.append(protocol.unknown_of_files)
    if network.is_inception or (network.is_published and protocol.has_dinov2):
        warnings += protocol.overridden_reference(reference.provenance)
    reference_made = reference.provenance.get("reference_made", {})
    reference_side = reference.provenance.get("reference_resolution", reference_made.get("resolution", side))
    if reference_side != side:
        warnings.append(f"the reference has images of side {reference_side}, these have {side}")
    if reference_made.get("resize", network.resize) != network.resize:
        warnings.append(f"the reference was resized by {reference_made['resize']}, these by {network.resize}")
    return warnings

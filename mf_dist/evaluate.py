"""Measures a set of images, generated or on disk, against real ones, and records exactly how."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mf_dist.data.images import Pixels, list_images, load_image
from mf_dist.durable import write_json
from mf_dist.errors import UserError
from mf_dist.features import FeatureNetwork
from mf_dist.generate import BLOCK, Trained
from mf_dist.metrics import FeatureStatistics, Gaussian, frechet_distance, read_statistics
from mf_dist.origin import versions
from mf_dist.progress import progress

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """The real images' Gaussian, and where it came from."""

    gaussian: Gaussian
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A metrics.json entry, and, if they were kept, the images behind it: (N, R, R, 3) uint8, labels (N,)."""

    entry: dict[str, Any]
    pixels: Pixels | None
    labels: Labels | None


def load_reference(source: str, features: FeatureNetwork) -> Reference:
    """From a folder of images, or an .npz with mu and sigma of these features."""
    if source.endswith(".npz"):
        return Reference(read_statistics(Path(source), features.network.feature_dimension), {"reference": source})
    statistics = FeatureStatistics()
    for pixels, _ in folder_blocks(source, features.resolution):
        statistics.add(features(torch.from_numpy(pixels)).numpy())
    return Reference(statistics.gaussian(), {"reference": source, "reference_images": statistics.count})


def folder_blocks(folder: str | Path, resolution: int) -> Iterator[tuple[Pixels, Labels]]:
    """All images of a folder, cropped: (B, 3, R, R) uint8 and labels (B,), BLOCK at a time."""
    images = list_images(folder)
    for first in range(0, len(images.paths), BLOCK):
        paths = images.paths[first : first + BLOCK]
        labels = np.array(images.labels[first : first + BLOCK], np.int64)
        yield np.stack([load_image(images.root / path, resolution) for path in paths]), labels


def measure(
    blocks: Iterable[tuple[Pixels, Labels]], count: int, features: FeatureNetwork, reference: Reference,
    protocol: dict[str, Any], keep_pixels: bool = False,
) -> Measured:  # fmt: skip
    """The Frechet distance of `count` images in `blocks`; `protocol` says what they are."""
    statistics = FeatureStatistics()
    pixels, labels = None, np.zeros(count, np.int64)
    start = time.perf_counter()
    with progress(count, "img", "sample and measure") as bar:
        for block, block_labels in blocks:
            rows = features(torch.from_numpy(block)).numpy()
            if not np.isfinite(rows).all():
                raise UserError(f"features of images near number {statistics.count} are not finite: the model diverged")
            if keep_pixels:
                if pixels is None:
                    pixels = np.empty((count, *block.shape[2:], 3), np.uint8)
                pixels[statistics.count : statistics.count + len(block)] = block.transpose(0, 2, 3, 1)
                labels[statistics.count : statistics.count + len(block)] = block_labels
            statistics.add(rows)
            bar.update(len(block))
    if count <= features.network.feature_dimension:
        print(f"warning: {count} images are too few for {features.network.feature_dimension} features")
    entry = {
        "metric": f"fd_{features.name}",
        **protocol,
        "num_samples": statistics.count,
        "features_sha256": features.sha256,
        **reference.provenance,
        "reference_sha256": reference.gaussian.sha256,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "value": frechet_distance(statistics.gaussian(), reference.gaussian),
        "seconds": time.perf_counter() - start,
    }
    return Measured(entry, pixels, labels if keep_pixels else None)


def measure_samples(
    trained: Trained, nfe: int, count: int, labels: str, seed: int, features: FeatureNetwork, reference: Reference,
    keep_pixels: bool,
) -> Measured:  # fmt: skip
    """`count` EMA samples in `nfe` network calls each, against the reference."""
    protocol = {
        "nfe": nfe,
        "sampler": "euler" if trained.generator.is_flow else "meanflow",
        "labels": labels,
        "seed": seed,
        "ema": trained.ema_decay,
        "checkpoint": str(trained.checkpoint.folder),
        "checkpoint_sha256": trained.checkpoint.sha256,
        "step": trained.checkpoint.step,
        "vae_sha256": trained.generator.vae.sha256,
    }
    blocks = trained.generator.blocks(count, nfe, labels, seed)
    return measure(blocks, count, features, reference, protocol, keep_pixels)


def record(entry: dict[str, Any], out: Path) -> Path:
    """Adds the entry to out/metrics.json; only one of the very same protocol and checkpoint is replaced."""
    path = out / "metrics.json"
    out.mkdir(parents=True, exist_ok=True)
    results = {"value", "seconds", "versions", "device"}

    def protocol(e: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in e.items() if key not in results}

    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        kept = [old for old in entries if protocol(old) != protocol(entry)]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run again") from None
    write_json(path, [*kept, entry])
    return path


def save_npz(measured: Measured, path: Path) -> None:
    """ADM's layout: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels."""
    assert measured.pixels is not None and measured.labels is not None
    np.savez(path, measured.pixels, measured.labels)

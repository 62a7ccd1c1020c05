"""The nearest real images of some samples, which reveal whether a model memorised its data."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.distance import cdist

from mf_dist.data.images import image_grid
from mf_dist.evaluation.blocks import Blocks
from mf_dist.evaluation.reference import Reference
from mf_dist.evaluation.sources import Source
from mf_dist.evaluation.statistics import Rows

SAMPLES, NEIGHBOURS = 10, 7


def nearest_rows(pooled: Rows, real: Rows, count: int) -> tuple[Rows, Rows]:
    """Indices (N, count) of the nearest rows of real (K, D) to each of pooled (N, D), nearest first, and their
    Euclidean distances."""
    distances = cdist(pooled, real)
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(distances, order, axis=1)


def save_neighbours(source: Source, blocks: Blocks, reference: Reference, path: Path) -> str | None:
    """Draws a row for each of the first samples of `source`, whose features are `blocks`: the sample, then, after a
    gap, the nearest real images in feature space. The label is the distance to the nearest, divided by the median
    distance from these nearest images to another real one. Returns None, or the reason why nothing was drawn."""
    if reference.images is None:
        return "the reference has statistics but no images; it needs --reference FOLDER (or .tar, .npz) of images"
    if reference.rows is None:
        return "the features of the reference's images were not computed; it needs pr or kid in --metrics"
    if len(reference.rows) < NEIGHBOURS + 1:
        return f"the reference has only {len(reference.rows)} images; it needs at least {NEIGHBOURS + 1}"
    pixels = source.read(0, blocks.block)[0][:SAMPLES]
    if reference.real_image(0).shape != pixels.shape[1:]:
        return f"the reference's images have side {reference.real_image(0).shape[1]}, not {pixels.shape[2]}"
    order, distances = nearest_rows(next(blocks.parts("pooled"))[:SAMPLES], reference.rows, NEIGHBOURS)
    _, among_real = nearest_rows(reference.rows[order[:, 0]], reference.rows, 2)
    typical = max(float(np.median(among_real[:, 1])), 1e-30)
    labels = [f"distance {distance / typical:.2f}" for distance in distances[:, 0]]
    left = image_grid(pixels, labels, ["sample"])
    nearest = np.stack([reference.real_image(number) for number in order.ravel()])
    right = image_grid(nearest, [""] * len(labels), ["real images, nearest first"])
    canvas = Image.new("RGB", (left.width + right.width, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return None

"""All randomness, as a pure function of (seed, purpose, index): counter-based Philox, no state, O(1) seeking."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Purpose(IntEnum):
    """Separates the streams of one seed. The values determine every run's numbers: never renumber."""

    ORDER = 0
    TRAIN = 1
    SAMPLE = 2


def generator(seed: int, purpose: Purpose, index: int = 0) -> np.random.Generator:
    """The generator of one index: 2^64 indices, each with 2^64 blocks of its own."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, index, 0, 0]))


def order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int32]:
    """The permutation of `count` images in one epoch; every loader process holds one."""
    return generator(seed, Purpose.ORDER, epoch).permutation(count).astype(np.int32)


def train_draws(seed: int, slot: int, draws: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Any], bool]:
    """The random numbers of the training row in global slot `slot`, by name in the given order, from (law, shape) of
    each, fp32; and whether to mirror the image. A law is normal, N(0, 1), or uniform, U[0, 1)."""
    g = generator(seed, Purpose.TRAIN, slot)
    drawn = {
        name: g.standard_normal(shape, dtype=np.float32) if law == "normal" else g.random(shape, dtype=np.float32)
        for name, (law, shape) in draws.items()
    }
    return drawn, bool(g.random() < 0.5)


def sample_draw(
    seed: int, index: int, shape: tuple[int, int, int], num_classes: int, count: int = 1
) -> tuple[Floats, int]:
    """Noises (count, *shape) and uniformly random label of generated sample `index` (label 0 without classes). The
    first noises do not depend on their count."""
    g = generator(seed, Purpose.SAMPLE, index)
    label = int(g.integers(max(1, num_classes)))
    return g.standard_normal((count, *shape), dtype=np.float32), label

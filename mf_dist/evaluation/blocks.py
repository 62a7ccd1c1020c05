"""Features of a set of images in blocks of files, made by any number of processes, resumable after any fault.

    WORK/NAME-HASH/plan.json          everything that determines the features; HASH is its hash
    WORK/NAME-HASH/block-00000.npz    pooled, spatial, logits, labels, the pixels' sha256, the seconds of each stage,
                                      optionally the pixels

Block k holds images [k B, (k + 1) B) and is complete or absent. It is always computed at full size, so the bits of an
image depend neither on the number of images requested, nor on the number of processes, nor on blocks already present.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import mf_dist
from mf_dist.data.images import Pixels
from mf_dist.evaluation.feature_network import FeatureNetwork
from mf_dist.evaluation.sources import Source
from mf_dist.fault_tolerance.tool_status import count_finished_unit
from mf_dist.runtime.atomic_files import write_json, write_npz
from mf_dist.runtime.distributed import Ranks, raise_on_all_ranks
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import single_cpu_thread
from mf_dist.runtime.progress import progress

BLOCK = 50
"""Default number of images in a block. Part of the protocol: the batch size can change the last bits."""
BLOCKS_PER_CHECK = 20
"""Blocks per rank between two checks whether any rank has failed, for instance on a damaged image."""
FEATURE_PACKAGES = ("torch", "torchvision", "torch-fidelity", "diffusers", "pillow")
"""Packages that determine the features' bits; blocks computed with other versions are not reused."""
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Blocks:
    """A finished set of blocks, read in the order of the images."""

    folder: Path
    count: int
    block: int

    def parts(self, name: str, numbers: range | None = None) -> Iterator[npt.NDArray[Any]]:
        """One array, block by block; `numbers`: the blocks to read, None: all."""
        for number in range(number_of_blocks(self.count, self.block)) if numbers is None else numbers:
            yield read_block(self.folder, number, [name])[name]

    def rows(self, name: str) -> npt.NDArray[Any]:
        """One array of all images, in order."""
        return np.concatenate(list(self.parts(name)))

    def select(self, name: str, images: list[int]) -> npt.NDArray[Any]:
        """One array of some images, given in ascending order; the others are not kept in memory."""
        indices, rows = np.array(images), []
        for number, part in enumerate(self.parts(name)):
            first = number * self.block
            rows.append(part[indices[(indices >= first) & (indices < first + len(part))] - first])
        return np.concatenate(rows)

    @property
    def pixels_sha256(self) -> str:
        """Hash of the blocks' pixel hashes: equal for equal images at the same block size."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.parts("pixels_sha256"))).hexdigest()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, summed over all ranks and attempts: the time that a single rank would have taken."""
        total: Counter[str] = Counter()
        for part in self.parts("seconds"):
            total.update(json.loads(str(part)))
        return dict(total)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class RepeatableParts:
    """One array block by block, as an iterable that can be iterated repeatedly."""

    def __init__(self, blocks: Blocks, name: str) -> None:
        self._blocks, self._name = blocks, name

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return self._blocks.parts(self._name)


def compute_blocks(
    source: Source,
    network: FeatureNetwork,
    ranks: Ranks,
    work: Path,
    name: str,
    block: int = BLOCK,
    resume: bool = True,
    keep_pixels: bool = False,
) -> Blocks:
    """Computes the features of all images of `source` on all ranks. Blocks of an earlier attempt with the same plan are
    reused unless resume is False."""
    plan = {
        **source.identity,
        "count": source.count,
        "block": block,
        "keep_pixels": keep_pixels,
        "features": network.name,
        "features_sha256": network.sha256,
        "device": device_name(ranks.device),
        "versions": {package: version(package) for package in FEATURE_PACKAGES} | {"mf_dist": mf_dist.__version__},
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
    folder = work / f"{name}-{digest}"
    with raise_on_all_ranks(ranks):
        if ranks.is_rank_zero:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "plan.json", plan)
    total = number_of_blocks(source.count, block)
    own_blocks = range(ranks.rank, total, ranks.world_size)
    with raise_on_all_ranks(ranks):
        missing = {number for number in own_blocks if not _is_complete(folder, number)}
    with single_cpu_thread(ranks.device), progress(source.count, "img", f"{name} on rank 0", ranks.is_rank_zero) as bar:
        bar.update(min(source.count, (len(own_blocks) - len(missing)) * block * ranks.world_size))
        for begin in range(0, total, BLOCKS_PER_CHECK * ranks.world_size):
            with raise_on_all_ranks(ranks):
                for number in sorted(missing & {*range(begin, begin + BLOCKS_PER_CHECK * ranks.world_size)}):
                    first, last = number * block, min((number + 1) * block, source.count)
                    write_npz(_path(folder, number), _compute(source, network, first, last, block, keep_pixels))
                    count_finished_unit()
                    bar.update(min(source.count - bar.n, (last - first) * ranks.world_size))
    return Blocks(folder, source.count, block)


def _compute(source: Source, network: FeatureNetwork, first: int, last: int, block: int, keep: bool) -> Arrays:
    seconds_before, start = dict(source.seconds), time.perf_counter()
    pixels, labels = source.read(first, first + block)
    read_end = time.perf_counter()
    features = network(_padded(pixels, block))
    seconds = {"images": read_end - start, "features": time.perf_counter() - read_end}
    seconds |= {stage: taken - seconds_before.get(stage, 0.0) for stage, taken in source.seconds.items()}
    count = last - first
    arrays: Arrays = {key: value[:count] for key, value in features._asdict().items()}
    digest = hashlib.sha256(np.ascontiguousarray(pixels[:count]).tobytes()).digest()
    arrays |= {"labels": labels[:count], "pixels_sha256": np.frombuffer(digest, np.uint8)}
    arrays["seconds"] = np.array(json.dumps(seconds))
    return arrays | ({"pixels": pixels[:count]} if keep else {})


def _padded(pixels: Pixels, block: int) -> Pixels:
    """`pixels`, padded to a whole block with copies of the last image."""
    missing = block - len(pixels)
    return np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]) if missing else pixels


def number_of_blocks(count: int, block: int) -> int:
    return -(-count // block)


def read_block(folder: Path, number: int, names: list[str] | None = None) -> Arrays:
    """The arrays `names` of a block, None: all. Raises UserError if one is damaged: the file has a checksum of each."""
    path = _path(folder, number)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (file.files if names is None else names)}
    except Exception as error:  # zipfile alone raises eight exception types for damaged bytes
        raise UserError(f"{path} is damaged or missing ({error}); run the same command again") from None


def _is_complete(folder: Path, number: int) -> bool:
    """Whether the block is on disk and undamaged; a damaged one is deleted."""
    if not _path(folder, number).is_file():
        return False
    try:
        read_block(folder, number)
    except UserError:
        os.unlink(_path(folder, number))
        return False
    return True


def _path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.npz"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"

"""Features of a set of images in blocks of files, made by any number of processes, resumable after any fault.

    WORK/NAME-HASH/plan.json          everything that decides the features; HASH is of it
    WORK/NAME-HASH/block-00000.npz    pooled, spatial, logits, labels, the pixels' sha256, the seconds that each stage
                                      took, pixels if they are kept

Block k holds images [k B, (k + 1) B) and is complete or absent. It is always computed whole, so that the bits of an
image do not depend on how many were asked for, on how many processes worked, or on what was already there.
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

from mf_dist.data.images import Pixels
from mf_dist.evaluation.feature_network import FeatureNetwork
from mf_dist.evaluation.sources import Source
from mf_dist.fault_tolerance.tool_status import count_finished_unit
from mf_dist.runtime.atomic_files import write_json, write_npz
from mf_dist.runtime.distributed import Ranks, raise_on_all_ranks
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import one_thread
from mf_dist.runtime.progress import progress

BLOCK = 50
"""Images computed together, unless asked otherwise. Part of the protocol: a batch's size can change the last bits."""
ROUND = 20
"""Blocks of a rank after which all ask whether one has found a mistake, such as a damaged image."""
COMPUTING = ("torch", "torchvision", "torch-fidelity", "diffusers", "pillow", "mf_dist")
"""Packages that decide the features' bits; blocks made with other versions are not taken over."""
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Blocks:
    """A finished set of blocks, read in the order of the images."""

    folder: Path
    count: int
    block: int

    def parts(self, name: str, wanted: range | None = None) -> Iterator[npt.NDArray[Any]]:
        """One array block by block; `wanted`: the numbers of the blocks."""
        for number in range(number_of_blocks(self.count, self.block)) if wanted is None else wanted:
            yield read_block(self.folder, number, [name])[name]

    def rows(self, name: str) -> npt.NDArray[Any]:
        """One array of all images, in order."""
        return np.concatenate(list(self.parts(name)))

    def picked(self, name: str, images: list[int]) -> npt.NDArray[Any]:
        """One array of some images, in ascending order; the others are not held."""
        chosen, found = np.array(images), []
        for number, part in enumerate(self.parts(name)):
            first = number * self.block
            found.append(part[chosen[(chosen >= first) & (chosen < first + len(part))] - first])
        return np.concatenate(found)

    @property
    def pixels_sha256(self) -> str:
        """Of the sha256s of all blocks' pixels: equal for equal images."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.parts("pixels_sha256"))).hexdigest()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, of all ranks and of all tries together: what one rank alone would have taken."""
        total: Counter[str] = Counter()
        for part in self.parts("seconds"):
            total.update(json.loads(str(part)))
        return dict(total)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class EachPart:
    """Something to run through twice."""

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
    """Features of all of `source`, by all ranks together. Blocks of an earlier try at the very same are taken over,
    unless resume is False."""
    plan = {
        **source.identity,
        "count": source.count,
        "block": block,
        "keep_pixels": keep_pixels,
        "features": network.name,
        "features_sha256": network.sha256,
        "device": device_name(ranks.device),
        "versions": {package: version(package) for package in COMPUTING},
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
    mine = range(ranks.rank, total, ranks.world_size)
    with raise_on_all_ranks(ranks):
        missing = {number for number in mine if not _is_whole(folder, number)}
    with one_thread(ranks.device), progress(source.count, "img", f"{name} on rank 0", ranks.is_rank_zero) as bar:
        bar.update(min(source.count, (len(mine) - len(missing)) * block * ranks.world_size))
        for begin in range(0, total, ROUND * ranks.world_size):
            with raise_on_all_ranks(ranks):
                for number in sorted(missing & {*range(begin, begin + ROUND * ranks.world_size)}):
                    first, last = number * block, min((number + 1) * block, source.count)
                    write_npz(_path(folder, number), _compute(source, network, first, last, block, keep_pixels))
                    count_finished_unit()
                    bar.update(min(source.count - bar.n, (last - first) * ranks.world_size))
    return Blocks(folder, source.count, block)


def _compute(source: Source, network: FeatureNetwork, first: int, last: int, block: int, keep: bool) -> Arrays:
    before, start = dict(source.seconds), time.perf_counter()
    pixels, labels = source.read(first, first + block)
    middle = time.perf_counter()
    features = network(_padded(pixels, block))
    seconds = {"images": middle - start, "features": time.perf_counter() - middle}
    seconds |= {stage: taken - before.get(stage, 0.0) for stage, taken in source.seconds.items()}
    count = last - first
    arrays: Arrays = {key: value[:count] for key, value in features._asdict().items()}
    digest = hashlib.sha256(np.ascontiguousarray(pixels[:count]).tobytes()).digest()
    arrays |= {"labels": labels[:count], "pixels_sha256": np.frombuffer(digest, np.uint8)}
    arrays["seconds"] = np.array(json.dumps(seconds))
    return arrays | ({"pixels": pixels[:count]} if keep else {})


def _padded(pixels: Pixels, block: int) -> Pixels:
    """To whole blocks, by copies of the last image."""
    missing = block - len(pixels)
    return np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]) if missing else pixels


def number_of_blocks(count: int, block: int) -> int:
    return -(-count // block)


def read_block(folder: Path, number: int, names: list[str] | None = None) -> Arrays:
    """Some of its arrays, or all. UserError where it is damaged: every array has a checksum in the file."""
    path = _path(folder, number)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (file.files if names is None else names)}
    except Exception as error:  # of damaged bytes, zipfile alone raises eight kinds
        raise UserError(f"{path} is damaged or gone ({error}); run the same command again") from None


def _is_whole(folder: Path, number: int) -> bool:
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

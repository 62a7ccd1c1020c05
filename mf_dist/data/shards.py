"""Reads a folder of latent shards: manifest, index, random access.

    manifest.json            count, latent shape, classes, VAE, images, per-channel statistics, shards with sha256
    shard-00000.tar          webdataset: KEY.moments.npy (2C, S, S) fp16 = posterior mean, std; KEY.cls; KEY.json; and
                             KEY.flipped.npy, of the mirrored image, if encoded with --flip
    shard-00000.index.npz    per sample its number in the source list, offset in the tar, label and crc32; the
                             unreadable images; the tar's size and sha256, and the sha256 of its plan

The manifest is written last: a folder without one is not finished. The manifest holds a checksum of itself and the
sha256 of every index; an index holds a checksum of itself and the crc32 of every sample. All are verified on reading,
so that damage never reaches a batch.
"""

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mf_dist.data.staging import is_staged, staged_path
from mf_dist.runtime.atomic_files import sha256_of, write_json
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.open_files import OpenFiles

FORMAT = 3
Moments = npt.NDArray[np.float16]


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.tar"


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.npz")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / "manifest.json", {**manifest, "checksum": _checksum(manifest)})


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished dataset, or None; raises UserError if it is damaged or of another format."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; encode again")
        if manifest["checksum"] != _checksum(manifest):
            raise ValueError("its checksum does not match")
        for key in ("count", "latent_size", "latent_channels", "num_classes", "classes", "flip", "vae"):
            manifest[key]
        for number, shard in enumerate(manifest["shards"]):  # both become parts of paths
            if shard["name"] != shard_name(number) or not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
                raise ValueError(f"shard {number} has an invalid name or hash")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}); remove it and run the encode command again") from None
    return manifest


class Index(NamedTuple):
    """The index of one shard of n samples."""

    plan: str
    """sha256 of the plan that the shard was made by."""
    numbers: npt.NDArray[np.int32]
    """(n,) the images' numbers in the source list, which are the samples' keys."""
    offsets: npt.NDArray[np.int64]
    """(n,) byte offsets of the raw moments in the tar."""
    flipped: npt.NDArray[np.int64]
    """(n,) byte offsets of the mirrored images' moments, or (0,)."""
    labels: npt.NDArray[np.int32]
    crc32: npt.NDArray[np.uint32]
    flipped_crc32: npt.NDArray[np.uint32]
    shape: tuple[int, int, int]
    size: int
    """Bytes of the tar when it was written."""
    sha256: str
    skipped: list[str]
    """A line for each image that could not be read."""


def read_index(tar: Path) -> Index | None:
    """The index beside a shard; None if it is missing or damaged."""
    try:
        with np.load(index_path(tar), allow_pickle=False) as file:
            entries = {name: file[name] for name in file.files}
        if str(entries["checksum"]) != index_checksum(entries):
            return None
        channels, side, _ = (int(n) for n in entries["shape"])
        return Index(
            str(entries["plan"]),
            entries["numbers"],
            entries["offsets"],
            entries["flipped"],
            entries["labels"],
            entries["crc32"],
            entries["flipped_crc32"],
            (channels, side, side),
            int(entries["size"]),
            str(entries["sha256"]),
            [str(line) for line in entries["skipped"]],
        )
    except Exception:  # on damaged bytes zipfile alone raises eight types
        return None


def index_checksum(entries: dict[str, npt.NDArray[Any]]) -> str:
    """sha256 of all columns except the checksum itself."""
    digest = hashlib.sha256()
    for name in sorted(entries.keys() - {"checksum"}):
        column = entries[name]
        digest.update(f"{name} {column.dtype.str} {column.shape}\n".encode() + column.tobytes())
    return digest.hexdigest()


def dataset_sha256(manifest: dict[str, Any]) -> str:
    """Hash of all shards' contents: datasets with equal hashes have equal latents and labels."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


class LatentShards:
    """Images by index in [0, count), in the order of the source list."""

    def __init__(
        self, folder: str | Path, manifest: dict[str, Any] | None = None, stage_dir: str | None = None
    ) -> None:
        """`stage_dir`: folder in which staging.py may put copies of the shards."""
        self.folder, self.stage_dir = Path(folder), Path(stage_dir) if stage_dir else None
        manifest = manifest or read_manifest(folder)
        if manifest is None:
            raise UserError(f"no finished dataset at {str(folder)!r}; run tools/encode_latents.py first")
        self.manifest = manifest
        self.count: int = manifest["count"]
        self.moments_shape = (2 * manifest["latent_channels"], manifest["latent_size"], manifest["latent_size"])
        self._files = OpenFiles()
        self._paths: dict[int, Path] = {}
        self._staged: set[int] = set()
        self._reads = 0
        self._starts = np.cumsum([0, *(shard["count"] for shard in manifest["shards"])])
        self._indices = [self._checked_index(shard) for shard in manifest["shards"]]

    def _checked_index(self, shard: dict[str, Any]) -> Index:
        tar = self.folder / shard["name"]
        index, size = read_index(tar), tar.stat().st_size if tar.is_file() else None
        problem = None
        if size != shard["bytes"]:
            problem = f"{tar} " + ("is missing" if size is None else f"has {size} bytes, not {shard['bytes']}")
        elif index is None or sha256_of(index_path(tar)) != shard["index_sha256"]:
            problem = f"{index_path(tar)} is missing, damaged or of another dataset"
        if problem or index is None:
            raise UserError(f"{problem}; run the encode command again to restore it")
        return index

    def _path(self, number: int) -> Path:
        """Where a shard is read: a staged copy as soon as one exists. Raises UserError if its size is wrong."""
        self._reads += 1
        if self.stage_dir and self._reads % 1000 == 0:  # look for new staged copies
            self._paths = {n: path for n, path in self._paths.items() if n in self._staged}
        if number not in self._paths:
            shard = self.manifest["shards"][number]
            path = self.folder / shard["name"]
            if self.stage_dir and is_staged(staged_path(self.stage_dir, shard), shard):
                path = staged_path(self.stage_dir, shard)
                self._staged.add(number)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}; {self._remedy(number)}") from None
            if size != shard["bytes"]:
                raise UserError(f"{path} has {size} bytes, not {shard['bytes']}; {self._remedy(number)}")
            self._paths[number] = path
        return self._paths[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without what this process has found, since each looks for itself."""
        return {**self.__dict__, "_paths": {}, "_staged": set(), "_reads": 0}

    def __getitem__(self, index: int) -> tuple[Moments, int]:
        """Posterior moments (2C, S, S) fp16, mean then std, unscaled; and the label."""
        moments, labels = self.batch([index], [False])
        return moments[0], int(labels[0])

    def locate(self, index: int) -> tuple[Path, int]:
        """The tar of sample `index`, and its number in the source list, which is its key in the tar."""
        shard, row = self._shard_and_row(index)
        return self.folder / self.manifest["shards"][shard]["name"], int(self._indices[shard].numbers[row])

    def _shard_and_row(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def batch(self, rows: list[int], flipped: list[bool]) -> tuple[Moments, npt.NDArray[np.int64]]:
        """(B, 2C, S, S) fp16 and labels (B,) of images by index; of the mirrored image where `flipped`, which needs a
        dataset encoded with --flip. Raises UserError if a sample differs from what was written."""
        moments, labels = np.empty((len(rows), *self.moments_shape), np.float16), np.empty(len(rows), np.int64)
        for i, (index, mirror) in enumerate(zip(rows, flipped, strict=True)):
            shard, row = self._shard_and_row(index)
            columns = self._indices[shard]
            offset, crc = (columns.flipped, columns.flipped_crc32) if mirror else (columns.offsets, columns.crc32)
            path = self._path(shard)
            try:
                self._files.read(path, int(offset[row]), memoryview(moments[i]))
            except OSError as error:
                sample = f"sample {columns.numbers[row]:09d}"
                raise UserError(f"{path}: cannot read {sample}: {error.strerror}; {self._remedy(shard)}") from None
            labels[i] = columns.labels[row]
            if zlib.crc32(moments[i]) != crc[row]:
                raise UserError(
                    f"{path}: sample {columns.numbers[row]:09d} differs from what was written (crc32); "
                    f"{self._remedy(shard)}"
                )
        return moments, labels

    def _remedy(self, number: int) -> str:
        if number in self._staged:
            return "remove that copy and start again"
        verify = f"python tools/latents.py verify {self.folder}"
        return f"run the encode command again to restore it; `{verify}` lists all damage"

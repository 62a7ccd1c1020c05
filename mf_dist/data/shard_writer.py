"""Writes latent shards: byte-reproducible webdataset tars, each complete or absent."""

import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from mf_dist.data.shards import Index, Moments, index_checksum, index_path, read_index
from mf_dist.runtime.atomic_files import fsync, fsync_folder, partial_path, sha256_of


@dataclass(frozen=True)
class Record:
    """One image: its number in the source list, posterior moments (2C, S, S) fp16, label, path below the source and
    sha256 of its file; `flipped`: moments of the mirrored image."""

    number: int
    moments: Moments
    label: int
    source: str
    sha256: str
    flipped: Moments | None = None

    def members(self) -> dict[str, Any]:
        flipped = {} if self.flipped is None else {"flipped.npy": self.flipped}
        origin = {"source": self.source, "sha256": self.sha256}
        return {
            "__key__": f"{self.number:09d}",
            "moments.npy": self.moments,
            **flipped,
            "cls": self.label,
            "json": origin,
        }


def write_shard(tar: Path, records: list[Record], skipped: list[str], plan: str) -> None:
    """Writes `tar` and its index, each to a temporary name, fsynced, renamed; the tar is renamed last. Several
    processes may write the same shard at once. `skipped`: a line for each unreadable image of this block; `plan`:
    sha256 of the encoding plan."""
    partial, partial_index = partial_path(tar), partial_path(index_path(tar))
    try:
        _write_tar(partial, records)
        _write_index(partial_index, partial, records, skipped, plan)
        os.replace(partial_index, index_path(tar))
        os.replace(partial, tar)
    except FileNotFoundError:  # another process wrote this shard, finished the dataset and removed the temporary files
        if valid_index(tar, plan) is None:
            raise
    finally:
        for path in (partial, partial_index):
            path.unlink(missing_ok=True)
    fsync_folder(tar.parent)


def _write_tar(partial: Path, records: list[Record]) -> None:
    with open(partial, "wb") as file:
        # mtime 0 and USTAR: equal records give equal bytes, and no extra header before every member
        with webdataset.TarWriter(file, mtime=0, format=tarfile.USTAR_FORMAT) as writer:
            for record in records:
                writer.write(record.members())
        file.flush()
        fsync(file.fileno(), partial)


def _write_index(path: Path, partial: Path, records: list[Record], skipped: list[str], plan: str) -> None:
    offsets = {name: array_offsets(partial, f".{name}.npy") for name in ("moments", "flipped")}
    assert len(offsets["moments"]) == len(records)
    index = {
        "plan": np.array(plan),
        "numbers": np.array([record.number for record in records], np.int32),
        "offsets": offsets["moments"],
        "flipped": offsets["flipped"],
        "labels": np.array([record.label for record in records], np.int32),
        "crc32": np.array([zlib.crc32(record.moments.tobytes()) for record in records], np.uint32),
        "flipped_crc32": np.array(
            [zlib.crc32(r.flipped.tobytes()) for r in records if r.flipped is not None], np.uint32
        ),
        "shape": np.array(records[0].moments.shape),
        "size": np.array(partial.stat().st_size),
        "sha256": np.array(sha256_of(partial)),
        "skipped": np.array(skipped, dtype=np.str_),
    }
    with open(path, "wb") as file:
        np.savez(file, **index, checksum=np.array(index_checksum(index)))  # type: ignore[arg-type]
        file.flush()
        fsync(file.fileno(), path)


def remove_temporary_files(folder: Path) -> None:
    """Removes the shard files of killed writers; a temporary manifest stays, since another task may be writing it."""
    for path in folder.glob("shard-*.tmp"):
        path.unlink(missing_ok=True)


def valid_index(tar: Path, plan: str) -> Index | None:
    """The index of a shard that was made by this plan and still has the size and sha256 in its index; else None."""
    index = read_index(tar)
    if index is None or index.plan != plan or not tar.is_file() or tar.stat().st_size != index.size:
        return None
    return index if sha256_of(tar) == index.sha256 else None


def array_offsets(tar: Path, suffix: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Byte offset in the tar of each array's raw values, after the tar and npy headers."""
    offsets = []
    with tarfile.open(tar, "r:") as archive, open(tar, "rb") as file:
        for member in archive:
            if member.name.endswith(suffix):
                file.seek(member.offset_data)
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                offsets.append(file.tell())
    return np.array(offsets, np.int64)

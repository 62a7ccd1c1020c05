"""Checks a dataset of latents against what was written: every hash, count, header and value."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mf_dist.data.shard_writer import array_offsets
from mf_dist.data.shards import Index, index_path, read_index, read_manifest
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError


def problems(folder: Path, advance: Callable[[int], Any]) -> Iterator[str]:
    """A line for every problem, naming shard and sample; calls advance(n) after n samples. Raises UserError if there is
    no finished dataset."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"no finished dataset at {str(folder)!r}; run tools/encode_latents.py first")
    if manifest["count"] != sum(shard["count"] for shard in manifest["shards"]):
        yield f"manifest.json: {manifest['count']} samples, but its shards have another number"
    names = {shard["name"] for shard in manifest["shards"]}
    yield from (f"{path.name}: not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in names)
    keys: set[str] = set()
    for shard in manifest["shards"]:
        yield from _problems_of_shard(folder, manifest, shard, keys)
        advance(shard["count"])


def _problems_of_shard(folder: Path, manifest: dict[str, Any], shard: dict[str, Any], keys: set[str]) -> Iterator[str]:
    tar = folder / shard["name"]
    if not tar.is_file():
        yield f"{tar.name}: missing"
        return
    if tar.stat().st_size != shard["bytes"]:
        yield f"{tar.name}: {tar.stat().st_size} bytes, the manifest says {shard['bytes']}"
    elif sha256_of(tar) != shard["sha256"]:
        yield f"{tar.name}: its sha256 is not the manifest's"
    index = read_index(tar)
    if index is None:
        yield f"{index_path(tar).name}: missing or damaged"
        return
    try:
        yield from (f"{index_path(tar).name}: {problem}" for problem in _problems_of_index(tar, manifest, shard, index))
        yield from _problems_of_samples(tar, manifest, shard, index, keys)
    except Exception as error:  # tarfile, json and numpy raise many types on corrupt bytes
        yield f"{tar.name}: cannot be read further ({error!r})"


def _problems_of_index(tar: Path, manifest: dict[str, Any], shard: dict[str, Any], index: Index) -> Iterator[str]:
    """All but the labels and checksums, which are compared sample by sample."""
    if sha256_of(index_path(tar)) != shard["index_sha256"]:
        yield "its sha256 is not the manifest's"
    if index.sha256 != shard["sha256"]:
        yield "belongs to another tar"
    channels, side = 2 * manifest["latent_channels"], manifest["latent_size"]
    if index.shape != (channels, side, side):
        yield f"has shape {index.shape}, the manifest {(channels, side, side)}"
    if not len(index.labels) == len(index.crc32) == len(index.offsets) == shard["count"]:
        yield "has columns of different lengths"
    for name, offsets in (("moments", index.offsets), ("flipped", index.flipped)):
        if not np.array_equal(offsets, array_offsets(tar, f".{name}.npy")):
            yield f"its offsets of {name} are not those of the arrays"


def _problems_of_samples(
    tar: Path, manifest: dict[str, Any], shard: dict[str, Any], index: Index, keys: set[str]
) -> Iterator[str]:
    """Reads the tar without using the index, and compares the two."""
    rows = 0
    for row, (key, members) in enumerate(_samples(tar)):
        rows += 1
        where = f"{tar.name}: sample {key}"
        if key in keys:
            yield f"{where} occurs twice"
        keys.add(key)
        expected = {"moments.npy", "cls", "json"} | ({"flipped.npy"} if manifest["flip"] else set())
        if members.keys() != expected:
            yield f"{where} has {', '.join(sorted(members)) or 'nothing'}, expected {', '.join(sorted(expected))}"
        elif row < min(len(index.labels), len(index.crc32)):
            yield from (f"{where}: {problem}" for problem in _problems_of_sample(members, manifest, index, row))
    for name, number in (("the manifest", shard["count"]), ("the index", len(index.labels))):
        if rows != number:
            yield f"{tar.name}: {rows} samples, {name} says {number}"


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, member kind -> bytes) for each run of members with one key; an unexpected member is a sample of its own."""
    with tarfile.open(tar, "r:") as archive:
        key, members = "", dict[str, bytes]()
        for member in archive:
            stem, _, kind = member.name.partition(".")
            file = archive.extractfile(member) if member.isreg() else None
            if stem != key or kind in members:
                if members:
                    yield key, members
                key, members = stem, {}
            members[kind if file else f"{kind} (not a regular file)"] = file.read() if file else b""
        if members:
            yield key, members


def _problems_of_sample(members: dict[str, bytes], manifest: dict[str, Any], index: Index, row: int) -> Iterator[str]:
    side = manifest["latent_size"]
    shape = (2 * manifest["latent_channels"], side, side)
    crcs = {"moments.npy": index.crc32, "flipped.npy": index.flipped_crc32}
    for kind in crcs.keys() & members.keys():
        problem = _problem_of_array(members[kind], shape, int(crcs[kind][row]))
        if problem:
            yield f"{kind} {problem}"
    if members["cls"] != str(index.labels[row]).encode():
        yield f"its class is {members['cls'][:20]!r}, the index says {index.labels[row]}"
    json.loads(members["json"])


def _problem_of_array(raw: bytes, shape: tuple[int, ...], crc: int) -> str | None:
    array = np.load(io.BytesIO(raw), allow_pickle=False)
    if array.dtype != np.float16 or array.shape != shape:
        return f"is {array.dtype} {array.shape}, expected float16 {shape}"
    if zlib.crc32(array.tobytes()) != crc:
        return "differs from what was written (crc32)"
    return None if np.isfinite(array).all() else "is not finite"
